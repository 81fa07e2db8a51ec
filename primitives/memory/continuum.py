"""HOPE's continuum memory: a chain of MLPs, each learned at a pace of its own.

y = MLP_k( ... MLP_2(MLP_1(x))), the weights of level l updated once in C_l tokens by the sum of
eta_t times an inner error over those tokens (Nested Learning, arXiv 2512.24695, the section on the
continuum memory system). With one level that is never updated it is a Transformer's MLP block.

What the paper leaves open, and what is done here. The error is that of any optimiser on any
objective: here gradient descent on the mean over a head's channels of (MLP_l(u_t) - v_t)^2, u_t the
level's input and v_t a learned projection of the layer's input, one per level, as TTT and Titans
regress values. The rate eta_t of a level comes from the layer's input, rate * sigmoid(w . x) / C_l,
so that a chunk takes a step of one average gradient whatever its length. The MLPs are
x + LN(MLP(x)) by default, which bounds the step; the paper writes MLP, and x + W_1 act(W_2 x) where
it gives a form (`form=residual`). The fastest level comes first. This is the chain of the paper's
"sequential" memory; HOPE's other part, the self-modifying Titans before it, is not here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from ...kernels.inner_model import Activation, Form, Inner
from ...kernels.letters import BTD
from ...kernels.slow_memory import slow_memory
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
from ..recurrent_parts import at_least_float32, full_precision, head_count, inner_width

DEPTH = 2
"""Matrices of a level's MLP."""


@dataclass(frozen=True)
class ContinuumConfig:
    """Final numbers of one layer. `chunks`: tokens between two updates, level by level."""

    width: int
    heads: int
    hidden: int
    inner: Inner
    chunks: tuple[int, ...]
    rate: float

    @property
    def levels(self) -> int:
        return len(self.chunks)

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def splits(self) -> list[int]:
        """Widths of the targets and of the rates of all levels in the input projection."""
        return [self.levels * self.width, self.levels * self.heads]

    def cost(self, context: int, dtype: torch.dtype) -> Cost:
        matrix = self.heads * self.head_dim * self.hidden
        weights = self.levels * DEPTH * matrix
        products = self.width * sum(self.splits)
        params = products + weights
        if self.inner.form == "residual-norm":
            params += 2 * self.levels * self.width
        # Through the two matrices, and back through the second.
        flops = 2.0 * (products + weights + self.levels * matrix)
        # The weights and the steps that wait for the chunk's end.
        return Cost(params, params, flops, 2 * weights * state_dtype(dtype).itemsize)

    def build(self) -> Continuum:
        return Continuum(self)


class Continuum(Operator):
    """See the module. `initial` holds the matrices at the start of a sequence, level by level."""

    def __init__(self, config: ContinuumConfig) -> None:
        super().__init__()
        c = self.config = config
        self.in_proj = nn.Linear(c.width, sum(c.splits), bias=False)
        self.initial = nn.ParameterList()
        for _ in c.chunks:
            for rows, columns in ((c.head_dim, c.hidden), (c.hidden, c.head_dim)):
                weight = torch.randn(c.heads, rows, columns) / math.sqrt(rows)
                self.initial.append(nn.Parameter(weight))
        normed = c.inner.form == "residual-norm"
        shape = (c.levels, c.heads, c.head_dim)
        self.norm_weight = nn.Parameter(torch.ones(shape)) if normed else None
        self.norm_bias = nn.Parameter(torch.zeros(shape)) if normed else None

    def forward(self, x: BTD, state: State | None = None) -> tuple[BTD, State | None]:
        c = self.config
        length = 0 if state is None else state.length
        held = self._start(x.shape[0], x.dtype, x.device) if state is None else state.tensors
        targets, gates = self.in_proj(x).split(c.splits, dim=-1)
        targets = targets.reshape(*x.shape[:2], c.levels, c.heads, c.head_dim)
        gates = torch.sigmoid(at_least_float32(gates))
        gates = gates.reshape(*x.shape[:2], c.levels, c.heads)
        u = at_least_float32(x).reshape(*x.shape[:2], c.heads, c.head_dim)
        kept: dict[str, Tensor] = {}
        with full_precision(x):
            for level, chunk in enumerate(c.chunks):
                norm = None
                if self.norm_weight is not None and self.norm_bias is not None:
                    norm = self.norm_weight[level].to(u.dtype), self.norm_bias[level].to(u.dtype)
                own = range(level * DEPTH, (level + 1) * DEPTH)
                u, weights, pending = slow_memory(
                    u,
                    targets[:, :, level],
                    gates[:, :, level] * (c.rate / chunk),
                    c.inner,
                    norm,
                    [held[f"weights{i}"] for i in own],
                    [held[f"pending{i}"] for i in own],
                    chunk,
                    length % chunk,
                )
                for i, weight, step in zip(own, weights, pending, strict=True):
                    kept |= {f"weights{i}": weight, f"pending{i}": step}
        y = u.flatten(2).to(x.dtype)
        return y, None if state is None else State(length + x.shape[1], kept)

    def _start(
        self, batch: int, dtype: torch.dtype, device: torch.device | str
    ) -> dict[str, Tensor]:
        tensors = {}
        for i, initial in enumerate(self.initial):
            weight = initial.to(device, state_dtype(dtype)).expand(batch, *initial.shape)
            tensors[f"weights{i}"] = weight
            tensors[f"pending{i}"] = torch.zeros_like(weight)
        return tensors

    def init_state(
        self, batch: int, context: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> State:
        tensors = self._start(batch, dtype, device)
        # Each sequence gets room of its own.
        return State(0, {name: t.contiguous() for name, t in tensors.items()})


def configure(site: Site, genes: Mapping[str, Gene]) -> ContinuumConfig:
    name = "continuum-memory"
    heads = head_count(name, site.width, whole(genes, "heads"), site.width)
    chunk, ratio = whole(genes, "chunk"), whole(genes, "ratio")
    head_dim = site.width // heads
    hidden = inner_width(f"{name} (heads of {head_dim})", head_dim, number(genes, "expand"))
    return ContinuumConfig(
        width=site.width,
        heads=heads,
        hidden=hidden,
        inner=Inner(
            form=cast(Form, choice(genes, "form")),
            activation=cast(Activation, choice(genes, "inner_activation")),
            bias=False,
            scale=1 / head_dim,
        ),
        chunks=tuple(chunk * ratio**level for level in range(whole(genes, "levels"))),
        rate=number(genes, "rate"),
    )


CONTINUUM = Primitive(
    name="continuum-memory",
    kind="mixer",
    summary="a chain of MLPs, each learned at test time at a pace of its own (HOPE)",
    source="Nested Learning (arXiv 2512.24695)",
    liv=Liv("targets and learning rates", "semi-separable", "none", "none", "grouped"),
    axes=(
        Axis("levels", 3, "MLPs in the chain, the fastest first", low=1.0, high=6.0, search=(2, 3)),
        Axis(
            "chunk",
            8,
            "tokens between two updates of the fastest level",
            low=1.0,
            high=1024.0,
            search=(4, 8, 16),
        ),
        Axis(
            "ratio",
            4,
            "a level's tokens between two updates over those of the level before",
            low=1.0,
            high=64.0,
            search=(2, 4),
        ),
        Axis("heads", 1, "independent blocks of every MLP", low=1.0, search=(1, 4)),
        Axis(
            "expand",
            4.0,
            "hidden channels of an MLP over its width",
            low=0.25,
            high=8.0,
            search=(1.0, 4.0),
        ),
        Axis(
            "form",
            "residual-norm",
            "a level: residual-norm, x + LN(MLP(x)); residual, x + MLP(x); plain, MLP(x)",
            options=("residual-norm", "residual", "plain"),
        ),
        Axis("inner_activation", "silu", "inside the MLPs", options=("gelu", "silu")),
        Axis(
            "rate",
            2.0,
            "inner learning rate of a chunk whose gates are open, shared by its tokens",
            low=0.0,
            high=10.0,
        ),
    ),
    configure=configure,
    points=(
        Point(
            "hope-cms",
            {"levels": 3, "form": "residual-norm"},
            "HOPE's continuum memory (Nested Learning, arXiv 2512.24695)",
            "the continuum memory alone, with an inner loss chosen here; the paper fixes none",
            view=View(
                "W_l = W_l - sum of eta_t grad mean (MLP_l(u_t) - v_t)^2, once in C_l tokens",
                "an MLP per level, what is recent in fast ones, what lasts in slow ones",
                "by learning other values for like inputs, each level at its own pace",
                "mean (MLP_l(u) - v_l)^2, one step of gradient descent per chunk of C_l tokens",
            ),
        ),
    ),
)
