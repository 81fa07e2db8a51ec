"""The gated short convolution: LFM2's block, STAR's GConv-1.

y = W_o (C * conv(B * u)) with B, C and u linear in the input and conv causal and depthwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from ...kernels.letters import BTD
from ..base import Axis, Cost, Gene, Liv, Operator, Point, Primitive, Site, State, View
from ..genes import number, whole
from ..recurrent_parts import ShortConv, inner_width, short_conv_params


@dataclass(frozen=True)
class GatedConvConfig:
    """Final numbers of one layer."""

    width: int
    inner: int
    taps: int

    def cost(self, context: int, dtype: torch.dtype) -> Cost:
        projections = 4 * self.width * self.inner
        params = projections + short_conv_params(self.inner, self.taps, bias=False)
        flops = 2 * (projections + self.inner * self.taps)
        return Cost(params, params, float(flops), self.inner * (self.taps - 1) * dtype.itemsize)

    def build(self) -> GatedConv:
        return GatedConv(self)


class GatedConv(Operator):
    """See the module. `in_proj` makes B, C and u, in this order."""

    def __init__(self, config: GatedConvConfig) -> None:
        super().__init__()
        c = self.config = config
        self.in_proj = nn.Linear(c.width, 3 * c.inner, bias=False)
        self.conv = ShortConv(c.inner, c.taps, False, "none")
        self.out_proj = nn.Linear(c.inner, c.width, bias=False)

    def forward(self, x: BTD, state: State | None = None) -> tuple[BTD, State | None]:
        before, after, u = self.in_proj(x).chunk(3, dim=-1)
        y, tail = self.conv(before * u, None if state is None else state.tensors["conv"])
        out = self.out_proj(after * y)
        if state is None:
            return out, None
        return out, State(state.length + x.shape[1], {"conv": tail})

    def init_state(
        self, batch: int, context: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> State:
        c = self.config
        return State(
            0, {"conv": torch.zeros(batch, c.inner, c.taps - 1, dtype=dtype, device=device)}
        )


def configure(site: Site, genes: Mapping[str, Gene]) -> GatedConvConfig:
    inner = inner_width("gated-conv", site.width, number(genes, "expand"))
    return GatedConvConfig(width=site.width, inner=inner, taps=whole(genes, "taps"))


SHORT_CONV = Primitive(
    name="gated-conv",
    kind="mixer",
    summary="gated short convolution (LFM2's block)",
    source="LFM2 (arXiv 2511.23404), STAR (arXiv 2411.17800)",
    liv=Liv("two gates and a branch", "toeplitz", "banded", "none", "diagonal"),
    axes=(
        Axis("taps", 3, "taps of the causal convolution", low=2.0, high=64.0, search=(3, 4, 7)),
        Axis(
            "expand",
            1.0,
            "width of the convolution over the model's width",
            low=0.25,
            high=8.0,
            search=(1.0, 2.0),
        ),
    ),
    configure=configure,
    points=(
        Point(
            "lfm2-conv",
            {"taps": 3, "expand": 1.0},
            "LFM2 (arXiv 2511.23404)",
            view=View(
                "R = (x_t, R_1, ..., R_{k-2}); y_t = w_0 x_t + sum_i w_i R_i, x_t gated",
                "the last k - 1 gated inputs of every channel as they were",
                "all at once, after k tokens; nothing fades before",
                "none: inputs are put on record and not fitted",
            ),
        ),
    ),
)
