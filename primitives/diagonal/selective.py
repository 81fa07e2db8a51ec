"""Mamba: a short convolution and a selective scan in a gated block.

Each of F channels has a state of N numbers, h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t and
y_t = C_t h_t + D u_t, with the step size dt, B and C computed from the token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...kernels.letters import BTD
from ...kernels.selective_scan import selective_scan
from ..base import (
    Axis,
    Cost,
    Gene,
    Liv,
    Operator,
    Point,
    Primitive,
    Site,
    State,
    View,
    state_dtype,
)
from ..bidirectional import Bidirectional, causal_axis, two_directions
from ..genes import choice, flag, number, whole
from ..recurrent_parts import (
    ShortConv,
    at_least_float32,
    full_precision,
    inner_width,
    short_conv_params,
    taps_axis,
)

NORM_EPS = 1e-6
RANK_SHARE = 16
"""dt is made of 1/16 as many numbers as the model is wide, rounded up (arXiv 2312.00752)."""


@dataclass(frozen=True)
class SelectiveConfig:
    """Final numbers of one layer."""

    width: int
    inner: int
    rows: int
    rank: int
    conv: int
    gate: str
    inner_norms: bool
    causal: bool
    """False: two layers of this kind, one of which reads backward."""

    @property
    def splits(self) -> list[int]:
        """Widths of branch and gate in the input projection."""
        return [self.inner, self.inner if self.gate != "none" else 0]

    @property
    def selected(self) -> list[int]:
        """Widths of what makes dt, of B and of C."""
        return [self.rank, self.rows, self.rows]

    def cost(self, context: int, dtype: torch.dtype) -> Cost:
        products = self.width * (sum(self.splits) + self.inner)
        products += self.inner * (sum(self.selected) + self.rank)
        matrix = self.inner * self.rows
        params = (
            products
            + short_conv_params(self.inner, self.conv, bias=True)
            + 2 * self.inner
            + matrix
            + self.inner_norms * sum(self.selected)
        )
        # The state is read once per token; its decay and its writing are elementwise.
        flops = 2 * (products + self.inner * self.conv + matrix)
        tail = self.inner * max(self.conv - 1, 0) * dtype.itemsize
        state = tail + matrix * state_dtype(dtype).itemsize
        one = Cost(params, params, float(flops), state)
        return one if self.causal else two_directions(one)

    def build(self) -> Selective | Bidirectional:
        return Selective(self) if self.causal else Bidirectional(Selective(self), Selective(self))


class Selective(Operator):
    """See the module. `in_proj` makes branch and gate, `select` dt's numbers, B and C."""

    def __init__(self, config: SelectiveConfig) -> None:
        super().__init__()
        c = self.config = config
        self.in_proj = nn.Linear(c.width, sum(c.splits), bias=False)
        self.conv = ShortConv(c.inner, c.conv, True, "silu") if c.conv else None
        self.select = nn.Linear(c.inner, sum(c.selected), bias=False)
        self.norms = nn.ParameterList(torch.ones(n) for n in c.selected) if c.inner_norms else None
        # At the start dt is log-uniform in 0.001..0.1 and A is -1..-N in every channel (S4D-real).
        self.dt = nn.Linear(c.rank, c.inner)
        nn.init.uniform_(self.dt.weight, -(c.rank**-0.5), c.rank**-0.5)
        dt = torch.empty(c.inner).uniform_(math.log(1e-3), math.log(1e-1)).exp_()
        self.dt.bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))
        rows = torch.arange(1, c.rows + 1, dtype=torch.float32).log()
        self.A_log = nn.Parameter(rows.expand(c.inner, c.rows).clone())
        self.skip = nn.Parameter(torch.ones(c.inner))
        self.out_proj = nn.Linear(c.inner, c.width, bias=False)

    def forward(self, x: BTD, state: State | None = None) -> tuple[BTD, State | None]:
        c = self.config
        tensors: dict[str, Tensor] = {} if state is None else state.tensors
        kept: dict[str, Tensor] = {}
        u, z = self.in_proj(x).split(c.splits, dim=-1)
        if self.conv is not None:
            u, kept["conv"] = self.conv(u, tensors.get("conv"))
        parts = list(self.select(u).split(c.selected, dim=-1))
        if self.norms is not None:
            parts = [normed(p, w) for p, w in zip(parts, self.norms, strict=True)]
        low, b, read = parts
        dt = F.linear(low, self.dt.weight)
        dt = F.softplus(at_least_float32(dt) + at_least_float32(self.dt.bias))
        a = -at_least_float32(self.A_log).exp()
        with full_precision(x):
            y, h = selective_scan(u, dt, a, b, read, tensors.get("h"))
        y = torch.addcmul(at_least_float32(y), at_least_float32(self.skip), u)
        if c.gate == "silu":
            y = y * F.silu(at_least_float32(z))
        out = self.out_proj(y.to(x.dtype))
        if state is None:
            return out, None
        return out, State(state.length + x.shape[1], {"h": h, **kept})

    def init_state(
        self, batch: int, context: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> State:
        c = self.config
        shape = (batch, c.inner, c.rows)
        tensors = {"h": torch.zeros(shape, dtype=state_dtype(dtype), device=device)}
        if c.conv:
            tensors["conv"] = torch.zeros(batch, c.inner, c.conv - 1, dtype=dtype, device=device)
        return State(0, tensors)


def normed(t: Tensor, weight: Tensor) -> Tensor:
    """RMSNorm of the last axis, summed in float32 at least."""
    wide = at_least_float32(t)
    return F.rms_norm(wide, weight.shape, weight.to(wide.dtype), NORM_EPS).to(t.dtype)


def configure(site: Site, genes: Mapping[str, Gene]) -> SelectiveConfig:
    return SelectiveConfig(
        width=site.width,
        inner=inner_width("selective-scan", site.width, number(genes, "expand")),
        rows=whole(genes, "state"),
        rank=whole(genes, "rank") or -(-site.width // RANK_SHARE),
        conv=whole(genes, "conv"),
        gate=choice(genes, "gate"),
        inner_norms=flag(genes, "inner_norms"),
        causal=flag(genes, "causal"),
    )


SELECTIVE = Primitive(
    name="selective-scan",
    kind="mixer",
    summary="selective diagonal state space in a gated block (Mamba)",
    source="Mamba (arXiv 2312.00752)",
    liv=Liv("branch, dt, B, C and gate", "semi-separable", "none", "none", "diagonal"),
    axes=(
        Axis("state", 16, "numbers of state per channel", low=1.0, high=256.0, search=(8, 16, 32)),
        Axis(
            "expand",
            2.0,
            "width of the scan over the model's width",
            low=0.25,
            high=8.0,
            search=(1.0, 2.0),
        ),
        Axis(
            "rank",
            0,
            "numbers that the step sizes are made of; 0 is a sixteenth of the model's width",
            low=0.0,
            search=(0,),
            grows="width",
        ),
        taps_axis(4),
        Axis(
            "gate",
            "silu",
            "of the output, computed from the input",
            options=("none", "silu"),
            search=("none", "silu"),
        ),
        Axis(
            "inner_norms",
            False,
            "RMSNorm of B, C and the numbers of dt (Jamba)",
            options=(False, True),
            search=(False, True),
        ),
        causal_axis(),
    ),
    configure=configure,
    points=(
        Point(
            "mamba",
            {"state": 16, "expand": 2.0, "rank": 0, "conv": 4, "gate": "silu"},
            "Mamba (arXiv 2312.00752)",
            view=View(
                "h = exp(dt A) h + dt B u; y = C h + D u, per channel",
                "N moving averages of each channel, written where the token says",
                "exponentially, at N rates per channel that the token scales by dt",
                "-u B h + |A| h^2 / 2: gradient descent with weight decay, at rate dt",
            ),
        ),
        Point(
            "bimamba",
            {"state": 16, "expand": 2.0, "rank": 0, "conv": 4, "gate": "silu", "causal": False},
            "bidirectional Mamba, as in Dual-path Mamba (arXiv 2403.18257)",
            "two Mamba layers that share nothing, one forward and one backward, summed",
            view=View(
                "h = exp(dt A) h + dt B u; y = C h + D u, from the first token on and the last",
                "N moving averages of each channel and direction, written where the token says",
                "exponentially, at N rates per channel that the token scales by dt",
                "-u B h + |A| h^2 / 2 in each direction: descent with weight decay, at rate dt",
            ),
        ),
        Point(
            "jamba-mamba",
            {
                "state": 16,
                "expand": 2.0,
                "rank": 0,
                "conv": 4,
                "gate": "silu",
                "inner_norms": True,
            },
            "Jamba (arXiv 2403.19887)",
            "Mamba with norms of dt, B and C",
            view=View(
                "h = exp(dt A) h + dt B u; y = C h + D u, per channel",
                "N moving averages of each channel, written where the token says",
                "exponentially, at N rates per channel that the token scales by dt",
                "-u B h + |A| h^2 / 2: gradient descent with weight decay, at rate dt",
            ),
        ),
    ),
)
