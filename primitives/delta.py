"""The (gated) delta rule: DeltaNet, Gated DeltaNet and between.

Per head, S_t = a_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T and o_t = S_t^T q_t / sqrt(K):
before it writes, the state forgets what it held under the key.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels.delta_rule import delta_rule
from ..kernels.letters import BTD
from .base import Axis, Cost, Gene, Liv, Operator, Point, Primitive, Site, State, state_dtype
from .genes import choice, flag, number, whole
from .recurrent_parts import (
    GATES,
    Dt,
    ReadOutNorm,
    ShortConv,
    at_least_float32,
    full_precision,
    group_count,
    head_count,
    inner_width,
    read_out_norm_params,
    repeat_groups,
    short_conv_params,
    taps_axis,
)

HEAD_TARGET = 128
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
    negative_eigenvalues: bool
    qk_norm: str
    gate: str
    norm: str

    @property
    def inner(self) -> int:
        """F, the values of all heads."""
        return self.heads * self.value_dim

    @property
    def mixed(self) -> int:
        """Channels of q, k and v together: what the convolution and the activation act on."""
        return self.inner + 2 * self.groups * self.key_dim

    @property
    def splits(self) -> list[int]:
        """Widths of (q, k, v), gate, beta and decay in the input projection."""
        gate = self.inner if self.gate != "none" else 0
        return [self.mixed, gate, self.heads, self.heads if self.decay == "scalar" else 0]

    def cost(self, context: int, dtype: torch.dtype) -> Cost:
        projections = self.width * (sum(self.splits) + self.inner)
        matrix = self.heads * self.key_dim * self.value_dim
        params = (
            projections
            + short_conv_params(self.mixed, self.conv, bias=False)
            + (2 * self.heads if self.decay == "scalar" else 0)
            + read_out_norm_params(self.norm, self.heads, self.value_dim)
        )
        # The state is read under the key, written, and read under the query, once per token.
        flops = 2 * (projections + self.mixed * self.conv + 3 * matrix)
        tail = self.mixed * max(self.conv - 1, 0) * dtype.itemsize
        return Cost(params, params, float(flops), tail + matrix * state_dtype(dtype).itemsize)

    def build(self) -> Delta:
        return Delta(self)


class Delta(Operator):
    """See the module. `in_proj` makes queries, keys, values, gate, beta and decays, in this order.

    The decay is Mamba-2's, exp(-exp(A_log) softplus(x + b)); beta is a sigmoid, twice as large
    where negative eigenvalues are allowed (arXiv 2411.12537).
    """

    def __init__(self, config: DeltaConfig) -> None:
        super().__init__()
        c = self.config = config
        self.in_proj = nn.Linear(c.width, sum(c.splits), bias=False)
        self.conv = ShortConv(c.mixed, c.conv, False, c.activation) if c.conv else None
        self.dt = Dt(c.heads) if c.decay == "scalar" else None
        self.norm = ReadOutNorm(c.norm, c.gate, c.heads, c.value_dim, c.groups, NORM_EPS)
        self.out_proj = nn.Linear(c.inner, c.width, bias=False)

    def forward(self, x: BTD, state: State | None = None) -> tuple[BTD, State | None]:
        c = self.config
        tensors: dict[str, Tensor] = {} if state is None else state.tensors
        mixed, z, beta, decay = self.in_proj(x).split(c.splits, dim=-1)

        tail = None
        if self.conv is not None:
            mixed, tail = self.conv(mixed, tensors.get("conv"))
        elif c.activation == "silu":
            mixed = F.silu(mixed)
        keys = c.groups * c.key_dim
        q, k, v = mixed.split([keys, keys, c.inner], dim=-1)
        q, k = (t.unflatten(-1, (c.groups, c.key_dim)) for t in (q, k))
        q, k = unit_length(q, c.qk_norm), unit_length(k, c.qk_norm)
        beta = torch.sigmoid(at_least_float32(beta))
        if c.negative_eigenvalues:
            beta = 2 * beta

        log_decay = self.dt(decay)[1] if self.dt is not None else None

        with full_precision(x):
            o, matrix = delta_rule(
                repeat_groups(q, c.heads),
                repeat_groups(k, c.heads),
                v.unflatten(-1, (c.heads, c.value_dim)),
                beta,
                log_decay,
                tensors.get("matrix"),
            )
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


def configure(site: Site, genes: Mapping[str, Gene]) -> DeltaConfig:
    name = "delta"
    inner = inner_width(name, site.width, number(genes, "expand"))
    heads = head_count(name, inner, whole(genes, "heads"), HEAD_TARGET)
    return DeltaConfig(
        width=site.width,
        heads=heads,
        groups=group_count(name, heads, whole(genes, "groups")),
        key_dim=whole(genes, "key_dim") or max(1, round(site.width / heads)),
        value_dim=inner // heads,
        conv=whole(genes, "conv"),
        activation=choice(genes, "activation"),
        decay=choice(genes, "decay"),
        negative_eigenvalues=flag(genes, "negative_eigenvalues"),
        qk_norm=choice(genes, "qk_norm"),
        gate=choice(genes, "gate"),
        norm=choice(genes, "norm"),
    )


DELTA = Primitive(
    name="delta",
    kind="mixer",
    summary="delta rule: a matrix state that overwrites what a key held (DeltaNet, gated)",
    source="DeltaNet (arXiv 2102.11174, 2406.06484), Gated DeltaNet (arXiv 2412.06464)",
    liv=Liv("qkv and beta with gate", "semi-separable", "none", "none", "grouped"),
    axes=(
        Axis(
            "heads",
            0,
            "heads; 0 takes heads of 128 value channels, or four where the width has no room",
            low=0.0,
            search=(0, 2, 4, 8),
        ),
        Axis(
            "key_dim",
            0,
            "key width of a head, the state's first axis; 0 is the model's width over the heads",
            low=0.0,
            high=256.0,
            search=(0, 16, 32, 64),
        ),
        Axis(
            "groups",
            0,
            "different queries and keys, each shared by heads/groups heads; 0 is one per head",
            low=0.0,
            search=(0, 1),
        ),
        Axis(
            "expand",
            1.0,
            "width of all values over the model's width",
            low=0.25,
            high=8.0,
            search=(1.0, 2.0),
        ),
        taps_axis(4),
        Axis(
            "activation",
            "silu",
            "of queries, keys and values, after the convolution",
            options=("none", "silu"),
            search=("none", "silu"),
        ),
        Axis(
            "decay",
            "none",
            "none; scalar: one per head and token, from the input, as in Mamba-2",
            options=("none", "scalar"),
            search=("none", "scalar"),
        ),
        Axis(
            "negative_eigenvalues",
            False,
            "beta in 0..2 instead of 0..1, so that a write can flip a direction (arXiv 2411.12537)",
            options=(False, True),
            search=(False, True),
        ),
        Axis(
            "qk_norm",
            "l2",
            "queries and keys are divided by this norm, per head; l1 is the first DeltaNet's"
            " (arXiv 2102.11174)",
            options=("l2", "l1"),
            search=("l2",),
        ),
        Axis(
            "gate",
            "none",
            "of the normalised read-out, computed from the input",
            options=GATES,
            search=("none", "silu"),
        ),
        Axis(
            "norm",
            "rmsnorm",
            "of the read-out, per head, before the gate",
            options=("none", "rmsnorm", "groupnorm"),
            search=("rmsnorm",),
        ),
    ),
    configure=configure,
    points=(
        Point(
            "deltanet",
            {"expand": 1.0, "conv": 4, "activation": "silu", "decay": "none", "gate": "none"},
            "DeltaNet (arXiv 2406.06484)",
        ),
        Point(
            "gated-deltanet",
            {"expand": 2.0, "conv": 4, "activation": "silu", "decay": "scalar", "gate": "silu"},
            "Gated DeltaNet (arXiv 2412.06464)",
        ),
    ),
)
