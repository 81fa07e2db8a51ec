"""The linear recurrence with a matrix state and an additive update.

Linear attention, RetNet, Mamba-2 and what stands between them.

Per head, S_t = a_t S_{t-1} + k_t v_t^T and o_t = S_t^T q_t, with S of shape (K, V); what the layers
of the literature add before and after it are the axes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels.letters import BTD, BTGK
from ..kernels.matrix_state import matrix_state
from .base import (
    Axis,
    Cost,
    Gene,
    GeneError,
    Liv,
    Operator,
    Point,
    Primitive,
    Site,
    State,
    state_dtype,
)
from .genes import choice, flag, number, whole
from .recurrent_parts import (
    GATES,
    NORMS,
    Dt,
    ReadOutNorm,
    ShortConv,
    at_least_float32,
    full_precision,
    group_count,
    head_count,
    inner_width,
    read_out_norm_params,
    repeat_groups,
    short_conv_params,
    taps_axis,
)

HEAD_TARGET = 64
ROTARY_BASE = 10000.0
SIGMOID_TEMPERATURE = 16.0
"""The decay of the `sigmoid` form is sigmoid(x)^(1/16), as in GLA (arXiv 2312.06635)."""

LEAST_SUM = 1e-6
"""The normaliser divides by this at least: features far below zero underflow."""


@dataclass(frozen=True)
class RecurrenceConfig:
    """Final numbers of one layer. `decay_form` is empty where no decay is computed from the input;
    `gate` and `norm` are names of `GATES` and `NORMS`."""

    width: int
    heads: int
    groups: int
    key_dim: int
    value_dim: int
    decay: str
    decay_form: str
    rotary: bool
    conv: int
    activation: str
    feature: str
    normaliser: bool
    skip: bool
    gate: str
    norm: str

    @property
    def inner(self) -> int:
        """F, the values of all heads."""
        return self.heads * self.value_dim

    @property
    def mixed(self) -> int:
        """Channels of v, k and q together: what the convolution and the activation act on."""
        return self.inner + 2 * self.groups * self.key_dim

    @property
    def columns(self) -> int:
        """Columns of the state: the values and, for the normaliser, the sum of the keys."""
        return self.value_dim + self.normaliser

    @property
    def splits(self) -> list[int]:
        """Widths of gate, (v, k, q) and decay in the input projection."""
        gate = self.inner if self.gate != "none" else 0
        return [gate, self.mixed, self.heads if self.decay == "scalar" else 0]

    def cost(self, context: int, dtype: torch.dtype) -> Cost:
        projections = self.width * (sum(self.splits) + self.inner)
        matrix = self.heads * self.key_dim * self.columns
        params = (
            projections
            + short_conv_params(self.mixed, self.conv, bias=True)
            + {"dt": 2, "sigmoid": 1, "": 0}[self.decay_form] * self.heads
            + self.skip * self.heads
            + read_out_norm_params(self.norm, self.heads, self.value_dim)
        )
        # The state is written once and read once per token.
        flops = 2 * (projections + self.mixed * self.conv + 2 * matrix)
        tail = self.mixed * max(self.conv - 1, 0) * dtype.itemsize
        return Cost(params, params, float(flops), tail + matrix * state_dtype(dtype).itemsize)

    def build(self) -> Recurrence:
        return Recurrence(self)


class Recurrence(Operator):
    """See the module. `in_proj` makes gate, values, keys, queries and decays, in this order."""

    def __init__(self, config: RecurrenceConfig) -> None:
        super().__init__()
        c = self.config = config
        self.in_proj = nn.Linear(c.width, sum(c.splits), bias=False)
        self.conv = ShortConv(c.mixed, c.conv, True, c.activation) if c.conv else None
        self.dt = Dt(c.heads) if c.decay_form == "dt" else None
        if c.decay_form == "sigmoid":
            self.decay_bias = nn.Parameter(torch.zeros(c.heads))
        self.skip = nn.Parameter(torch.ones(c.heads)) if c.skip else None
        self.norm = ReadOutNorm(c.norm, c.gate, c.heads, c.value_dim, c.groups)
        self.out_proj = nn.Linear(c.inner, c.width, bias=False)

    def forward(self, x: BTD, state: State | None = None) -> tuple[BTD, State | None]:
        c = self.config
        tensors: dict[str, Tensor] = {} if state is None else state.tensors
        start = 0 if state is None else state.length
        z, mixed, decay = self.in_proj(x).split(c.splits, dim=-1)

        tail = None
        if self.conv is not None:
            mixed, tail = self.conv(mixed, tensors.get("conv"))
        elif c.activation == "silu":
            mixed = F.silu(mixed)
        keys = c.groups * c.key_dim
        v, k, q = mixed.split([c.inner, keys, keys], dim=-1)
        v = v.unflatten(-1, (c.heads, c.value_dim))
        k, q = (t.unflatten(-1, (c.groups, c.key_dim)) for t in (k, q))
        if c.feature == "elu+1":
            # In bf16 the addition would cut every feature to multiples of 1/256.
            q, k = ((F.elu(at_least_float32(t)) + 1).to(t.dtype) for t in (q, k))
        if c.rotary:
            q, k = rotate(q, k, start)

        written, log_decay, scale = v, None, None
        if c.normaliser:
            written = F.pad(v, (0, 1), value=1.0)
        if c.decay == "fixed":
            log_decay = fixed_log_decay(c.heads, x)
        elif self.dt is not None:
            # dt scales the keys; on the narrower values it gives the same product.
            dt, log_decay = self.dt(decay)
            written, scale = (written * dt[..., None]).to(v.dtype), 1.0
        elif c.decay_form == "sigmoid":
            decay = at_least_float32(decay) + self.decay_bias
            log_decay = F.logsigmoid(decay) / SIGMOID_TEMPERATURE

        with full_precision(x):
            o, matrix = matrix_state(
                repeat_groups(q, c.heads),
                repeat_groups(k, c.heads),
                written,
                log_decay,
                tensors.get("matrix"),
                scale=scale,
            )
        if c.normaliser:
            o = o[..., :-1] / o[..., -1:].clamp_min(LEAST_SUM)
        if self.skip is not None:
            o = o + self.skip[:, None] * v
        y = self.out_proj(self.norm(o, z if c.gate != "none" else None).to(x.dtype))
        if state is None:
            return y, None
        kept = {"matrix": matrix}
        if tail is not None:
            kept["conv"] = tail
        return y, State(start + x.shape[1], kept)

    def init_state(
        self, batch: int, context: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> State:
        c = self.config
        shape = (batch, c.heads, c.key_dim, c.columns)
        tensors = {"matrix": torch.zeros(shape, dtype=state_dtype(dtype), device=device)}
        if c.conv:
            tensors["conv"] = torch.zeros(batch, c.mixed, c.conv - 1, dtype=dtype, device=device)
        return State(0, tensors)


def fixed_log_decay(heads: int, like: Tensor) -> Tensor:
    """RetNet's decays as logarithms, (H,): log(1 - 2^(-5-h))."""
    h = torch.arange(heads, device=like.device, dtype=state_dtype(like.dtype))
    return torch.log1p(-torch.exp2(-5 - h))


def rotate(q: BTGK, k: BTGK, start: int) -> tuple[BTGK, BTGK]:
    """q_n e^{i n theta} and k_m e^{i m theta}, channels 2j and 2j+1 being one complex number.

    RetNet's rotation is xPos without its growth factors, which the decay replaces. The paper names
    no theta; this is xPos', 10000^(-2j/K) (its released code spaces the exponents to end at -1).
    """
    tokens, width = q.shape[1], q.shape[-1]
    # Angles in float64: in float32 they lose half their digits at position 10^4.
    j = torch.arange(0, width, 2, device=q.device, dtype=torch.float64)
    n = torch.arange(start, start + tokens, device=q.device, dtype=torch.float64)
    angle = n[:, None] * ROTARY_BASE ** (-j / width)
    dtype = state_dtype(q.dtype)
    cos, sin = (f(angle).to(dtype)[None, :, None] for f in (torch.cos, torch.sin))

    def turn(t: Tensor) -> Tensor:
        a, b = t[..., 0::2], t[..., 1::2]
        return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2).to(t.dtype)

    return turn(q), turn(k)


def configure(site: Site, genes: Mapping[str, Gene]) -> RecurrenceConfig:
    name = "recurrence"
    inner = inner_width(name, site.width, number(genes, "expand"))
    heads = head_count(name, inner, whole(genes, "heads"), HEAD_TARGET)
    # Without a gene the queries of all heads are as wide as the model together.
    key_dim = whole(genes, "key_dim") or 2 * max(1, round(site.width / heads / 2))
    rotary, decay = flag(genes, "rotary"), choice(genes, "decay")
    if rotary and key_dim % 2:
        raise GeneError(f"{name}: rotary turns pairs of channels; key_dim={key_dim} is odd")
    feature, normaliser = choice(genes, "feature"), flag(genes, "normaliser")
    if normaliser and (feature != "elu+1" or rotary):
        raise GeneError(
            f"{name}: the normaliser divides by a sum of products of queries and keys, which must "
            "be positive: it needs feature=elu+1 and rotary=false"
        )
    return RecurrenceConfig(
        width=site.width,
        heads=heads,
        groups=group_count(name, heads, whole(genes, "groups")),
        key_dim=key_dim,
        value_dim=inner // heads,
        decay=decay,
        decay_form=choice(genes, "decay_form") if decay == "scalar" else "",
        rotary=rotary,
        conv=whole(genes, "conv"),
        activation=choice(genes, "activation"),
        feature=feature,
        normaliser=normaliser,
        skip=flag(genes, "skip"),
        gate=choice(genes, "gate"),
        norm=choice(genes, "norm"),
    )


RECURRENCE = Primitive(
    name="recurrence",
    kind="mixer",
    summary="linear recurrence with a matrix state (linear attention, RetNet, Mamba-2)",
    source="arXiv 2006.16236 (linear attention), 2307.08621 (RetNet), 2405.21060 (Mamba-2)",
    liv=Liv("qkv with gate", "semi-separable", "none", "none", "grouped"),
    axes=(
        Axis(
            "heads",
            0,
            "heads; 0 takes heads of 64 value channels, or four where the width has no room",
            low=0.0,
            search=(0, 2, 4, 8),
        ),
        Axis(
            "key_dim",
            0,
            "key width of a head, the state's first axis; 0 is the model's width over the heads",
            low=0.0,
            high=256.0,
            search=(0, 16, 32, 64),
        ),
        Axis(
            "groups",
            0,
            "different queries and keys, each shared by heads/groups heads; 0 is one per head",
            low=0.0,
            search=(0, 1),
        ),
        Axis(
            "expand",
            2.0,
            "width of all values over the model's width",
            low=0.25,
            high=8.0,
            search=(1.0, 2.0),
        ),
        Axis(
            "decay",
            "scalar",
            "none; fixed per head (RetNet); scalar: one per head and token, from the input",
            options=("none", "fixed", "scalar"),
            search=("none", "fixed", "scalar"),
        ),
        Axis(
            "decay_form",
            "dt",
            "how a scalar decay comes from the input: dt, exp(-softplus(x + b) exp(A_log)) with the"
            " keys scaled by the softplus (Mamba-2); sigmoid, sigmoid(x + b)^(1/16) (GLA)",
            options=("dt", "sigmoid"),
            search=("dt", "sigmoid"),
        ),
        Axis(
            "rotary",
            False,
            "rotate queries and keys by their position, as RetNet does",
            options=(False, True),
            search=(False, True),
        ),
        taps_axis(0),
        Axis(
            "activation",
            "none",
            "of queries, keys and values, after the convolution",
            options=("none", "silu"),
            search=("none", "silu"),
        ),
        Axis(
            "feature",
            "none",
            "feature map of queries and keys; elu+1 is positive (linear attention)",
            options=("none", "elu+1"),
            search=("none", "elu+1"),
        ),
        Axis(
            "normaliser",
            False,
            "divide the read-out by the sum of its weights, which costs a column of the state",
            options=(False, True),
            search=(False,),
        ),
        Axis(
            "skip",
            False,
            "add the values, scaled per head, to the read-out (Mamba-2's D)",
            options=(False, True),
            search=(False, True),
        ),
        Axis(
            "gate",
            "silu",
            "of the read-out, computed from the input",
            options=GATES,
            search=("none", "silu"),
        ),
        Axis(
            "norm",
            "rmsnorm",
            "of the read-out: per head before the gate (rmsnorm, groupnorm), or over each group"
            " after it (gated-rmsnorm)",
            options=NORMS,
            search=("rmsnorm", "gated-rmsnorm"),
        ),
    ),
    configure=configure,
    points=(
        Point(
            "linear-attention",
            {
                "expand": 1.0,
                "decay": "none",
                "rotary": False,
                "conv": 0,
                "activation": "none",
                "feature": "elu+1",
                "normaliser": True,
                "skip": False,
                "gate": "none",
                "norm": "none",
            },
            "linear attention (arXiv 2006.16236)",
        ),
        Point(
            "retnet",
            {
                "expand": 2.0,
                "decay": "fixed",
                "rotary": True,
                "conv": 0,
                "activation": "none",
                "feature": "none",
                "normaliser": False,
                "skip": False,
                "gate": "silu",
                "norm": "groupnorm",
            },
            "RetNet (arXiv 2307.08621)",
            "multi-scale retention with decays 1 - 2^(-5-h); the paper's heads are width/256",
        ),
        Point(
            "mamba2",
            {
                "expand": 2.0,
                "key_dim": 128,
                "groups": 1,
                "decay": "scalar",
                "decay_form": "dt",
                "rotary": False,
                "conv": 4,
                "activation": "silu",
                "feature": "none",
                "normaliser": False,
                "skip": True,
                "gate": "silu",
                "norm": "gated-rmsnorm",
            },
            "Mamba-2 (arXiv 2405.21060)",
            "state width 128 and heads of 64 channels (fewer channels at widths below 128)",
        ),
    ),
)
