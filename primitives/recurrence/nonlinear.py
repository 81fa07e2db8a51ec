"""Recurrent networks whose gates see their last output: LSTM, GRU, sLSTM."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn

from ...kernels.letters import BTD
from ...kernels.nonlinear import GATES, PARTS, Cell, nonlinear
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
    ReadOutNorm,
    at_least_float32,
    full_precision,
    head_count,
    inner_width,
    read_out_norm_params,
)

CELLS = ("lstm", "gru", "slstm")


@dataclass(frozen=True)
class NonlinearConfig:
    """Final numbers of one layer; `cell` is one of `CELLS`."""

    width: int
    cell: str
    heads: int
    head_dim: int
    norm: str
    causal: bool
    """False: two layers of this kind, one of which reads backward."""

    @property
    def inner(self) -> int:
        """F, the outputs of all heads."""
        return self.heads * self.head_dim

    @property
    def gates(self) -> int:
        return GATES[cast(Cell, self.cell)]

    def cost(self, context: int, dtype: torch.dtype) -> Cost:
        products = self.width * self.inner * (self.gates + 1)
        products += self.gates * self.inner * self.head_dim
        params = (
            products
            + self.gates * self.inner
            + (self.inner if self.cell == "gru" else 0)
            + read_out_norm_params(self.norm, self.heads, self.head_dim)
        )
        parts = len(PARTS[cast(Cell, self.cell)])
        state = parts * self.inner * state_dtype(dtype).itemsize
        one = Cost(params, params, float(2 * products), state)
        return one if self.causal else two_directions(one)

    def build(self) -> Nonlinear | Bidirectional:
        return Nonlinear(self) if self.causal else Bidirectional(Nonlinear(self), Nonlinear(self))


class Nonlinear(Operator):
    """`in_proj` adds to the gates what the token says, `mix` what each head last put out.

    The forget gates start open (bias 1; for the sLSTM spread over 3..6, as published).
    """

    def __init__(self, config: NonlinearConfig) -> None:
        super().__init__()
        c = self.config = config
        self.in_proj = nn.Linear(c.width, c.gates * c.inner)
        with torch.no_grad():
            self.in_proj.bias.zero_()
            forget = self.in_proj.bias[c.inner : 2 * c.inner]
            if c.cell == "lstm":
                forget.fill_(1.0)
            elif c.cell == "slstm":
                forget.copy_(torch.linspace(3.0, 6.0, c.inner))
        bound = c.head_dim**-0.5
        mix = torch.empty(c.heads, c.head_dim, c.gates * c.head_dim).uniform_(-bound, bound)
        self.mix = nn.Parameter(mix)
        self.inner_bias = (
            nn.Parameter(torch.zeros(c.heads, c.head_dim)) if c.cell == "gru" else None
        )
        self.norm = ReadOutNorm(c.norm, "none", c.heads, c.head_dim, 1)
        self.out_proj = nn.Linear(c.inner, c.width, bias=False)

    def forward(self, x: BTD, state: State | None = None) -> tuple[BTD, State | None]:
        c = self.config
        cell = cast(Cell, c.cell)
        inputs = at_least_float32(self.in_proj(x))
        inputs = inputs.reshape(*x.shape[:2], c.gates, c.heads, c.head_dim)
        held = None
        if state is not None and state.length:
            shape = (x.shape[0], c.heads, c.head_dim)
            held = [state.tensors[name].view(shape).transpose(0, 1) for name in PARTS[cell]]
        with full_precision(x):
            o, parts = nonlinear(cell, inputs, self.mix, self.inner_bias, held)
        y = self.out_proj(self.norm(o, None).to(x.dtype))
        if state is None:
            return y, None
        kept = {
            name: part.transpose(0, 1).flatten(1)
            for name, part in zip(PARTS[cell], parts, strict=True)
        }
        return y, State(state.length + x.shape[1], kept)

    def init_state(
        self, batch: int, context: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> State:
        c = self.config
        wide = state_dtype(dtype)
        return State(
            0,
            {
                name: torch.zeros(batch, c.inner, dtype=wide, device=device)
                for name in PARTS[cast(Cell, c.cell)]
            },
        )


def configure(site: Site, genes: Mapping[str, Gene]) -> NonlinearConfig:
    name = "nonlinear-rnn"
    inner = inner_width(name, site.width, number(genes, "expand"))
    heads = head_count(name, inner, whole(genes, "heads"), inner)
    return NonlinearConfig(
        width=site.width,
        cell=choice(genes, "cell"),
        heads=heads,
        head_dim=inner // heads,
        norm=choice(genes, "norm"),
        causal=flag(genes, "causal"),
    )


NONLINEAR = Primitive(
    name="nonlinear-rnn",
    kind="mixer",
    summary="recurrent network whose gates see its last output (LSTM, GRU, sLSTM)",
    source="LSTM (Neural Computation 9(8), 1997), GRU (arXiv 1406.1078), sLSTM (2405.04517)",
    liv=Liv("gates and candidate, from input and output", "diagonal", "none", "tanh", "grouped"),
    axes=(
        Axis(
            "cell",
            "lstm",
            "lstm; gru; slstm: an exponential input gate and a normaliser (xLSTM)",
            options=CELLS,
            search=CELLS,
        ),
        Axis(
            "heads",
            1,
            "heads; the gates of a head see the last outputs of that head only",
            low=1.0,
            search=(1, 4),
        ),
        Axis(
            "expand",
            1.0,
            "width of the outputs over the model's width",
            low=0.25,
            high=8.0,
            search=(1.0,),
        ),
        Axis(
            "norm",
            "none",
            "of the outputs, per head, before the projection back",
            options=("none", "rmsnorm", "groupnorm"),
            search=("none", "groupnorm"),
        ),
        causal_axis(),
    ),
    configure=configure,
    points=(
        Point(
            "lstm",
            {"cell": "lstm", "heads": 1, "expand": 1.0, "norm": "none"},
            "LSTM (Hochreiter and Schmidhuber 1997), with forget gates (Gers et al. 2000)",
            "with a projection back to the model's width",
            view=View(
                "c = f c + i tanh(g), h = o tanh(c); gates from x and the last h",
                "one number per channel, written and kept as token and output say",
                "exponentially, at a rate per channel that token and last output choose",
                "-i tanh(g) c + (1-f) c^2 / 2: gradient descent with weight decay",
            ),
        ),
        Point(
            "gru",
            {"cell": "gru", "heads": 1, "expand": 1.0, "norm": "none"},
            "GRU (arXiv 1406.1078)",
            "with the reset gate after the matrix product, and a projection back",
            view=View(
                "h = z h + (1-z) tanh(x_n + r (U h + b)); gates from x and the last h",
                "one weighted average per channel, its weights summing to one",
                "exponentially, at a rate per channel that token and last output choose",
                "(1-z) (h - n)^2 / 2 for the candidate n, one step of gradient descent",
            ),
        ),
        Point(
            "bilstm",
            {"cell": "lstm", "heads": 1, "expand": 1.0, "norm": "none", "causal": False},
            "bidirectional recurrent networks (Schuster and Paliwal 1997), of LSTMs",
            "with a projection of both directions back to the model's width",
            view=View(
                "c = f c + i tanh(g), h = o tanh(c), from the first token on and from the last",
                "one number per channel and direction, written as token and output say",
                "exponentially, at a rate per channel that token and last output choose",
                "-i tanh(g) c + (1-f) c^2 / 2 in each direction: descent with weight decay",
            ),
        ),
        Point(
            "bigru",
            {"cell": "gru", "heads": 1, "expand": 1.0, "norm": "none", "causal": False},
            "bidirectional recurrent networks (Schuster and Paliwal 1997), of GRUs (1409.0473)",
            "with a projection of both directions back to the model's width",
            view=View(
                "h = z h + (1-z) tanh(x_n + r (U h + b)), from the first token on and the last",
                "one weighted average per channel and direction",
                "exponentially, at a rate per channel that token and last output choose",
                "(1-z) (h - n)^2 / 2 in each direction, one step of gradient descent",
            ),
        ),
        Point(
            "slstm",
            {"cell": "slstm", "heads": 4, "expand": 1.0, "norm": "groupnorm"},
            "sLSTM (arXiv 2405.04517)",
            "the cell with its heads and norm; the paper's block puts a convolution before it and a"
            " gated MLP after it",
            view=View(
                "c = f c + i tanh(z), n = f n + i; h = o c / n, i = exp(.); gates see the last h",
                "a weighted average per channel, and the sum of its weights",
                "exponentially, or at once under a large input gate",
                "i/n (c/n - tanh(z))^2 / 2, one step of gradient descent on c/n",
            ),
        ),
    ),
)
