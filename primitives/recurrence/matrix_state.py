"""The linear recurrence with a matrix state and an additive update.

Linear attention, RetNet, Mamba-2, GLA, HGRN2, RWKV-5 and 6, and what stands between them.

Per head, S_t = Diag(a_t) S_{t-1} + k_t v_t^T and o_t = S_t^T q_t, with S of shape (R, V); what the
layers of the literature add before and after it are the axes, in recurrence_axes.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...kernels.letters import BTD, BTGK
from ...kernels.matrix_state import matrix_state
from ...kernels.preread import matrix_state_preread
from ..base import Cost, Operator, State, state_dtype
from ..decays import (
    InputDecay,
    LearnedDecay,
    fixed_log_decay,
    input_decay_params,
    slope_log_decay,
)
from ..recurrent_parts import (
    Dt,
    ReadOutNorm,
    ShortConv,
    full_precision,
    is_long,
    long_call,
    read_out_norm_params,
    repeat_groups,
    short_conv_params,
)
from ..token_shift import TokenShift, token_shift_params, token_shift_products
from .features import FeatureMap, feature_params, feature_products, feature_rows

ROTARY_BASE = 10000.0
LEAST_SUM = 1e-6
"""The normaliser divides by this at least: features far below zero underflow."""


@dataclass(frozen=True)
class RecurrenceConfig:
    """Final numbers of one layer. `decay_form` is empty where no decay is computed from the input;
    `gate` and `norm` are names of `GATES` and `NORMS`; `slope` is the layer's share of Lightning
    attention's decays and `bound` the start of HGRN2's lower bound, 0 where there is none."""

    width: int
    heads: int
    groups: int
    key_dim: int
    value_dim: int
    decay: str
    decay_form: str
    decay_rank: int
    slope: float
    bound: float
    rotary: bool
    shift: str
    conv: int
    activation: str
    feature: str
    normaliser: bool
    bonus: bool
    skip: bool
    gate: str
    norm: str

    @property
    def inner(self) -> int:
        """F, the values of all heads."""
        return self.heads * self.value_dim

    @property
    def keys(self) -> int:
        """Channels of the keys that are projected: none where they are 1 - f (HGRN2)."""
        made = self.decay == "vector" and self.decay_form == "complement"
        return 0 if made else self.groups * self.key_dim

    @property
    def queries(self) -> int:
        return self.groups * self.key_dim

    @property
    def mixed(self) -> int:
        """Channels of v, k and q together: what the convolution and the activation act on."""
        return self.inner + self.keys + self.queries

    @property
    def rows(self) -> int:
        """R, rows of a head's state: the features of a key."""
        return feature_rows(self.feature, self.key_dim)

    @property
    def columns(self) -> int:
        """Columns of the state: the values and, for the normaliser, the sum of the keys."""
        return self.value_dim + self.normaliser

    @property
    def decays(self) -> tuple[int, int]:
        """Decays from the input: heads of one channel, or groups of a channel per row."""
        return (self.groups, self.key_dim) if self.decay == "vector" else (self.heads, 1)

    @property
    def splits(self) -> list[int]:
        """Widths of gate, (v, k, q) and decay in the input projection."""
        gate = self.inner if self.gate != "none" else 0
        parts, channels = self.decays
        decay = (self.decay_rank or parts * channels) if self.decay_form else 0
        return [gate, self.mixed, decay]

    @property
    def streams(self) -> list[int]:
        """Widths of what is projected from a token mix of its own: gate, v, k, q, decay."""
        gate, _, decay = self.splits
        return [n for n in (gate, self.inner, self.keys, self.queries, decay) if n]

    def cost(self, context: int, dtype: torch.dtype) -> Cost:
        projections = self.width * (sum(self.splits) + self.inner)
        matrix = self.heads * self.rows * self.columns
        parts, channels = self.decays
        params = (
            projections
            + token_shift_params(self.shift, self.width, len(self.streams))
            + short_conv_params(self.mixed, self.conv, bias=True)
            + feature_params(self.feature, self.groups, self.key_dim)
            + (self.heads * self.rows if self.decay == "learned" else 0)
            + self.bonus * self.heads * self.rows
            + self.skip * self.heads
            + read_out_norm_params(self.norm, self.heads, self.value_dim)
        )
        if self.decay_form:
            params += input_decay_params(self.decay_form, parts, channels, self.decay_rank)
        # The state is written once and read once per token.
        products = (
            projections
            + self.decay_rank * parts * channels
            + token_shift_products(self.shift, self.width, len(self.streams))
            + feature_products(self.feature, self.groups, self.key_dim)
            + self.mixed * self.conv
            + 2 * matrix
        )
        tail = (self.mixed * max(self.conv - 1, 0) + (self.shift != "none") * self.width) * (
            dtype.itemsize
        )
        state = tail + matrix * state_dtype(dtype).itemsize
        return Cost(params, params, float(2 * products), state)

    def build(self) -> Recurrence:
        return Recurrence(self)


class Recurrence(Operator):
    """See the module. `in_proj` makes gate, values, keys, queries and decays, in this order."""

    def __init__(self, config: RecurrenceConfig) -> None:
        super().__init__()
        c = self.config = config
        self.shift = TokenShift(c.shift, c.width, len(c.streams)) if c.shift != "none" else None
        self.in_proj = nn.Linear(c.width, sum(c.splits), bias=False)
        self.conv = (
            ShortConv(c.mixed, c.conv, True, "silu" if c.activation == "silu" else "none")
            if c.conv
            else None
        )
        self.feature = FeatureMap(c.feature, c.groups, c.key_dim) if c.feature != "none" else None
        self.dt: Dt | None = None
        self.decay: InputDecay | LearnedDecay | None = None
        if c.decay == "scalar" and c.decay_form == "dt":
            self.dt = Dt(c.heads)
        elif c.decay_form:
            self.decay = InputDecay(c.decay_form, *c.decays, c.decay_rank, c.bound)
        elif c.decay == "learned":
            self.decay = LearnedDecay(c.heads, c.rows)
        self.bonus = nn.Parameter(torch.rand(c.heads, c.rows)) if c.bonus else None
        self.skip = nn.Parameter(torch.ones(c.heads)) if c.skip else None
        self.norm = ReadOutNorm(c.norm, c.gate, c.heads, c.value_dim, c.groups)
        self.out_proj = nn.Linear(c.inner, c.width, bias=False)

    def forward(self, x: BTD, state: State | None = None) -> tuple[BTD, State | None]:
        if is_long(x):
            return long_call(self, x, state)
        c = self.config
        tensors: dict[str, Tensor] = {} if state is None else state.tensors
        start = 0 if state is None else state.length
        kept: dict[str, Tensor] = {}
        if self.shift is None:
            projected = self.in_proj(x)
        else:
            streams, kept["shift"] = self.shift(x, tensors.get("shift"))
            weights = torch.split(self.in_proj.weight, c.streams)
            parts = [F.linear(s, w) for s, w in zip(streams, weights, strict=True)]
            projected = torch.cat(parts, -1)
        z, mixed, decay = projected.split(c.splits, dim=-1)

        if self.conv is not None:
            mixed, kept["conv"] = self.conv(mixed, tensors.get("conv"))
        elif c.activation == "silu":
            mixed = F.silu(mixed)
        v, k, q = mixed.split([c.inner, c.keys, c.queries], dim=-1)
        if c.activation == "silu-q":
            q = F.silu(q)
        v = v.unflatten(-1, (c.heads, c.value_dim))
        log_decay, strength, scale = self._decays(decay, x)
        q = q.unflatten(-1, (c.groups, c.key_dim))
        if c.keys:
            k = k.unflatten(-1, (c.groups, c.key_dim))
        else:
            assert strength is not None
            k, strength = strength.to(v.dtype), None
        if self.feature is not None:
            q, k = self.feature(q, k)
        if c.rotary:
            q, k = rotate(q, k, start)
        written = F.pad(v, (0, 1), value=1.0) if c.normaliser else v
        if strength is not None:
            # It scales the keys; on the narrower values it gives the same product.
            written = (written * strength).to(v.dtype)

        q, k = repeat_groups(q, c.heads), repeat_groups(k, c.heads)
        before = tensors.get("matrix")
        with full_precision(x):
            if self.bonus is None:
                o, matrix = matrix_state(q, k, written, log_decay, before, scale=scale)
            else:
                o, matrix = matrix_state_preread(
                    q, k, written, self.bonus, log_decay, before, scale=scale
                )
        if c.normaliser:
            o = o[..., :-1] / o[..., -1:].clamp_min(LEAST_SUM)
        if self.skip is not None:
            o = o + self.skip[:, None] * v
        y = self.out_proj(self.norm(o, z if c.gate != "none" else None).to(x.dtype))
        if state is None:
            return y, None
        return y, State(start + x.shape[1], {"matrix": matrix, **kept})

    def _decays(self, raw: Tensor, x: BTD) -> tuple[Tensor | None, Tensor | None, float | None]:
        """The log decays, what scales the writes (..., 1), and the scale of the read-out.

        For HGRN2's keys, which are 1 - f, the second is (B, T, G, K).
        """
        c = self.config
        if c.decay == "fixed":
            return fixed_log_decay(c.heads, x), None, None
        if c.decay == "slopes":
            return slope_log_decay(c.heads, c.slope, x), None, None
        if self.dt is not None:
            dt, log_decay = self.dt(raw)
            return log_decay, dt[..., None], 1.0
        if isinstance(self.decay, LearnedDecay):
            return self.decay(x), None, None
        if self.decay is None:
            return None, None, None
        log_decay, strength = self.decay(raw)
        if c.decay == "scalar":
            return log_decay.squeeze(-1), strength, None
        return repeat_groups(log_decay, c.heads), strength, None

    def init_state(
        self, batch: int, context: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> State:
        c = self.config
        shape = (batch, c.heads, c.rows, c.columns)
        tensors = {"matrix": torch.zeros(shape, dtype=state_dtype(dtype), device=device)}
        if c.conv:
            tensors["conv"] = torch.zeros(batch, c.mixed, c.conv - 1, dtype=dtype, device=device)
        if c.shift != "none":
            tensors["shift"] = torch.zeros(batch, c.width, dtype=dtype, device=device)
        return State(0, tensors)


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
