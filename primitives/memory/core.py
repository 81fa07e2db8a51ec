"""A memory that a sequence trains: projections, rates from the input, weights as the state.

What TTT (arXiv 2407.04620) and Titans (arXiv 2501.00663) have in common; see
kernels/learned_memory.py for the equations.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...kernels.inner_model import Inner, Learned, Norm, forward
from ...kernels.learned_memory import learned_memory
from ...kernels.letters import BTD
from ..base import state_dtype
from ..recurrence.delta import unit_length
from ..recurrent_parts import ShortConv, at_least_float32, full_precision, short_conv_params

MOMENTUM_START = 0.0
"""Momentum starts at sigmoid of this: one half."""
FORGET_START = -7.0
"""Forgetting starts at sigmoid of this, about a thousandth per token: a horizon of 1,000 tokens."""


@dataclass(frozen=True)
class MemoryConfig:
    """Final numbers of a memory.

    `depth` matrices per head, with `hidden` channels between them. `rate` is the learning rate of a
    token whose gate is open. `batch_tokens`: gradients are taken at the weights before the batch.
    `shared_qk`: one projection for queries and keys, told apart by their convolutions.
    """

    width: int
    heads: int
    head_dim: int
    depth: int
    hidden: int
    inner: Inner
    momentum: bool
    forget: bool
    rate: float
    batch_tokens: int
    conv: int
    activation: str
    qk_norm: str
    v_norm: str
    shared_qk: bool

    @property
    def channels(self) -> int:
        """F, of all heads."""
        return self.heads * self.head_dim

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Of one head's matrices, the bias among the rows."""
        widths = [self.head_dim, *[self.hidden] * (self.depth - 1), self.head_dim]
        bias = int(self.inner.bias)
        return [(a + bias, b) for a, b in pairwise(widths)]

    @property
    def weights(self) -> int:
        """Numbers in the matrices of all heads."""
        return self.heads * sum(a * b for a, b in self.shapes)

    @property
    def splits(self) -> list[int]:
        """Widths of (q, k, v) or (qk, v), and of the gates, in the input projection."""
        gates = 1 + self.momentum + self.forget
        return [(2 if self.shared_qk else 3) * self.channels, gates * self.heads]

    @property
    def convolved(self) -> int:
        """Channels of the convolution; with one projection for q and k, v has none, as in TTT."""
        return (2 if self.shared_qk else 3) * self.channels if self.conv else 0

    @property
    def params(self) -> int:
        gates = (self.momentum + self.forget) * self.heads
        norm = 2 * self.channels if self.inner.form == "residual-norm" else 0
        conv = short_conv_params(self.convolved, self.conv, bias=False)
        return self.width * sum(self.splits) + conv + gates + norm + self.weights

    def project_flops(self) -> int:
        """Of a token's projections and convolution."""
        return 2 * (self.width * sum(self.splits) + self.convolved * self.conv)

    def gradient_flops(self) -> int:
        """Of a token's gradient: through all matrices, and back through all but the first."""
        back = self.heads * sum(self.hidden * b for _, b in self.shapes[1:])
        return 2 * (self.weights + back)

    def read_flops(self) -> int:
        return 2 * self.weights

    def absorb_flops(self, tokens: int) -> int:
        """Of learning `tokens` tokens in one call, without reading: as `Memory.absorb` does it."""
        flops = tokens * (self.project_flops() + self.gradient_flops())
        if tokens > 1:
            flops += 2 * tokens * self.weights * (1 + self.momentum)
            if self.momentum and self.forget:
                flops += 2 * self.heads * tokens**2 * (tokens + 1)
        return flops

    def state_bytes(self, dtype: torch.dtype) -> int:
        held = (2 + self.momentum) * self.weights * state_dtype(dtype).itemsize
        return held + self.convolved * max(self.conv - 1, 0) * dtype.itemsize


@dataclass
class Views:
    """What a call's tokens say to the memory; (B, T, H, K) and (B, T, H)."""

    q: Tensor
    k: Tensor
    v: Tensor
    rate: Tensor
    log_momentum: Tensor | None
    log_keep: Tensor | None


class Memory(nn.Module):
    """See the module. The matrices at the start of a sequence are parameters.

    The learning rate of a token and head is rate * sigmoid(w . x), as in TTT (section 2.7); its
    momentum and its forgetting are sigmoid(w . x + b) (Titans says: from the data).
    """

    def __init__(self, config: MemoryConfig) -> None:
        super().__init__()
        c = self.config = config
        self.in_proj = nn.Linear(c.width, sum(c.splits), bias=False)
        self.conv = ShortConv(c.convolved, c.conv, False, "none") if c.conv else None
        self.momentum_bias = _bias(c.heads, MOMENTUM_START) if c.momentum else None
        self.forget_bias = _bias(c.heads, FORGET_START) if c.forget else None
        self.initial = nn.ParameterList()
        for rows, columns in c.shapes:
            # Outputs of the inputs' scale; TTT and Titans say nothing. A bias starts at zero.
            weight = torch.randn(c.heads, rows, columns) / math.sqrt(rows - c.inner.bias)
            if c.inner.bias:
                weight[:, -1] = 0.0
            self.initial.append(nn.Parameter(weight))
        normed = c.inner.form == "residual-norm"
        shape = (c.heads, c.head_dim)
        self.norm_weight = nn.Parameter(torch.ones(shape)) if normed else None
        self.norm_bias = nn.Parameter(torch.zeros(shape)) if normed else None

    def start(
        self, batch: int, dtype: torch.dtype, device: torch.device | str
    ) -> tuple[Learned, Tensor | None]:
        """The memory before any token, and the convolution's tail; views of one sequence's."""
        c = self.config
        weights = [w.to(device, state_dtype(dtype)).expand(batch, *w.shape) for w in self.initial]
        tail = None
        if c.conv:
            tail = torch.zeros(batch, c.convolved, c.conv - 1, dtype=dtype, device=device)
        return Learned.fresh(weights, c.momentum), tail

    def absorb(self, prefix: Tensor, batch: int) -> tuple[Learned, Tensor | None]:
        """`start` after the tokens of `prefix`, (P, D), which are one batch of their own."""
        learned, tail = self.start(1, prefix.dtype, prefix.device)
        # A copy: torch's FLOP counter fails on a view of a parameter without gradients.
        seen, tail = self.views(torch.stack((prefix,)), tail)
        with full_precision(prefix):
            _, learned = self._learn(None, seen, learned, prefix.shape[0], 0)
        learned = learned.next_batch()

        def each(held: list[Tensor]) -> list[Tensor]:
            return [t.expand(batch, *t.shape[1:]) for t in held]

        momentum = None if learned.momentum is None else each(learned.momentum)
        now = each(learned.now)
        return Learned(now, now, momentum), None if tail is None else each([tail])[0]

    def views(self, x: BTD, tail: Tensor | None) -> tuple[Views, Tensor | None]:
        """From tokens and the convolution's tail to what they say, and the next tail."""
        c = self.config
        mixed, gates = self.in_proj(x).split(c.splits, dim=-1)
        if c.shared_qk:
            qk, v = mixed.chunk(2, dim=-1)
            mixed = torch.cat((qk, qk, v), -1)
        if self.conv is not None:
            rest = mixed[..., c.convolved :]
            mixed, tail = self.conv(mixed[..., : c.convolved], tail)
            mixed = torch.cat((mixed, rest), -1)
        if c.activation == "silu":
            mixed = F.silu(mixed)
        q, k, v = mixed.reshape(*x.shape[:2], 3, c.heads, c.head_dim).unbind(2)
        if c.qk_norm == "l2":
            q, k = unit_length(q, "l2"), unit_length(k, "l2")
        if c.v_norm == "l2":
            v = unit_length(v, "l2")
        of = list(torch.split(at_least_float32(gates), c.heads, -1))
        rate = c.rate * torch.sigmoid(of.pop(0))
        log_momentum = log_keep = None
        if self.momentum_bias is not None:
            log_momentum = F.logsigmoid(of.pop(0) + self.momentum_bias.to(rate.dtype))
        if self.forget_bias is not None:
            log_keep = F.logsigmoid(-of.pop(0) - self.forget_bias.to(rate.dtype))
        return Views(q, k, v, rate, log_momentum, log_keep), tail

    def learn(self, seen: Views, learned: Learned, phase: int) -> tuple[Tensor, Learned]:
        """What each token reads, (B, T, H, K), float32 at least, and the memory after the last.

        `phase`: tokens that the batch under way has seen before.
        """
        with full_precision(seen.q):
            o, learned = self._learn(seen.q, seen, learned, self.config.batch_tokens, phase)
        assert o is not None
        return o, learned

    def recall(self, q: Tensor, weights: list[Tensor]) -> Tensor:
        """f(q) of the weights given: q and the result (B, T, H, K)."""
        with full_precision(q):
            wide = q.to(weights[0].dtype).transpose(1, 2)
            return forward(self.config.inner, weights, wide, self._norm(weights[0])).transpose(1, 2)

    def queries(self, x: BTD) -> Tensor:
        """The queries of tokens, (B, T, H, K), without a convolution."""
        c = self.config
        q = F.linear(x, self.in_proj.weight[: c.channels])
        q = (F.silu(q) if c.activation == "silu" else q).reshape(*x.shape[:2], c.heads, c.head_dim)
        return unit_length(q, "l2") if c.qk_norm == "l2" else q

    def _learn(
        self, q: Tensor | None, seen: Views, learned: Learned, batch_tokens: int, phase: int
    ) -> tuple[Tensor | None, Learned]:
        return learned_memory(
            q,
            seen.k,
            seen.v,
            seen.rate,
            seen.log_momentum,
            seen.log_keep,
            self.config.inner,
            self._norm(learned.now[0]),
            learned,
            batch_tokens,
            phase,
        )

    def _norm(self, like: Tensor) -> Norm:
        if self.norm_weight is None or self.norm_bias is None:
            return None
        return self.norm_weight.to(like.dtype), self.norm_bias.to(like.dtype)


def _bias(heads: int, start: float) -> nn.Parameter:
    return nn.Parameter(torch.full((heads,), start))


def pack(learned: Learned, tail: Tensor | None) -> dict[str, Tensor]:
    """The tensors of a state."""
    held = {f"start{i}": t for i, t in enumerate(learned.start)}
    held |= {f"now{i}": t for i, t in enumerate(learned.now)}
    held |= {f"momentum{i}": t for i, t in enumerate(learned.momentum or [])}
    return held if tail is None else held | {"conv": tail}


def unpack(tensors: dict[str, Tensor], depth: int) -> tuple[Learned, Tensor | None]:
    """The inverse of `pack`."""
    start, now, momentum = (
        [tensors[f"{part}{i}"] for i in range(depth) if f"{part}{i}" in tensors]
        for part in ("start", "now", "momentum")
    )
    return Learned(start, now, momentum or None), tensors.get("conv")
