"""A Kolmogorov-Arnold network as a channel mixer: a learned function on every edge.

Two layers, D to F and F to D, of y_j = sum_i phi_ji(x_i) with phi(x) = b silu(x) + s sum_m c_m
B_m(x) (KAN, arXiv 2404.19756, equations 2.10 to 2.12). B_m are the B-splines of an order k over G
equal intervals of [-reach, reach], prolonged by k intervals on each side. The paper moves its grids
to the activations' range while it trains; here they stay, and beyond them only silu is left.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.letters import BTD
from ..base import Axis, Cost, Gene, Liv, Operator, Point, Primitive, Site, State, View
from ..genes import number, whole
from ..recurrent_parts import at_least_float32
from .mlp import EXPANSION, inner_width, passed


@dataclass(frozen=True)
class KanConfig:
    """Final numbers of a two-layer network."""

    width: int
    inner: int
    grid: int
    """G, the intervals."""
    order: int
    """k, the degree of the pieces."""
    reach: float

    @property
    def splines(self) -> int:
        """The B-splines of one edge."""
        return self.grid + self.order

    def cost(self, context: int, dtype: torch.dtype) -> Cost:
        edges = 2 * self.width * self.inner
        params = edges * (self.splines + 2)
        return Cost(params, params, 2.0 * edges * (self.splines + 1))

    def build(self) -> Kan:
        return Kan(self)


class KanLayer(nn.Module):
    """One layer, of `inputs` to `outputs` channels; see the module.

    As published the functions start near b silu(x), with small splines.
    """

    def __init__(self, inputs: int, outputs: int, config: KanConfig) -> None:
        super().__init__()
        self.order, self.reach, self.grid = config.order, config.reach, config.grid
        bound = inputs**-0.5
        self.base = nn.Parameter(torch.empty(outputs, inputs).uniform_(-bound, bound))
        self.spline_scale = nn.Parameter(torch.full((outputs, inputs), bound))
        self.splines = nn.Parameter(0.1 * torch.randn(outputs, inputs, config.splines))

    def forward(self, x: Tensor) -> Tensor:
        bases = b_splines(at_least_float32(x), self.grid, self.order, self.reach)
        curves = self.spline_scale[..., None] * self.splines
        y = F.linear(bases.to(x.dtype).flatten(-2), curves.flatten(1))
        return y + F.linear(F.silu(x), self.base)


def b_splines(x: Tensor, grid: int, order: int, reach: float) -> Tensor:
    """The grid + order B-splines at every x, on a new last axis: the Cox-de Boor recursion.

    B_{m,0} is 1 from knot m to m + 1 and 0 elsewhere; B_{m,k}(u) = (u - m)/k B_{m,k-1}(u) +
    (m + k + 1 - u)/k B_{m+1,k-1}(u), where u counts knots from the first.
    """
    u = (x + reach) * (grid / (2 * reach)) + order
    # Far outside every spline is 0; a bounded u keeps 0 * u from overflowing.
    u = u.clamp(-1.0, grid + 2 * order + 1.0)[..., None]
    knots = torch.arange(grid + 2 * order, dtype=x.dtype, device=x.device)
    bases = ((u >= knots) & (u < knots + 1)).to(x.dtype)
    for k in range(1, order + 1):
        first = knots[: len(knots) - k]
        rising = (u - first) * bases[..., :-1]
        falling = (first + (k + 1) - u) * bases[..., 1:]
        bases = (rising + falling) / k
    return bases


class Kan(Operator):
    """A network of two layers over the channels of every token by itself; it carries no state."""

    def __init__(self, config: KanConfig) -> None:
        super().__init__()
        self.config = config
        self.entry = KanLayer(config.width, config.inner, config)
        self.exit = KanLayer(config.inner, config.width, config)

    def forward(self, x: BTD, state: State | None = None) -> tuple[BTD, State | None]:
        return self.exit(self.entry(x)), passed(state, x)

    def init_state(
        self, batch: int, context: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> State:
        return State()


def configure(site: Site, genes: Mapping[str, Gene]) -> KanConfig:
    return KanConfig(
        width=site.width,
        inner=inner_width(site.width, number(genes, "expansion")),
        grid=whole(genes, "grid"),
        order=whole(genes, "order"),
        reach=number(genes, "reach"),
    )


KAN = Primitive(
    name="spline-network",
    kind="channel",
    summary="a learned function on every edge between channels (KAN)",
    source="KAN (arXiv 2404.19756)",
    liv=Liv("dense", "diagonal", "none", "swish", "dense"),
    axes=(
        Axis(
            "expansion",
            0.5,
            "inner width as a multiple of the width, rounded to a multiple of 8; an edge has"
            " grid + order + 2 parameters",
            low=EXPANSION.low,
            high=EXPANSION.high,
            search=(0.25, 0.5, 1.0),
        ),
        Axis("grid", 5, "intervals of a function", low=1.0, high=64.0, search=(3, 5, 8)),
        Axis("order", 3, "degree of its pieces", low=1.0, high=7.0, search=(2, 3)),
        Axis(
            "reach",
            3.0,
            "the functions' splines cover -reach to reach; a normed input has variance 1",
            low=0.0625,
            high=64.0,
        ),
    ),
    configure=configure,
    points=(
        Point(
            "kan",
            {"grid": 5, "order": 3, "reach": 1.0},
            "KAN (arXiv 2404.19756)",
            "with the published grid on -1..1, which stays where it is",
            view=View(
                "none: y_t depends on x_t alone",
                "nothing",
                "all at once: every token by itself",
                "none: there is no state to fit",
            ),
        ),
    ),
)
