"""The mLSTM layer: a matrix state with an exponential input gate, a normaliser and an output gate.

As in xLSTM 7B (arXiv 2503.13427, section 3); the cell is xLSTM's (arXiv 2405.04517, section 2.3).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...kernels.letters import BTD
from ...kernels.mlstm import mlstm
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
from ..recurrent_parts import (
    GATES,
    ReadOutNorm,
    ShortConv,
    at_least_float32,
    full_precision,
    head_count,
    inner_width,
    read_out_norm_params,
    short_conv_params,
    taps_axis,
)

HEAD_TARGET = 64
NORM_EPS = 1e-6


@dataclass(frozen=True)
class MlstmConfig:
    """Final numbers of one layer; `cap` is 0 where the gates are not capped."""

    width: int
    heads: int
    key_dim: int
    value_dim: int
    conv: int
    cap: float
    gate: str
    norm: str

    @property
    def inner(self) -> int:
        """F, the values of all heads."""
        return self.heads * self.value_dim

    @property
    def mixed(self) -> int:
        """Channels of q, k and v together: what the convolution acts on."""
        return self.inner + 2 * self.heads * self.key_dim

    @property
    def splits(self) -> list[int]:
        """Widths of (q, k, v) and output gate in the input projection."""
        return [self.mixed, self.inner if self.gate != "none" else 0]

    def cost(self, context: int, dtype: torch.dtype) -> Cost:
        products = self.width * (sum(self.splits) + self.inner + 2 * self.heads)
        matrix = self.heads * self.key_dim * (self.value_dim + 1)
        params = (
            products
            + 2 * self.heads
            + short_conv_params(self.mixed, self.conv, bias=True)
            + read_out_norm_params(self.norm, self.heads, self.value_dim)
        )
        # The state is written once and read once per token.
        flops = 2 * (products + self.mixed * self.conv + 2 * matrix)
        tail = self.mixed * max(self.conv - 1, 0) * dtype.itemsize
        state = tail + (matrix + self.heads) * state_dtype(dtype).itemsize
        return Cost(params, params, float(flops), state)

    def build(self) -> Mlstm:
        return Mlstm(self)


class Mlstm(Operator):
    """See the module. `in_proj` makes q, k, v and the output gate, `gates` the input and forget
    gates, which start near shut and open (arXiv 2503.13427)."""

    def __init__(self, config: MlstmConfig) -> None:
        super().__init__()
        c = self.config = config
        self.in_proj = nn.Linear(c.width, sum(c.splits), bias=False)
        self.gates = nn.Linear(c.width, 2 * c.heads)
        with torch.no_grad():
            self.gates.weight.mul_(0.1)
            self.gates.bias.copy_(
                torch.cat((torch.full((c.heads,), -1.0), torch.linspace(3.0, 6.0, c.heads)))
            )
        self.conv = ShortConv(c.mixed, c.conv, True, "silu") if c.conv else None
        self.norm = ReadOutNorm(c.norm, c.gate, c.heads, c.value_dim, 1, NORM_EPS)
        self.out_proj = nn.Linear(c.inner, c.width, bias=False)

    def forward(self, x: BTD, state: State | None = None) -> tuple[BTD, State | None]:
        c = self.config
        tensors: dict[str, Tensor] = {} if state is None else state.tensors
        kept: dict[str, Tensor] = {}
        mixed, z = self.in_proj(x).split(c.splits, dim=-1)
        if self.conv is not None:
            mixed, kept["conv"] = self.conv(mixed, tensors.get("conv"))
        keys = c.heads * c.key_dim
        q, k, v = mixed.split([keys, keys, c.inner], dim=-1)
        q, k, v = (t.unflatten(-1, (c.heads, -1)) for t in (q, k, v))
        gates = at_least_float32(self.gates(x))
        if c.cap:
            gates = c.cap * torch.tanh(gates / c.cap)
        input_gate, forget = gates.chunk(2, dim=-1)
        held = None if state is None else (tensors["matrix"], tensors["m"])
        with full_precision(x):
            o, (kept["matrix"], kept["m"]) = mlstm(
                q, k, v, input_gate, nn.functional.logsigmoid(forget), held
            )
        y = self.out_proj(self.norm(o, z if c.gate != "none" else None).to(x.dtype))
        if state is None:
            return y, None
        return y, State(state.length + x.shape[1], kept)

    def init_state(
        self, batch: int, context: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> State:
        c = self.config
        wide = state_dtype(dtype)
        shape = (batch, c.heads, c.key_dim, c.value_dim + 1)
        tensors = {
            "matrix": torch.zeros(shape, dtype=wide, device=device),
            "m": torch.zeros(batch, c.heads, dtype=wide, device=device),
        }
        if c.conv:
            tensors["conv"] = torch.zeros(batch, c.mixed, c.conv - 1, dtype=dtype, device=device)
        return State(0, tensors)


def configure(site: Site, genes: Mapping[str, Gene]) -> MlstmConfig:
    name = "matrix-lstm"
    inner = inner_width(name, site.width, number(genes, "expand"))
    heads = head_count(name, inner, whole(genes, "heads"), HEAD_TARGET)
    keys = round(site.width * number(genes, "key_expand") / heads)
    return MlstmConfig(
        width=site.width,
        heads=heads,
        key_dim=max(1, keys),
        value_dim=inner // heads,
        conv=whole(genes, "conv"),
        cap=number(genes, "cap"),
        gate=choice(genes, "gate"),
        norm=choice(genes, "norm"),
    )


MLSTM = Primitive(
    name="matrix-lstm",
    kind="mixer",
    summary="matrix state with exponential input gate and normaliser (mLSTM)",
    source="xLSTM (arXiv 2405.04517), xLSTM 7B (arXiv 2503.13427)",
    liv=Liv("qkv, two gates and output gate", "semi-separable", "none", "none", "grouped"),
    axes=(
        Axis(
            "heads",
            0,
            "heads; 0 takes heads of 64 value channels, or four where the width has no room",
            low=0.0,
            search=(0, 2, 4),
            grows="heads",
        ),
        Axis(
            "expand",
            1.0,
            "width of all values over the model's width",
            low=0.25,
            high=8.0,
            search=(1.0, 2.0),
        ),
        Axis(
            "key_expand",
            0.5,
            "width of all keys over the model's width",
            low=0.0625,
            high=4.0,
            search=(0.5, 1.0),
        ),
        taps_axis(0),
        Axis(
            "cap",
            15.0,
            "the gates x become cap tanh(x / cap); 0 leaves them",
            low=0.0,
            high=80.0,
            search=(15.0,),
        ),
        Axis(
            "gate",
            "sigmoid",
            "of the normalised read-out, computed from the input",
            options=GATES,
            search=("none", "sigmoid"),
        ),
        Axis(
            "norm",
            "groupnorm-scale",
            "of the read-out, per head, before the gate; groupnorm-scale has no shift",
            options=("none", "rmsnorm", "groupnorm", "groupnorm-scale"),
            search=("rmsnorm", "groupnorm-scale"),
        ),
    ),
    configure=configure,
    points=(
        Point(
            "mlstm",
            {
                "expand": 1.0,
                "key_expand": 0.5,
                "conv": 0,
                "cap": 15.0,
                "gate": "sigmoid",
                "norm": "groupnorm-scale",
            },
            "mLSTM of xLSTM 7B (arXiv 2503.13427)",
            "the published model has eight heads",
            view=View(
                "C = f C + i k v^T, n = f n + i k; y = C^T q / max(|n^T q|, 1), i = exp(x W)",
                "values under their keys, each as strong as its exponential gate, and their sum",
                "exponentially, at a rate per head that the token chooses, or under a large gate",
                "-i <C^T k, v> + (1-f) |C|^2 / 2: gradient descent with weight decay",
            ),
        ),
    ),
)
