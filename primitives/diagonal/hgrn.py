"""HGRN: a complex diagonal recurrence whose decays have a lower bound, in a gated block.

h_t = f_t exp(i theta) h_{t-1} + (1 - f_t) c_t per channel, with f_t above the layer's bound, c_t
complex and the angle theta learned (arXiv 2311.04823, section 3).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from ...kernels.complex_scan import complex_scan
from ...kernels.letters import BTD
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
from ..decays import InputDecay, input_decay_params
from ..genes import choice, number
from ..norm import make_norm, norm_params
from ..recurrent_parts import at_least_float32, full_precision, inner_width

ANGLE_BASE = 10000.0


@dataclass(frozen=True)
class HgrnConfig:
    """Final numbers of one layer; `bound` is where the learned lower bound starts."""

    width: int
    inner: int
    bound: float
    norm: str

    @property
    def splits(self) -> list[int]:
        """Widths of candidate (real and imaginary parts), forget gate and output gate."""
        return [2 * self.inner, self.inner, 2 * self.inner]

    def cost(self, context: int, dtype: torch.dtype) -> Cost:
        products = self.width * (sum(self.splits) + 2 * self.inner)
        params = products + sum(self.splits) + self.width + self.inner
        params += input_decay_params("complement", self.inner, 1, 0)
        if self.norm != "none":
            params += norm_params(self.norm, 2 * self.inner)
        state = 2 * self.inner * state_dtype(dtype).itemsize
        return Cost(params, params, float(2 * products), state)

    def build(self) -> Hgrn:
        return Hgrn(self)


class Hgrn(Operator):
    """See the module. `in_proj` makes candidate, forget gate and output gate, in this order."""

    def __init__(self, config: HgrnConfig) -> None:
        super().__init__()
        c = self.config = config
        self.in_proj = nn.Linear(c.width, sum(c.splits))
        nn.init.zeros_(self.in_proj.bias)
        self.decay = InputDecay("complement", c.inner, 1, 0, c.bound)
        self.angle = nn.Parameter(ANGLE_BASE ** (-2 * torch.arange(c.inner) / c.inner))
        self.norm = make_norm(c.norm, 2 * c.inner) if c.norm != "none" else None
        self.out_proj = nn.Linear(2 * c.inner, c.width)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: BTD, state: State | None = None) -> tuple[BTD, State | None]:
        c = self.config
        candidate, forget, gate = self.in_proj(x).split(c.splits, dim=-1)
        candidate = F.silu(at_least_float32(candidate))
        log_f, rest = self.decay(forget)
        assert rest is not None
        log_f, rest = log_f.squeeze(-1), rest.squeeze(-1)
        planes = candidate.view(*rest.shape[:-1], 2, -1)
        written = (planes * rest[..., None, :]).flatten(-2)
        held = None if state is None else state.tensors["h"]
        with full_precision(x):
            h, last = complex_scan(log_f, self.angle, written, held)
        y = torch.sigmoid(at_least_float32(gate)) * h
        y = y.to(x.dtype)
        out = self.out_proj(y if self.norm is None else self.norm(y))
        if state is None:
            return out, None
        return out, State(state.length + x.shape[1], {"h": last})

    def init_state(
        self, batch: int, context: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> State:
        shape = (batch, 2 * self.config.inner)
        return State(0, {"h": torch.zeros(shape, dtype=state_dtype(dtype), device=device)})


def configure(site: Site, genes: Mapping[str, Gene]) -> HgrnConfig:
    return HgrnConfig(
        width=site.width,
        inner=inner_width("complex-scan", site.width, number(genes, "expand")),
        bound=site.layer / site.depth,
        norm=choice(genes, "norm"),
    )


HGRN = Primitive(
    name="complex-scan",
    kind="mixer",
    summary="complex diagonal recurrence with bounded decays in a gated block (HGRN)",
    source="HGRN (arXiv 2311.04823)",
    liv=Liv("candidate, forget gate and output gate", "diagonal", "none", "none", "diagonal"),
    axes=(
        Axis(
            "expand",
            1.0,
            "complex channels over the model's width",
            low=0.25,
            high=8.0,
            search=(1.0, 2.0),
        ),
        Axis(
            "norm",
            "none",
            "of the gated output, before the projection back",
            options=("none", "layernorm", "rmsnorm"),
            search=("none", "rmsnorm"),
        ),
    ),
    configure=configure,
    points=(
        Point(
            "hgrn",
            {"expand": 1.0, "norm": "none"},
            "HGRN (arXiv 2311.04823)",
            "each layer learns its own lower bound, starting at its share of the layers below",
            view=View(
                "h = f e^(i theta) h + (1-f) c, f = l + (1-l) sigmoid(x W), complex, per channel",
                "one weighted average per channel, turning by a learned angle per token",
                "exponentially, at a rate per channel that the token chooses, slower than l",
                "(1-f) |h - c|^2 / 2, one step of gradient descent, where theta is 0",
            ),
        ),
    ),
)
