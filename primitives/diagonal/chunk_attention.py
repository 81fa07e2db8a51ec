"""Mega's attention: one head, causal within chunks of fixed length (arXiv 2209.10655, section 3).

O_t = sum_s f(q_t . k_s / tau + b[t - s]) v_s over the tokens s <= t of t's chunk. Softmax has
tau = sqrt(K); the Laplace function, which is not normalised, divides by the number of tokens seen.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ...kernels.letters import BTD, BTF
from ..position import ContextError
from ..recurrent_parts import at_least_float32

CENTRE = math.sqrt(1 / 2)
SPREAD = math.sqrt(1 / (4 * math.pi))
"""Mean and deviation of the Laplace function, so chosen that it follows the squared ReLU."""


def laplace(x: Tensor) -> Tensor:
    """(1 + erf((x - mean) / (deviation sqrt(2)))) / 2."""
    return (1 + torch.erf((x - CENTRE) / (SPREAD * math.sqrt(2)))) / 2


def seen_in_chunk(context: int, chunk: int) -> float:
    """The tokens that a query sees, itself included, on average over the positions 1..context."""
    if not chunk:
        return 0.0
    full, rest = divmod(context, chunk)
    return (full * chunk * (chunk + 1) / 2 + rest * (rest + 1) / 2) / context


class ChunkAttention(nn.Module):
    """Queries and keys are one tensor with two scales and shifts (equations 11 and 12).

    A shift of the keys adds the same to all scores of a query, which softmax does not see: only the
    Laplace function has it. The bias is the authors' simple one, a number per distance.
    """

    def __init__(self, key_dim: int, chunk: int, function: str) -> None:
        super().__init__()
        self.chunk, self.function = chunk, function
        self.scales = nn.Parameter(1 + 0.02 * torch.randn(2, key_dim))
        shifts = 2 if function == "laplace" else 1
        self.shifts = nn.Parameter(torch.zeros(shifts, key_dim))
        self.bias = nn.Parameter(0.02 * torch.randn(chunk))

    def forward(self, z: BTD, v: BTF, cache: tuple[Tensor, Tensor] | None, start: int) -> BTF:
        """The outputs for the tokens from position `start` on.

        `cache` holds the chunk's keys and values by place in the chunk, (B, S, K) and (B, S, V); it
        is written in place. Raises ContextError, before that, where the tokens do not fit.
        """
        q = torch.addcmul(self.shifts[0], z, self.scales[0])
        k = z * self.scales[1]
        if self.function == "laplace":
            k = k + self.shifts[1]
        past = start % self.chunk
        tokens = z.shape[1]
        if cache is not None:
            held = [t[:, :past].to(v.dtype).clone() for t in cache]
            self._write(cache, k, v, start)
            k, v = torch.cat((held[0], k), 1), torch.cat((held[1], v), 1)
        if past + tokens <= self.chunk:
            return self._attend(q, k, v, past)
        # Whole chunks from the first one's start; the last is padded, and so are lost queries.
        padding = -(past + tokens) % self.chunk
        q = nn.functional.pad(q, (0, 0, past, padding))
        k, v = (nn.functional.pad(t, (0, 0, 0, padding)) for t in (k, v))
        q, k, v = (t.reshape(-1, self.chunk, t.shape[-1]) for t in (q, k, v))
        o = self._attend(q, k, v, 0)
        return o.reshape(z.shape[0], -1, o.shape[-1])[:, past : past + tokens]

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, first: int) -> Tensor:
        """q (B, T, K), at the places from `first` of a chunk of which k and v are the start."""
        place = torch.arange(first, first + q.shape[1], device=q.device)[:, None]
        distance = place - torch.arange(k.shape[1], device=q.device)
        bias = at_least_float32(self.bias)[distance.clamp_min(0)]
        scores = at_least_float32(torch.bmm(q, k.mT))
        if self.function == "laplace":
            weights = laplace(scores / (place + 1) + bias).masked_fill(distance < 0, 0.0)
        else:
            scores = torch.add(bias, scores, alpha=q.shape[-1] ** -0.5)
            weights = scores.masked_fill(distance < 0, -torch.inf).softmax(-1)
        return torch.bmm(weights.to(v.dtype), v)

    def _write(self, cache: tuple[Tensor, Tensor], k: Tensor, v: Tensor, start: int) -> None:
        """Keys and values of the tokens that share the last one's chunk, to their places in it."""
        size, tokens = cache[0].shape[1], k.shape[1]
        end = start + tokens
        if size < self.chunk and end > size:
            raise ContextError(f"the cache of the chunk holds {size} tokens; this call needs {end}")
        place = max(start, (end - 1) // self.chunk * self.chunk)
        for buffer, new in zip(cache, (k, v), strict=True):
            first = place % self.chunk
            buffer[:, first : first + end - place] = new[:, place - start :]
