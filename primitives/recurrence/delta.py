"""The (gated) delta rule: DeltaNet, Gated DeltaNet, Kimi Delta Attention, DeltaProduct and between.

Per head, S_t = (I - beta_t k_t k_t^T) Diag(a_t) S_{t-1} + beta_t k_t v_t^T and
o_t = S_t^T q_t / sqrt(K): before it writes, the state forgets what it held under the key.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...kernels.delta_rule import delta_rule
from ...kernels.letters import BTD
from ..base import Cost, Operator, State, state_dtype
from ..decays import InputDecay
from ..recurrent_parts import (
    Dt,
    ReadOutNorm,
    ShortConv,
    at_least_float32,
    full_precision,
    is_long,
    long_call,
    read_out_norm_params,
    repeat_groups,
    short_conv_params,
)

NORM_EPS = 1e-6


@dataclass(frozen=True)
class DeltaConfig:
    """Final numbers of one layer; `gate` is one of `GATES`."""

    width: int
    heads: int
    groups: int
    key_dim: int
    value_dim: int
    conv: int
    activation: str
    decay: str
    decay_rank: int
    steps: int
    negative_eigenvalues: bool
    qk_norm: str
    gate: str
    gate_rank: int
    norm: str

    @property
    def inner(self) -> int:
        """F, the values of all heads."""
        return self.heads * self.value_dim

    @property
    def keys(self) -> int:
        """Channels of one step's keys, and of the queries."""
        return self.groups * self.key_dim

    @property
    def mixed(self) -> int:
        """Channels of q, k and v together: what the convolution and the activation act on."""
        return self.keys + self.steps * (self.keys + self.inner)

    @property
    def splits(self) -> list[int]:
        """Widths of (q, k, v), gate, beta and decay in the input projection."""
        gate = (self.gate_rank or self.inner) if self.gate != "none" else 0
        decay = {"none": 0, "scalar": self.heads, "vector": self.decay_rank}[self.decay]
        return [self.mixed, gate, self.steps * self.heads, decay]

    def cost(self, context: int, dtype: torch.dtype) -> Cost:
        projections = self.width * (sum(self.splits) + self.inner)
        projections += self.gate_rank * self.inner + self.decay_rank * self.keys
        matrix = self.heads * self.key_dim * self.value_dim
        decay = {"none": 0, "scalar": 2 * self.heads, "vector": self.keys + self.groups}
        params = (
            projections
            + short_conv_params(self.mixed, self.conv, bias=False)
            + decay[self.decay]
            + read_out_norm_params(self.norm, self.heads, self.value_dim)
        )
        # In every step the state is read under the key, written, and read under the query.
        flops = 2 * (projections + self.mixed * self.conv + 3 * self.steps * matrix)
        tail = self.mixed * max(self.conv - 1, 0) * dtype.itemsize
        return Cost(params, params, float(flops), tail + matrix * state_dtype(dtype).itemsize)

    def build(self) -> Delta:
        return Delta(self)


class Delta(Operator):
    """See the module. `in_proj` makes queries, keys, values, gate, beta and decays, in this order.

    The decay is Mamba-2's, exp(-exp(A_log) softplus(x + b)), a vector's x made of `decay_rank`
    numbers; beta is a sigmoid, twice as large where negative eigenvalues are allowed (arXiv
    2411.12537). With several steps a token decays the state once, then writes several times.
    """

    def __init__(self, config: DeltaConfig) -> None:
        super().__init__()
        c = self.config = config
        self.in_proj = nn.Linear(c.width, sum(c.splits), bias=False)
        self.conv = ShortConv(c.mixed, c.conv, False, c.activation) if c.conv else None
        self.dt = Dt(c.heads) if c.decay == "scalar" else None
        self.decay = (
            InputDecay("dt", c.groups, c.key_dim, c.decay_rank, 0.0)
            if c.decay == "vector"
            else None
        )
        self.gate_up = nn.Linear(c.gate_rank, c.inner, bias=False) if c.gate_rank else None
        self.norm = ReadOutNorm(c.norm, c.gate, c.heads, c.value_dim, c.groups, NORM_EPS)
        self.out_proj = nn.Linear(c.inner, c.width, bias=False)

    def forward(self, x: BTD, state: State | None = None) -> tuple[BTD, State | None]:
        if is_long(x):
            return long_call(self, x, state)
        c = self.config
        tensors: dict[str, Tensor] = {} if state is None else state.tensors
        mixed, z, beta, decay = self.in_proj(x).split(c.splits, dim=-1)

        tail = None
        if self.conv is not None:
            mixed, tail = self.conv(mixed, tensors.get("conv"))
        elif c.activation == "silu":
            mixed = F.silu(mixed)
        q, k, v = mixed.split([c.keys, c.steps * c.keys, c.steps * c.inner], dim=-1)
        q = unit_length(q.unflatten(-1, (c.groups, c.key_dim)), c.qk_norm)
        k = unit_length(k.unflatten(-1, (c.steps * c.groups, c.key_dim)), c.qk_norm)
        beta = torch.sigmoid(at_least_float32(beta))
        if c.negative_eigenvalues:
            beta = 2 * beta

        log_decay = None
        if self.dt is not None:
            log_decay = self.dt(decay)[1]
        elif self.decay is not None:
            log_decay = repeat_groups(self.decay(decay)[0], c.heads)

        batch, tokens, _ = x.shape
        steps = (
            repeat_groups(q, c.heads),
            repeat_groups(k.reshape(batch, tokens * c.steps, c.groups, c.key_dim), c.heads),
            v.reshape(batch, tokens * c.steps, c.heads, c.value_dim),
            beta.reshape(batch, tokens * c.steps, c.heads),
            log_decay,
            tensors.get("matrix"),
        )
        with full_precision(x):
            o, matrix = delta_rule(*steps) if c.steps == 1 else delta_product(*steps)
        if self.gate_up is not None:
            z = self.gate_up(z)
        y = self.out_proj(self.norm(o, z if c.gate != "none" else None).to(x.dtype))
        if state is None:
            return y, None
        kept = {"matrix": matrix}
        if tail is not None:
            kept["conv"] = tail
        return y, State(state.length + x.shape[1], kept)

    def init_state(
        self, batch: int, context: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> State:
        c = self.config
        shape = (batch, c.heads, c.key_dim, c.value_dim)
        tensors = {"matrix": torch.zeros(shape, dtype=state_dtype(dtype), device=device)}
        if c.conv:
            tensors["conv"] = torch.zeros(batch, c.mixed, c.conv - 1, dtype=dtype, device=device)
        return State(0, tensors)


def delta_product(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The delta rule with n steps per token: k, v and beta have n T tokens, q and the decay T.

    A step is a token of the delta rule; the first one decays, the last one is read.
    """
    batch, tokens, heads, width = q.shape
    n = k.shape[1] // tokens
    if log_decay is not None:
        first = torch.zeros_like(log_decay).unsqueeze(2).repeat_interleave(n, 2)
        first[:, :, 0] = log_decay
        log_decay = first.flatten(1, 2)
    q = q.unsqueeze(2).expand(batch, tokens, n, heads, width).flatten(1, 2)
    if tokens > 1 or state is None:
        o, state = delta_rule(q, k, v, beta, log_decay, state)
        return o[:, n - 1 :: n], state
    # A chunk of n steps would solve a system; n steps one by one are cheaper.
    for i in range(n):
        at = slice(i, i + 1)
        decay = None if log_decay is None else log_decay[:, at]
        o, state = delta_rule(q[:, at], k[:, at], v[:, at], beta[:, at], decay, state)
    return o, state


def unit_length(t: Tensor, norm: str) -> Tensor:
    """t / |t| over the last axis, |.| being the l2 or the l1 norm, held above about 1e-3.

    Either keeps |k|_2 <= 1, without which I - beta k k^T has eigenvalues outside -1..1 and the
    state grows without bound.
    """
    wide = at_least_float32(t)
    if norm == "l2":
        scale = torch.rsqrt(wide.square().sum(-1, keepdim=True) + 1e-6)
    else:
        scale = 1 / (wide.abs().sum(-1, keepdim=True) + 1e-3)
    return (wide * scale).to(t.dtype)
