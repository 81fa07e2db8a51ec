"""RWKV-7's time mixing: a matrix state whose transition is diagonal plus low rank.

Per head S_t = (Diag(w_t) - (a_t * n_t) n_t^T) S_{t-1} + k_t v_t^T: the state fades per key channel
and gives up, per channel to a degree a_t, what it holds under the removal key n_t, which is not the
key that it writes under (arXiv 2503.14456, section 4).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...kernels.diagonal_low_rank import diagonal_low_rank
from ...kernels.letters import BTD
from ..base import (
    Axis,
    Carry,
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
from ..genes import choice, number, whole
from ..recurrent_parts import (
    ReadOutNorm,
    at_least_float32,
    full_precision,
    head_count,
    inner_width,
    is_long,
    long_call,
    read_out_norm_params,
)
from ..token_shift import SHIFTS, TokenShift, token_shift_params, token_shift_products
from .delta import unit_length

HEAD_TARGET = 64
FASTEST = -math.exp(-0.5)
"""The log decays lie between this and 0."""
STREAMS = 6


@dataclass(frozen=True)
class Rwkv7Config:
    """Final numbers of one layer; `value_rank` is 0 where values are not mixed."""

    width: int
    heads: int
    head_dim: int
    rank: int
    gate_rank: int
    value_mix: str
    value_rank: int
    shift: str

    @property
    def inner(self) -> int:
        """F: keys, values and read-outs of all heads."""
        return self.heads * self.head_dim

    @property
    def splits(self) -> list[int]:
        """Widths of r, k, v and of what makes decay, removal rate and gate; the values' stream
        makes the values and then what their mix is made of."""
        values = self.inner + self.value_rank
        return [self.inner, self.inner, values, self.rank, self.rank, self.gate_rank]

    @property
    def carries(self) -> str | None:
        """The first layer's values can be mixed into those that are as wide."""
        return None if self.value_mix == "none" else f"values {self.inner}"

    def cost(self, context: int, dtype: torch.dtype) -> Cost:
        ranks = 2 * self.rank + self.gate_rank + self.value_rank
        products = self.width * (sum(self.splits) + self.inner) + ranks * self.inner
        matrix = self.heads * self.head_dim**2
        params = (
            products
            + token_shift_params(self.shift, self.width, STREAMS)
            + (6 if self.value_rank else 5) * self.inner
            + read_out_norm_params("groupnorm", self.heads, self.head_dim)
        )
        # Per token the state is read under the removal key, written under two, and read out.
        shift = token_shift_products(self.shift, self.width, STREAMS)
        flops = 2 * (products + shift + 4 * matrix)
        state = matrix * state_dtype(dtype).itemsize
        state += (self.shift != "none") * self.width * dtype.itemsize
        return Cost(params, params, float(flops), state)

    def build(self) -> Rwkv7:
        return Rwkv7(self)


class Rwkv7(Operator):
    """See the module. `in_proj` makes r, k, v and the small inputs of decay, rate and gate.

    With `value_mix=mix` the values become v + sigmoid(x A_v B_v + v_0) (v_first - v), v_first being
    those that the first layer hands on (arXiv 2503.14456, eq. 9 to 11).
    """

    def __init__(self, config: Rwkv7Config) -> None:
        super().__init__()
        c = self.config = config
        self.shift = TokenShift(c.shift, c.width, STREAMS) if c.shift != "none" else None
        self.in_proj = nn.Linear(c.width, sum(c.splits), bias=False)
        self.decay = nn.Linear(c.rank, c.inner)
        self.rate = nn.Linear(c.rank, c.inner)
        self.gate = nn.Linear(c.gate_rank, c.inner, bias=False)
        self.value = nn.Linear(c.value_rank, c.inner) if c.value_rank else None
        with torch.no_grad():
            # Decays spread from slow to fast over the channels, rates of one half.
            self.decay.bias.copy_(torch.linspace(-5.5, 1.5, c.inner))
            self.rate.bias.zero_()
            if self.value is not None:
                # About two thirds are the first layer's.
                self.value.bias.fill_(0.73)
        self.removal = nn.Parameter(torch.full((c.inner,), 0.85))
        self.mixing = nn.Parameter(torch.ones(c.inner))
        self.bonus = nn.Parameter(0.1 * torch.randn(c.heads, c.head_dim))
        self.norm = ReadOutNorm("groupnorm", "none", c.heads, c.head_dim, 1)
        self.out_proj = nn.Linear(c.inner, c.width, bias=False)

    def forward(
        self, x: BTD, state: State | None = None, carry: Carry | None = None
    ) -> tuple[BTD, State | None]:
        if is_long(x):
            return long_call(self, x, state, carry)
        c = self.config
        tensors: dict[str, Tensor] = {} if state is None else state.tensors
        kept: dict[str, Tensor] = {}
        if self.shift is None:
            parts = list(self.in_proj(x).split(c.splits, dim=-1))
        else:
            streams, kept["shift"] = self.shift(x, tensors.get("shift"))
            weights = torch.split(self.in_proj.weight, c.splits)
            parts = [F.linear(s, w) for s, w in zip(streams, weights, strict=True)]
        r, k, v, low_decay, low_rate, low_gate = parts
        v = self._mixed_values(v, carry)
        decay = at_least_float32(self.decay(torch.tanh(low_decay)))
        rate = torch.sigmoid(at_least_float32(self.rate(low_rate)))
        gate = self.gate(torch.sigmoid(low_gate))

        wide = at_least_float32(k)
        removed = self._heads(wide * self.removal.to(wide.dtype))
        removed = unit_length(removed, "l2")
        written = wide * (1 + (rate - 1) * self.mixing.to(wide.dtype))
        r, v, written, rate = (self._heads(t) for t in (r, v, written, rate))
        with full_precision(x):
            o, kept["matrix"] = diagonal_low_rank(
                r,
                written,
                v,
                -removed,
                removed * rate,
                self._heads(FASTEST * torch.sigmoid(decay)),
                tensors.get("matrix"),
            )
        itself = (at_least_float32(r) * written * self.bonus.to(wide.dtype)).sum(-1, keepdim=True)
        y = self.norm(o, None) + (itself * v).flatten(2)
        out = self.out_proj((y * at_least_float32(gate)).to(x.dtype))
        if state is None:
            return out, None
        return out, State(state.length + x.shape[1], kept)

    def _mixed_values(self, v: Tensor, carry: Carry | None) -> Tensor:
        """The values (B, T, F) from what their stream made, and handed on where others mix them."""
        first = None if carry is None else carry.earlier
        if self.value is not None:
            v, low = torch.split(v, [self.config.inner, self.config.value_rank], -1)
            # The first of a chain has nothing to mix in but its own.
            start = v if first is None else first[0].to(v.dtype)
            mix = torch.sigmoid(self.value(low))
            mixed = torch.lerp(v, start, mix)
        else:
            mixed = start = v
        if carry is not None:
            carry.later = [start]
        return mixed

    def _heads(self, t: Tensor) -> Tensor:
        return t.reshape(*t.shape[:2], self.config.heads, self.config.head_dim)

    def init_state(
        self, batch: int, context: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> State:
        c = self.config
        shape = (batch, c.heads, c.head_dim, c.head_dim)
        tensors = {"matrix": torch.zeros(shape, dtype=state_dtype(dtype), device=device)}
        if c.shift != "none":
            tensors["shift"] = torch.zeros(batch, c.width, dtype=dtype, device=device)
        return State(0, tensors)


def configure(site: Site, genes: Mapping[str, Gene]) -> Rwkv7Config:
    name = "diagonal-low-rank"
    inner = inner_width(name, site.width, number(genes, "expand"))
    heads = head_count(name, inner, whole(genes, "heads"), HEAD_TARGET)
    rank, mix = whole(genes, "rank"), choice(genes, "value_mix")
    return Rwkv7Config(
        width=site.width,
        heads=heads,
        head_dim=inner // heads,
        rank=rank,
        gate_rank=whole(genes, "gate_rank") or 2 * rank,
        value_mix=mix,
        value_rank=whole(genes, "value_rank") if mix == "mix" else 0,
        shift=choice(genes, "shift"),
    )


RWKV7 = Primitive(
    name="diagonal-low-rank",
    kind="mixer",
    summary="matrix state with a diagonal plus low-rank transition (RWKV-7)",
    source="RWKV-7 (arXiv 2503.14456)",
    liv=Liv("r, k, v, decay, rate and gate", "semi-separable", "none", "none", "grouped"),
    axes=(
        Axis(
            "heads",
            0,
            "heads; 0 takes heads of 64 channels, or four where the width has no room",
            low=0.0,
            search=(0, 2, 4),
            grows="heads",
        ),
        Axis(
            "expand",
            1.0,
            "width of keys and values over the model's width",
            low=0.25,
            high=8.0,
            search=(1.0,),
        ),
        Axis(
            "rank",
            64,
            "numbers that decays and removal rates are made of",
            low=1.0,
            high=512.0,
            search=(16, 64),
            grows="width",
        ),
        Axis(
            "gate_rank",
            0,
            "numbers that the gate is made of; 0 is twice as many as `rank`",
            low=0.0,
            high=4096.0,
            grows="width",
        ),
        Axis(
            "value_mix",
            "none",
            "lend: hand the values on, as the paper's first layer does; mix: mix them with those"
            " that the nearest earlier layer of equal width hands on, and hand the first ones on",
            options=("none", "lend", "mix"),
        ),
        Axis(
            "value_rank",
            32,
            "mix: numbers that the share of the first layer's values is made of",
            low=1.0,
            high=512.0,
            grows="width",
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
            "rwkv7",
            {"expand": 1.0, "rank": 64, "shift": "static"},
            "RWKV-7, Goose (arXiv 2503.14456)",
            "as the paper's first layer; later ones have value_mix=mix, and this one lends",
            view=View(
                "S = (Diag(w) - (a * n) n^T) S + k v^T, |n| = 1",
                "values under their keys, until a removal key takes them away",
                "exponentially per key channel, and by removal under n at a rate a per channel",
                "|S^T n|^2 / 2 at rates a and -<S^T k, v>, beside a weight decay by Diag(w)",
            ),
        ),
    ),
)
