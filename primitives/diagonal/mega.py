"""Mega: a moving average that feeds a gated attention within chunks (arXiv 2209.10655).

X' = EMA(X); Z = silu(X' W_z); queries and keys are Z scaled and shifted per channel, values
silu(X W_v); O attends within the token's chunk. With gates gamma = silu(X' W_r) and
phi = sigmoid(X' W_u), H = silu(X' W_h + (gamma O) U_h) and Y = phi H + (1 - phi) X.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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
from ..genes import choice, number, whole
from ..recurrent_parts import at_least_float32, full_precision, inner_width
from .chunk_attention import ChunkAttention, seen_in_chunk
from .moving_average import MovingAverage, moving_average_params

KEY_SHARE = 4
"""Queries and keys have a quarter of the model's width, as in the published language model."""


@dataclass(frozen=True)
class MegaConfig:
    """Final numbers of one layer; `key_dim`, `inner` and `chunk` are 0 without attention."""

    width: int
    dims: int
    attention: str
    key_dim: int
    inner: int
    chunk: int

    @property
    def splits(self) -> list[int]:
        """Widths of Z, reset gate, update gate and candidate, all made from the average."""
        return [self.key_dim, self.inner, self.width, self.width]

    @property
    def shifts(self) -> int:
        """Rows of scales and shifts of queries and keys."""
        if self.attention == "none":
            return 0
        return 4 if self.attention == "laplace" else 3

    def cost(self, context: int, dtype: torch.dtype) -> Cost:
        products = self.width * (sum(self.splits) + 2 * self.inner)
        params = products + sum(self.splits) + self.inner + self.shifts * self.key_dim + self.chunk
        params += moving_average_params(self.width, self.dims)
        # The average's decay, writing and reading are elementwise.
        scores = seen_in_chunk(context, self.chunk) * (self.key_dim + self.inner)
        cached = min(self.chunk, context) * (self.key_dim + self.inner) * dtype.itemsize
        state = self.width * self.dims * state_dtype(dtype).itemsize + cached
        return Cost(params, params, 2.0 * (products + scores), state)

    def build(self) -> Mega:
        return Mega(self)


class Mega(Operator):
    """See the module. The output is Y - X = phi (H - X): a slot adds X to what an operator puts
    out, and the layer's own gate is its residual."""

    def __init__(self, config: MegaConfig) -> None:
        super().__init__()
        c = self.config = config
        self.average = MovingAverage(c.width, c.dims)
        self.in_proj = nn.Linear(c.width, sum(c.splits))
        self.attention: ChunkAttention | None = None
        if c.attention != "none":
            self.value = nn.Linear(c.width, c.inner)
            self.attention = ChunkAttention(c.key_dim, c.chunk, c.attention)
            self.back = nn.Linear(c.inner, c.width, bias=False)

    def forward(self, x: BTD, state: State | None = None) -> tuple[BTD, State | None]:
        c = self.config
        tensors: dict[str, Tensor] = {} if state is None else state.tensors
        start = 0 if state is None else state.length
        with full_precision(x):
            averaged, last = self.average(x, tensors.get("average"))
        z, reset, update, candidate = self.in_proj(averaged.to(x.dtype)).split(c.splits, dim=-1)
        if self.attention is not None:
            cache = None if state is None else (tensors["keys"], tensors["values"])
            o = self.attention(F.silu(z), F.silu(self.value(x)), cache, start)
            candidate = candidate + self.back(F.silu(reset) * o)
        wide = at_least_float32(x)
        candidate = F.silu(at_least_float32(candidate))
        y = (torch.sigmoid(at_least_float32(update)) * (candidate - wide)).to(x.dtype)
        if state is None:
            return y, None
        return y, State(start + x.shape[1], {**tensors, "average": last})

    def init_state(
        self, batch: int, context: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> State:
        """The averages, and the keys and values of the last chunk, of `context` tokens at most."""
        c = self.config
        shape, wide = (batch, c.width, c.dims), state_dtype(dtype)
        tensors = {"average": torch.zeros(shape, dtype=wide, device=device)}
        if self.attention is not None:
            held = min(c.chunk, context)
            for name, width in (("keys", c.key_dim), ("values", c.inner)):
                tensors[name] = torch.zeros(batch, held, width, dtype=dtype, device=device)
        return State(0, tensors)


def configure(site: Site, genes: Mapping[str, Gene]) -> MegaConfig:
    attends = choice(genes, "attention") != "none"
    key_dim = whole(genes, "key_dim") or math.ceil(site.width / KEY_SHARE)
    return MegaConfig(
        width=site.width,
        dims=whole(genes, "dims"),
        attention=choice(genes, "attention"),
        key_dim=key_dim if attends else 0,
        inner=inner_width("moving-average", site.width, number(genes, "expand")) if attends else 0,
        chunk=whole(genes, "chunk") if attends else 0,
    )


MEGA = Primitive(
    name="moving-average",
    kind="mixer",
    summary="damped moving averages of each channel that feed a gated chunk attention (Mega)",
    source="Mega (arXiv 2209.10655)",
    liv=Liv("moving average, gates and values", "low-rank", "banded", "softmax", "dense"),
    axes=(
        Axis("dims", 16, "averages of each channel", low=1.0, high=256.0, search=(4, 16)),
        Axis(
            "attention",
            "softmax",
            "within the chunk: softmax; laplace, weights from the error function, not normalised;"
            " none, only the average and its gate",
            options=("softmax", "laplace", "none"),
            search=("softmax", "laplace", "none"),
        ),
        Axis(
            "chunk",
            128,
            "tokens of a chunk; a token attends to those before it in its own chunk",
            low=1.0,
            high=65536.0,
            search=(32, 128),
        ),
        Axis(
            "key_dim",
            0,
            "width of queries and keys; 0 is a quarter of the model's width",
            low=0.0,
            high=1024.0,
            search=(0,),
            grows="width",
        ),
        Axis(
            "expand",
            2.0,
            "width of the values over the model's width",
            low=0.25,
            high=8.0,
            search=(1.0, 2.0),
        ),
    ),
    configure=configure,
    points=(
        Point(
            "mega",
            {"dims": 16, "attention": "softmax", "chunk": 128, "key_dim": 0, "expand": 2.0},
            "Mega-chunk (arXiv 2209.10655)",
            "with the simple relative bias; the slot's residual is part of the layer's own gate",
            view=View(
                "h = a b x + (1 - a d) h, X' = e h per channel; keys of X', values of x appended",
                "N fading averages of each channel, and the chunk's keys and values",
                "the averages exponentially at N learned rates, the chunk all at once at its end",
                "-a b x h + a d h^2 / 2: descent with weight decay; attention keeps all, descends"
                " nothing",
            ),
        ),
        Point(
            "mega-ema",
            {"dims": 16, "attention": "none"},
            "Mega's moving average and gates without its attention (arXiv 2209.10655)",
            view=View(
                "h = a b x + (1 - a d) h, X' = e h, per channel",
                "N fading averages of each channel",
                "exponentially, at N learned rates per channel",
                "-a b x h + a d h^2 / 2: gradient descent with weight decay",
            ),
        ),
    ),
)
