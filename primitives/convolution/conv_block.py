"""Blocks round a depthwise convolution over tokens: ConvMixer, ConvNeXt, Conformer.

y = scale * exit(middle(conv(entry(x))) [+ x]), where conv is depthwise and causal, or centred with
`causal=false`. The papers differ in what stands round it:

    Conformer (arXiv 2005.08100, figure 2)   W_2 act(norm(conv(GLU(W_1 x))))
    ConvNeXt  (arXiv 2201.03545, figure 4)   scale * W_2 act(W_1 norm(conv(x)))
    ConvMixer (arXiv 2201.09792, equation 2) norm(act(W (norm(act(conv(x))) + x)))

Where a paper has BatchNorm, whose statistics run over the tokens of a batch and so over later ones,
a norm of every token by itself stands here. ConvNeXt's and ConvMixer's convolutions run over the
plane of a picture, these over the line of tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.letters import BTD, BTF
from ..base import (
    Axis,
    BidirectionalError,
    Cost,
    Gene,
    GeneError,
    Liv,
    Operator,
    Point,
    Primitive,
    Site,
    State,
    View,
)
from ..channel.mlp import ACTIVATION, activate
from ..channel.mlp import inner_width as mlp_width
from ..genes import choice, flag, number, whole
from ..norm import make_norm, norm_params
from ..recurrent_parts import ShortConv, inner_width, short_conv_params

ENTRIES = ("none", "linear", "glu")
MIDDLES = ("none", "norm", "norm-act", "act-norm")
EXITS = ("linear", "mlp", "act-norm")
NORMS = ("none", "layernorm", "rmsnorm")


@dataclass(frozen=True)
class ConvBlockConfig:
    """Final numbers of one block."""

    width: int
    inner: int
    """Channels of the convolution."""
    hidden: int
    """Inner width of an exit that is an MLP, else 0."""
    taps: int
    causal: bool
    entry: str
    middle: str
    shortcut: bool
    exit: str
    norm: str
    activation: str
    bias: bool
    scale: float
    """The start of the learned scale of every output channel; 0 for none."""

    @property
    def entered(self) -> int:
        """The outputs of the product before the convolution; 0 where there is none."""
        return {"none": 0, "linear": self.inner, "glu": 2 * self.inner}[self.entry]

    @property
    def normed(self) -> int:
        """Channels of the norm after the convolution; 0 where there is none."""
        return self.inner if self.norm != "none" and "norm" in self.middle else 0

    @property
    def exit_normed(self) -> bool:
        return self.norm != "none" and self.exit == "act-norm"

    def cost(self, context: int, dtype: torch.dtype) -> Cost:
        products = self.width * self.entered
        biases = self.entered + self.width
        if self.exit == "mlp":
            products += self.hidden * (self.inner + self.width)
            biases += self.hidden
        else:
            products += self.inner * self.width
        params = products + short_conv_params(self.inner, self.taps, self.bias)
        if self.bias:
            params += biases
        if self.normed:
            params += norm_params(self.norm, self.normed)
        if self.exit_normed:
            params += norm_params(self.norm, self.width)
        if self.scale:
            params += self.width
        kept = self.inner * (self.taps - 1) * dtype.itemsize if self.causal else 0
        return Cost(params, params, float(2 * (products + self.inner * self.taps)), kept)

    def build(self) -> ConvBlock:
        return ConvBlock(self)


class ConvBlock(Operator):
    """See the module. A centred convolution of W taps sees (W-1)//2 tokens before and W//2 after.

    The state is the last W - 1 inputs of the convolution.
    """

    def __init__(self, config: ConvBlockConfig) -> None:
        super().__init__()
        c = self.config = config
        self.entry = nn.Linear(c.width, c.entered, bias=c.bias) if c.entered else None
        self.conv = ShortConv(c.inner, c.taps, c.bias, "none")
        self.norm = make_norm(c.norm, c.normed) if c.normed else None
        self.up = nn.Linear(c.inner, c.hidden, bias=c.bias) if c.exit == "mlp" else None
        self.exit = nn.Linear(c.hidden or c.inner, c.width, bias=c.bias)
        self.exit_norm = make_norm(c.norm, c.width) if c.exit_normed else None
        self.scale = nn.Parameter(torch.full((c.width,), c.scale)) if c.scale else None

    def forward(self, x: BTD, state: State | None = None) -> tuple[BTD, State | None]:
        c = self.config
        if state is not None and not c.causal:
            raise BidirectionalError
        u = x if self.entry is None else self.entry(x)
        if c.entry == "glu":
            u = F.glu(u, dim=-1)
        u, tail = self._convolve(u, state)
        u = self._middle(u)
        if c.shortcut:
            u = u + x
        if self.up is not None:
            u = activate(c.activation, self.up(u))
        y = self.exit(u)
        if c.exit == "act-norm":
            y = activate(c.activation, y)
            y = y if self.exit_norm is None else self.exit_norm(y)
        if self.scale is not None:
            y = y * self.scale
        if state is None:
            return y, None
        return y, State(state.length + x.shape[1], {"conv": tail})

    def _convolve(self, u: BTF, state: State | None) -> tuple[BTF, Tensor]:
        if self.config.causal:
            y, tail = self.conv(u, None if state is None else state.tensors["conv"])
            return y, tail
        before, after = (self.config.taps - 1) // 2, self.config.taps // 2
        # The causal form over the sequence that starts `after` tokens later.
        padded = F.pad(u, (0, 0, before, after))
        kept = before + after
        y, tail = self.conv(padded[:, kept:], padded[:, :kept].mT)
        return y, tail

    def _middle(self, u: BTF) -> BTF:
        c = self.config
        if c.middle == "act-norm":
            u = activate(c.activation, u)
        if self.norm is not None:
            u = self.norm(u)
        if c.middle == "norm-act":
            u = activate(c.activation, u)
        return u

    def init_state(
        self, batch: int, context: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> State:
        c = self.config
        if not c.causal:
            raise BidirectionalError
        shape = (batch, c.inner, c.taps - 1)
        return State(0, {"conv": torch.zeros(shape, dtype=dtype, device=device)})


def configure(site: Site, genes: Mapping[str, Gene]) -> ConvBlockConfig:
    entry, expand = choice(genes, "entry"), number(genes, "expand")
    inner = inner_width("conv-block", site.width, expand)
    if entry == "none" and inner != site.width:
        raise GeneError(f"conv-block: expand={expand:g} needs an entry that widens; entry is none")
    if flag(genes, "shortcut") and inner != site.width:
        raise GeneError(f"conv-block: shortcut adds {site.width} channels to {inner}")
    mlp = choice(genes, "exit") == "mlp"
    return ConvBlockConfig(
        width=site.width,
        inner=inner,
        hidden=mlp_width(site.width, number(genes, "expansion")) if mlp else 0,
        taps=whole(genes, "taps"),
        causal=flag(genes, "causal"),
        entry=entry,
        middle=choice(genes, "middle"),
        shortcut=flag(genes, "shortcut"),
        exit=choice(genes, "exit"),
        norm=choice(genes, "norm"),
        activation=choice(genes, "activation"),
        bias=flag(genes, "bias"),
        scale=number(genes, "scale"),
    )


CONV_BLOCK = Primitive(
    name="conv-block",
    kind="mixer",
    summary="block round a depthwise convolution (Conformer, ConvNeXt, ConvMixer)",
    source="Conformer (arXiv 2005.08100), ConvNeXt (2201.03545), ConvMixer (2201.09792)",
    liv=Liv("dense", "toeplitz", "banded", "swish", "dense"),
    axes=(
        Axis("taps", 31, "taps of the convolution", low=2.0, high=256.0, search=(4, 7, 31)),
        Axis(
            "causal",
            True,
            "see no later token; false centres the convolution on its token",
            options=(True, False),
        ),
        Axis(
            "entry",
            "glu",
            "product before the convolution: none, linear, or a gated linear unit",
            options=ENTRIES,
        ),
        Axis(
            "expand",
            1.0,
            "width of the convolution over the model's width; entry=none has 1 only",
            low=0.25,
            high=8.0,
        ),
        Axis(
            "middle",
            "norm-act",
            "what follows the convolution, in order",
            options=MIDDLES,
        ),
        Axis(
            "shortcut",
            False,
            "add the block's input before the exit",
            options=(False, True),
        ),
        Axis(
            "exit",
            "linear",
            "product at the end: linear; mlp, two with the activation between; act-norm, linear"
            " with activation and norm after it",
            options=EXITS,
        ),
        Axis("expansion", 4.0, "inner width of exit=mlp over the width", low=0.0625, high=64.0),
        Axis(
            "norm",
            "layernorm",
            "of every token by itself",
            options=NORMS,
            search=("layernorm", "rmsnorm"),
        ),
        ACTIVATION,
        Axis("bias", False, "biases on projections and convolution", options=(False, True)),
        Axis(
            "scale",
            0.0,
            "start of a learned scale of every output channel; 0 for no scale",
            low=0.0,
            high=100.0,
        ),
    ),
    configure=configure,
    points=(
        Point(
            "conformer-conv",
            {
                "taps": 31,
                "entry": "glu",
                "middle": "norm-act",
                "exit": "linear",
                "norm": "layernorm",
                "activation": "silu",
            },
            "Conformer (arXiv 2005.08100), causal as in wav2vec2-BERT",
            "LayerNorm in BatchNorm's place; the norm at the entry is the backbone's",
            view=View(
                "R = (x_t, R_1, ..., R_{k-2}); y_t = w_0 x_t + sum_i w_i R_i before the shift",
                "the last k - 1 inputs of every channel as they were",
                "all at once, after k tokens; nothing fades before",
                "none: inputs are put on record and not fitted",
            ),
        ),
        Point(
            "convnext",
            {
                "taps": 4,
                "entry": "none",
                "middle": "norm",
                "exit": "mlp",
                "expansion": 4.0,
                "norm": "layernorm",
                "activation": "gelu",
                "bias": True,
                "scale": 1e-6,
            },
            "ConvNeXt (arXiv 2201.03545)",
            "in one dimension; the causal half of the published 7 taps",
            view=View(
                "R = (x_t, R_1, ..., R_{k-2}); y_t = w_0 x_t + sum_i w_i R_i before the shift",
                "the last k - 1 inputs of every channel as they were",
                "all at once, after k tokens; nothing fades before",
                "none: inputs are put on record and not fitted",
            ),
        ),
        Point(
            "convmixer",
            {
                "taps": 9,
                "entry": "none",
                "middle": "act-norm",
                "shortcut": True,
                "exit": "act-norm",
                "norm": "layernorm",
                "activation": "gelu",
                "bias": True,
            },
            "ConvMixer (arXiv 2201.09792)",
            "in one dimension; LayerNorm in BatchNorm's place; the backbone adds a residual",
            view=View(
                "R = (x_t, R_1, ..., R_{k-2}); y_t = w_0 x_t + sum_i w_i R_i before the shift",
                "the last k - 1 inputs of every channel as they were",
                "all at once, after k tokens; nothing fades before",
                "none: inputs are put on record and not fitted",
            ),
        ),
    ),
)
