"""RWKV's channel mixer: a squared-ReLU MLP over a mix of the token and the one before it.

x_k, x_r = lerp(x_t, x_{t-1}); y = sigmoid(W_r x_r) * W_v relu(W_k x_k)^2 (RWKV-4, arXiv 2305.13048,
equations 16 to 18; RWKV-5 and 6, 2404.05892; RWKV-7, 2503.14456, has no receptance r).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from ...kernels.letters import BTD
from ..base import Axis, Cost, Gene, Liv, Operator, Point, Primitive, Site, State, View
from ..genes import flag, number
from ..token_shift import TokenShift, token_shift_params
from .mlp import EXPANSION, activate, inner_width

GATE = "sigmoid(W_r (x_t + m_r (R - x_t))) * "
"""The receptance, in a view."""


@dataclass(frozen=True)
class RwkvChannelConfig:
    """Final numbers of one channel mixer."""

    width: int
    inner: int
    receptance: bool

    @property
    def streams(self) -> int:
        """Mixes of two tokens: for the key, and for the receptance where there is one."""
        return 1 + self.receptance

    def cost(self, context: int, dtype: torch.dtype) -> Cost:
        products = self.width * (2 * self.inner + self.receptance * self.width)
        params = products + token_shift_params("static", self.width, self.streams)
        return Cost(params, params, 2.0 * products, self.width * dtype.itemsize)

    def build(self) -> RwkvChannel:
        return RwkvChannel(self)


class RwkvChannel(Operator):
    """See the module. The state is the last token."""

    def __init__(self, config: RwkvChannelConfig) -> None:
        super().__init__()
        c = self.config = config
        self.shift = TokenShift("static", c.width, c.streams)
        self.key = nn.Linear(c.width, c.inner, bias=False)
        self.value = nn.Linear(c.inner, c.width, bias=False)
        self.receptance = nn.Linear(c.width, c.width, bias=False) if c.receptance else None

    def forward(self, x: BTD, state: State | None = None) -> tuple[BTD, State | None]:
        streams, last = self.shift(x, None if state is None else state.tensors["shift"])
        y = self.value(activate("relu2", self.key(streams[0])))
        if self.receptance is not None:
            y = torch.sigmoid(self.receptance(streams[1])) * y
        if state is None:
            return y, None
        return y, State(state.length + x.shape[1], {"shift": last})

    def init_state(
        self, batch: int, context: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> State:
        return State(
            0, {"shift": torch.zeros(batch, self.config.width, dtype=dtype, device=device)}
        )


def configure(site: Site, genes: Mapping[str, Gene]) -> RwkvChannelConfig:
    return RwkvChannelConfig(
        width=site.width,
        inner=inner_width(site.width, number(genes, "expansion")),
        receptance=flag(genes, "receptance"),
    )


def view(gate: str) -> View:
    """Of a channel mixer whose output has `gate` before it."""
    return View(
        f"R = x_t; y_t = {gate}W_v relu(W_k (x_t + m_k (R - x_t)))^2 with R before it",
        "the last token as it was",
        "all at once, at the next token",
        "none: inputs are put on record and not fitted",
    )


RWKV_CHANNEL = Primitive(
    name="token-shift-mlp",
    kind="channel",
    summary="a squared-ReLU MLP that also sees the token before (RWKV's channel mix)",
    source="RWKV-4 (arXiv 2305.13048)",
    liv=Liv("dense", "toeplitz", "banded", "relu", "dense"),
    axes=(
        Axis(
            "expansion",
            4.0,
            "inner width as a multiple of the width, rounded to a multiple of 8",
            low=EXPANSION.low,
            high=EXPANSION.high,
            search=(2.0, 3.5, 4.0),
        ),
        Axis(
            "receptance",
            True,
            "multiply the output by a sigmoid gate with a mix of its own",
            options=(False, True),
            search=(False, True),
        ),
    ),
    configure=configure,
    points=(
        Point(
            "rwkv4-channel",
            {"expansion": 4.0, "receptance": True},
            "RWKV-4 (arXiv 2305.13048)",
            view=view(GATE),
        ),
        Point(
            "rwkv6-channel",
            {"expansion": 3.5, "receptance": True},
            "RWKV-5 and RWKV-6 (arXiv 2404.05892)",
            view=view(GATE),
        ),
        Point(
            "rwkv7-channel",
            {"expansion": 4.0, "receptance": False},
            "RWKV-7 (arXiv 2503.14456)",
            view=view(""),
        ),
    ),
)
