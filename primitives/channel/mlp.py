"""The channel mixer: an MLP per token, gated or plain.

Plain: W_out act(W_in x). Gated (Shazeer, arXiv 2002.05202): W_out (act(W_gate x) * W_up x).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.letters import BTD
from ..base import Axis, Cost, Gene, Liv, Operator, Point, Primitive, Site, State
from ..genes import choice, flag, number
from ..sphere import Scale

ACTIVATIONS = ("relu", "relu2", "gelu", "gelu-tanh", "silu")


def activate(kind: str, x: Tensor) -> Tensor:
    """relu, relu2 (its square, arXiv 2109.08668), gelu (exact, 1606.08415), gelu-tanh (the same
    paper's approximation by tanh, which GPT-2 and Gemma take) or silu, elementwise."""
    if kind == "relu":
        return F.relu(x)
    if kind == "relu2":
        return F.relu(x).square()
    if kind == "gelu":
        return F.gelu(x)
    if kind == "gelu-tanh":
        return F.gelu(x, approximate="tanh")
    if kind == "silu":
        return F.silu(x)
    raise ValueError(f"activation is one of {', '.join(ACTIVATIONS)}, not {kind}")


def inner_width(width: int, expansion: float) -> int:
    """F: the width times the expansion, rounded to the nearest multiple of 8, at least 8."""
    return max(8, 8 * math.floor(width * expansion / 8 + 0.5))


@dataclass(frozen=True)
class MlpConfig:
    """Final numbers of an MLP."""

    width: int
    inner: int
    activation: str
    gated: bool
    bias: bool
    normalised: bool = False
    """The hidden channels have nGPT's learned scalings (arXiv 2410.01131)."""

    @property
    def entry(self) -> int:
        """The outputs of the first product: gate and up, or up alone."""
        return 2 * self.inner if self.gated else self.inner

    def cost(self, context: int, dtype: torch.dtype) -> Cost:
        products = self.width * (self.entry + self.inner)
        params = products + (self.entry + self.width if self.bias else 0)
        params += self.entry if self.normalised else 0
        return Cost(params, params, 2.0 * products)

    def build(self) -> Mlp:
        return Mlp(self)


class Mlp(Operator):
    """An MLP over the width of every token by itself; it carries no state."""

    def __init__(self, config: MlpConfig) -> None:
        super().__init__()
        self.config = config
        # One product for gate and up (in this order).
        self.entry = nn.Linear(config.width, config.entry, bias=config.bias)
        self.exit = nn.Linear(config.inner, config.width, bias=config.bias)
        # nGPT's s_v and s_u; its factor sqrt(D) for the gate is in the input (residual=ngpt).
        self.scale = Scale(config.entry, 1.0, 1.0) if config.normalised else None

    def forward(
        self, x: BTD, state: State | None = None, added: Tensor | None = None
    ) -> tuple[BTD, State | None]:
        """`added` (B, T, entry) is what an adapter adds to the first product."""
        hidden = self.entry(x) if added is None else self.entry(x) + added
        if self.scale is not None:
            hidden = hidden * self.scale().to(hidden.dtype)
        if self.config.gated:
            gate, up = hidden.chunk(2, dim=-1)
            hidden = activate(self.config.activation, gate) * up
        else:
            hidden = activate(self.config.activation, hidden)
        return self.exit(hidden), passed(state, x)

    def init_state(
        self, batch: int, context: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> State:
        return State()


def passed(state: State | None, x: Tensor) -> State | None:
    """The state of an operator that carries nothing, after the tokens of x (B, T, D)."""
    return None if state is None else State(state.length + x.shape[1])


def configure(site: Site, genes: Mapping[str, Gene]) -> MlpConfig:
    return MlpConfig(
        width=site.width,
        inner=inner_width(site.width, number(genes, "expansion")),
        activation=choice(genes, "activation"),
        gated=flag(genes, "gated"),
        bias=flag(genes, "bias"),
        normalised=site.normalised,
    )


EXPANSION = Axis(
    "expansion",
    8 / 3,
    "inner width as a multiple of the width, rounded to a multiple of 8",
    low=0.0625,
    high=64.0,
    search=(1.5, 2.0, 8 / 3, 4.0),
)
ACTIVATION = Axis(
    "activation",
    "silu",
    "the nonlinearity (of the gate, where there is one)",
    options=ACTIVATIONS,
    search=("relu", "relu2", "gelu", "silu"),
)
GATED = Axis(
    "gated",
    True,
    "multiply the activated half by a linear half (a gated linear unit)",
    options=(False, True),
    search=(False, True),
)
BIAS = Axis("bias", False, "biases on the projections", options=(False, True))

MLP = Primitive(
    name="mlp",
    kind="channel",
    summary="an MLP on every token, gated or plain",
    source="Shazeer, GLU Variants Improve Transformer, arXiv 2002.05202",
    liv=Liv("dense", "diagonal", "none", "swish", "dense"),
    axes=(EXPANSION, ACTIVATION, GATED, BIAS),
    configure=configure,
    points=(
        Point(
            "swiglu", {"activation": "silu", "gated": True}, "arXiv 2002.05202; Llama 2302.13971"
        ),
        Point("geglu", {"activation": "gelu", "gated": True}, "arXiv 2002.05202"),
        Point(
            "gelu-mlp",
            {"activation": "gelu", "gated": False, "expansion": 4.0, "bias": True},
            "Vaswani et al., arXiv 1706.03762 with the GELU of 1606.08415, as in GPT-2",
        ),
        Point(
            "relu2",
            {"activation": "relu2", "gated": False, "expansion": 4.0},
            "So et al., Primer, arXiv 2109.08668",
        ),
    ),
)
