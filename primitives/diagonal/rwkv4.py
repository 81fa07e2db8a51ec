"""RWKV-4: per channel, an average of values weighted by exponentials of their keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...kernels.definitions import NOTHING
from ...kernels.letters import BTD
from ...kernels.wkv import wkv
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
from ..decays import FASTEST, MOST, SLOWEST
from ..genes import choice, number
from ..recurrent_parts import at_least_float32, full_precision, inner_width
from ..token_shift import SHIFTS, TokenShift, token_shift_params, token_shift_products

STREAMS = 3
PARTS = ("num", "den", "m")


@dataclass(frozen=True)
class Rwkv4Config:
    """Final numbers of one layer."""

    width: int
    inner: int
    shift: str

    def cost(self, context: int, dtype: torch.dtype) -> Cost:
        products = 4 * self.width * self.inner
        params = products + 2 * self.inner + token_shift_params(self.shift, self.width, STREAMS)
        flops = 2 * (products + token_shift_products(self.shift, self.width, STREAMS))
        state = 3 * self.inner * state_dtype(dtype).itemsize
        state += (self.shift != "none") * self.width * dtype.itemsize
        return Cost(params, params, float(flops), state)

    def build(self) -> Rwkv4:
        return Rwkv4(self)


class Rwkv4(Operator):
    """W_o (sigmoid(r) * wkv(k, v)); `in_proj` makes r, k and v from mixes of two tokens."""

    def __init__(self, config: Rwkv4Config) -> None:
        super().__init__()
        c = self.config = config
        self.shift = TokenShift(c.shift, c.width, STREAMS) if c.shift != "none" else None
        self.in_proj = nn.Linear(c.width, 3 * c.inner, bias=False)
        self.decay = nn.Parameter(torch.linspace(SLOWEST, FASTEST, c.inner))
        self.bonus = nn.Parameter(torch.rand(c.inner))
        self.out_proj = nn.Linear(c.inner, c.width, bias=False)

    def forward(self, x: BTD, state: State | None = None) -> tuple[BTD, State | None]:
        c = self.config
        tensors: dict[str, Tensor] = {} if state is None else state.tensors
        kept: dict[str, Tensor] = {}
        if self.shift is None:
            r, k, v = self.in_proj(x).chunk(3, dim=-1)
        else:
            streams, kept["shift"] = self.shift(x, tensors.get("shift"))
            weights = torch.split(self.in_proj.weight, c.inner)
            r, k, v = (F.linear(s, w) for s, w in zip(streams, weights, strict=True))
        held = None if state is None else (tensors["num"], tensors["den"], tensors["m"])
        log_decay = -at_least_float32(self.decay).clamp_max(MOST).exp()
        with full_precision(x):
            y, parts = wkv(at_least_float32(k), at_least_float32(v), log_decay, self.bonus, held)
        out = self.out_proj((torch.sigmoid(at_least_float32(r)) * y).to(x.dtype))
        if state is None:
            return out, None
        kept.update(zip(PARTS, parts, strict=True))
        return out, State(state.length + x.shape[1], kept)

    def init_state(
        self, batch: int, context: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> State:
        c = self.config
        wide = state_dtype(dtype)
        tensors = {
            name: torch.full((batch, c.inner), fill, dtype=wide, device=device)
            for name, fill in zip(PARTS, (0.0, 0.0, NOTHING), strict=True)
        }
        if c.shift != "none":
            tensors["shift"] = torch.zeros(batch, c.width, dtype=dtype, device=device)
        return State(0, tensors)


def configure(site: Site, genes: Mapping[str, Gene]) -> Rwkv4Config:
    inner = inner_width("exponential-average", site.width, number(genes, "expand"))
    return Rwkv4Config(site.width, inner, choice(genes, "shift"))


RWKV4 = Primitive(
    name="exponential-average",
    kind="mixer",
    summary="per channel, a fading average weighted by exponentials of keys (RWKV-4)",
    source="RWKV-4 (arXiv 2305.13048)",
    liv=Liv("r, k and v", "diagonal", "none", "none", "diagonal"),
    axes=(
        Axis(
            "expand",
            1.0,
            "width of the averages over the model's width",
            low=0.25,
            high=8.0,
            search=(1.0, 2.0),
        ),
        Axis(
            "shift",
            "static",
            "mix each token with the one before it, for every projection by itself: static, a"
            " learned share per channel; dynamic, a share from the input too (RWKV-6)",
            options=SHIFTS,
            search=SHIFTS,
        ),
    ),
    configure=configure,
    points=(
        Point(
            "rwkv4",
            {"expand": 1.0, "shift": "static"},
            "RWKV-4 (arXiv 2305.13048)",
            view=View(
                "num = w num + e^k v, den = w den + e^k; y = (num + e^(u+k) v) / (den + e^(u+k))",
                "one weighted average per channel, and the sum of its weights",
                "exponentially, at a learned rate per channel, or under a large key",
                "e^k / den (num/den - v)^2 / 2, one step of gradient descent on num/den",
            ),
        ),
    ),
)
