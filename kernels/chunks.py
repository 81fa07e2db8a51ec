"""What the chunked forms share: cutting a sequence into chunks, decays between its tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Cut:
    """T tokens as N chunks of C, the last one padded: (B, T, H, ...) <-> (B, H, N, C, ...)."""

    tokens: int
    chunks: int
    size: int

    @classmethod
    def of(cls, tokens: int, most: int) -> Cut:
        """As few chunks of at most `most` tokens as there can be, and those as equal as can be."""
        chunks = -(-tokens // most)
        return cls(tokens, chunks, -(-tokens // chunks))

    def __call__(self, x: Tensor) -> Tensor:
        padding = self.chunks * self.size - self.tokens
        if padding:
            # Zeros write nothing into a state, and a log-decay of zero forgets nothing.
            x = F.pad(x, (0, 0) * (x.ndim - 2) + (0, padding))
        x = x.reshape(x.shape[0], self.chunks, self.size, *x.shape[2:])
        return x.movedim(3, 1).contiguous()

    def join(self, x: Tensor) -> Tensor:
        """Back to (B, T, H, ...), without the padding."""
        return x.movedim(1, 3).flatten(1, 2)[:, : self.tokens]


def prefix_sums(log_decay: Tensor, cut: Cut) -> Tensor:
    """The sum of g from the chunk's start to each token, (B or 1, H, N, C, K or 1), in float64.

    In float64 because differences of these sums are needed: after a token that forgets everything
    (-1e4, say), a float32 sum would have lost the digits of the small decays that follow.
    """
    if log_decay.ndim == 1:
        log_decay = log_decay.expand(1, cut.tokens, -1)
    if log_decay.ndim == 3:
        log_decay = log_decay[..., None]
    return cut(log_decay.double()).cumsum(dim=3)


def causal_exp(total: Tensor, dtype: torch.dtype) -> Tensor:
    """exp(G_i - G_j) where j <= i, else 0, (..., C, C), from prefix sums G of shape (..., C, 1).

    The mask comes before exp: above the diagonal the exponent is positive and may overflow, and
    the gradient of an infinity that is masked afterwards is not a number.
    """
    size = total.shape[-2]
    later = torch.ones(size, size, dtype=torch.bool, device=total.device).triu(1)
    return (total - total.mT).to(dtype).masked_fill(later, -torch.inf).exp()


def carry(
    written: Tensor, kept: Tensor | None, state: Tensor | None
) -> tuple[Tensor | None, Tensor]:
    """S_n = kept_n S_{n-1} + written_n over the chunks: the states before each, and the last.

    written: (B, H, N, K, V); kept: (B or 1, H, N, K or 1, 1), None where nothing is forgotten. The
    states before are None where the only one is the zero state.
    """
    steps = written.unbind(2)
    decays = None if kept is None else kept.unbind(2)
    if state is None and len(steps) == 1:
        return None, steps[0]
    now = torch.zeros_like(steps[0]) if state is None else state.to(written.dtype)
    before = []
    for n, step in enumerate(steps):
        before.append(now)
        now = now + step if decays is None else torch.addcmul(step, decays[n], now)
    return torch.stack(before, dim=2), now
