"""What the recurrent mixers share: sizes of heads, the short convolution, norm and gate at the end.

Sums, norms and decays are computed in float32 at least, whatever the dtype of the weights.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels.letters import BTD, BTF, BTGK, BTHK, BTHV
from ..kernels.short_conv import short_conv
from .base import Axis, Carry, GeneError, Operator, State, state_dtype

TAPS = (0, 2, 3, 4, 5, 6, 7, 8)
GATES = ("none", "silu", "sigmoid")
NORMS = ("none", "rmsnorm", "rmsnorm-all", "groupnorm", "groupnorm-scale", "gated-rmsnorm")
EPS = 1e-5


PIECE = 1024
"""Tokens of a piece of a long sequence; see `long_call`."""


def is_long(x: Tensor) -> bool:
    """Whether a call is better made piece by piece: a long one on a CPU, without gradients.

    Whole, its buffers outgrow the caches and are fresh memory in every call: at 16,384 tokens that
    takes more time than the arithmetic. A GPU wants all tokens at once, and gradients keep them.
    """
    return x.device.type == "cpu" and x.shape[1] > PIECE and not torch.is_grad_enabled()


def long_call(
    operator: Operator, x: BTD, state: State | None, carry: Carry | None = None
) -> tuple[BTD, State | None]:
    """`operator(x, state)` in pieces of PIECE tokens, the state between them.

    What operators hand on with `carry` has the tokens in its second axis.
    """
    held: State | None = state
    if held is None:
        held = operator.init_state(x.shape[0], x.shape[1], x.dtype, x.device)
    outputs = []
    later: list[list[Tensor]] = []
    for start, piece in zip(range(0, x.shape[1], PIECE), torch.split(x, PIECE, 1), strict=True):
        if carry is None:
            y, held = operator(piece, held)
        else:
            earlier = carry.earlier
            if earlier is not None:
                earlier = [t[:, start : start + PIECE] for t in earlier]
            own = Carry(earlier)
            y, held = operator(piece, held, own)
            later.append(own.later)
        outputs.append(y)
    if carry is not None:
        carry.later = [torch.cat(parts, 1) for parts in zip(*later, strict=True)]
    return torch.cat(outputs, 1), None if state is None else held


def taps_axis(default: int) -> Axis:
    """The axis of the short convolution."""
    return Axis(
        "conv",
        default,
        "taps of the short causal convolution before the recurrence; 0 is none",
        options=TAPS,
        search=(0, 4),
    )


def at_least_float32(t: Tensor) -> Tensor:
    """The tensor in the dtype of sums and states."""
    return t.to(state_dtype(t.dtype))


def full_precision(t: Tensor) -> AbstractContextManager[object]:
    """No autocast inside: it would compute an operator's sums, and so its state, in bf16."""
    return torch.autocast(t.device.type, enabled=False)


def inner_width(name: str, width: int, expand: float) -> int:
    """F, the width of the values of all heads together: expand * D, which must be whole."""
    inner = round(expand * width)
    if inner < 1 or abs(inner - expand * width) > 1e-9 * width:
        raise GeneError(
            f"{name}: expand={expand:g} of width {width} is no whole number of channels; "
            f"{max(inner, 1) / width:g} is the nearest that is"
        )
    return inner


def head_count(name: str, inner: int, heads: int, target: int) -> int:
    """H: the given number, which must divide F, or for 0 the one that `auto_heads` names."""
    if heads == 0:
        return auto_heads(inner, target)
    if inner % heads:
        raise GeneError(f"{name}: heads={heads} does not divide the inner width {inner}")
    return heads


def auto_heads(inner: int, target: int) -> int:
    """Heads of `target` channels where F has room for four of them, else four narrower heads.

    Where F does not divide so, the heads have the widest divisor of F below that.
    """
    most = max(1, min(target, inner // 4))
    return inner // max(v for v in range(1, most + 1) if inner % v == 0)


def group_count(name: str, heads: int, groups: int) -> int:
    """G, the number of different queries and keys: the given one, or for 0 one per head."""
    if groups == 0:
        return heads
    if heads % groups:
        raise GeneError(f"{name}: groups={groups} does not divide the {heads} heads")
    return groups


def repeat_groups(t: BTGK, heads: int) -> BTHK:
    """Each group for the H/G heads that share it, without a copy where there is one group."""
    batch, tokens, groups, width = t.shape
    if groups == heads:
        return t
    wide = t[:, :, :, None].expand(batch, tokens, groups, heads // groups, width)
    return wide.reshape(batch, tokens, heads, width)


class ShortConv(nn.Module):
    """The causal depthwise convolution with its weights; see kernels/short_conv.py."""

    def __init__(self, channels: int, taps: int, bias: bool, activation: str) -> None:
        super().__init__()
        bound = taps**-0.5  # torch's default of a depthwise Conv1d
        self.weight = nn.Parameter(torch.empty(channels, taps).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(channels).uniform_(-bound, bound)) if bias else None
        self.silu = activation == "silu"

    def forward(self, x: BTD, tail: Tensor | None) -> tuple[BTD, Tensor]:
        """The outputs and the last W - 1 inputs, (B, D, W-1)."""
        with full_precision(x):
            return short_conv(
                x, self.weight, self.bias, tail, activation="silu" if self.silu else "none"
            )


def short_conv_params(channels: int, taps: int, bias: bool) -> int:
    return channels * (taps + bias) if taps else 0


class ReadOutNorm(nn.Module):
    """From the read-outs of the heads, (B, T, H, V), to (B, T, F), normalised and gated.

    `rmsnorm`: RMS of each head, one scale per channel of a head, then the gate. `rmsnorm-all`: RMS
    of all heads together, scale per channel of F, then the gate. `groupnorm`: mean and variance of
    each head, scale and shift per channel of F, then the gate. `groupnorm-scale`: without the shift
    (xLSTM). `gated-rmsnorm`: the gate first, then the RMS of each of `groups` parts of F, scale per
    channel of F (Mamba-2).
    """

    def __init__(
        self, norm: str, gate: str, heads: int, value_dim: int, groups: int, eps: float = EPS
    ) -> None:
        super().__init__()
        inner = heads * value_dim
        self.norm, self.gate, self.groups, self.eps = norm, gate, groups, eps
        if norm != "none":
            self.weight = nn.Parameter(torch.ones(value_dim if norm == "rmsnorm" else inner))
        self.bias: nn.Parameter | None = None
        if norm == "groupnorm":
            self.bias = nn.Parameter(torch.zeros(inner))

    def forward(self, o: BTHV, z: BTF | None) -> BTF:
        o = at_least_float32(o)
        width = o.shape[-1]
        if self.norm == "rmsnorm":
            o = F.rms_norm(o, (width,), self.weight.to(o.dtype), self.eps)
        elif self.norm in ("groupnorm", "groupnorm-scale"):
            o = F.layer_norm(o, (width,), None, None, self.eps)
        y = o.flatten(2)
        if self.norm == "rmsnorm-all":
            y = F.rms_norm(y, (y.shape[-1],), self.weight.to(y.dtype), self.eps)
        if self.norm == "groupnorm-scale":
            y = y * self.weight.to(y.dtype)
        elif self.bias is not None:
            y = torch.addcmul(self.bias.to(y.dtype), y, self.weight.to(y.dtype))
        if z is not None:
            z = at_least_float32(z)
            y = y * (F.silu(z) if self.gate == "silu" else torch.sigmoid(z))
        if self.norm == "gated-rmsnorm":
            part = y.reshape(*y.shape[:2], self.groups, -1)
            y = F.rms_norm(part, part.shape[-1:], None, self.eps).flatten(2)
            y = y * self.weight.to(y.dtype)
        return y


def read_out_norm_params(norm: str, heads: int, value_dim: int) -> int:
    inner = heads * value_dim
    return {"none": 0, "rmsnorm": value_dim, "groupnorm": 2 * inner}.get(norm, inner)


class Dt(nn.Module):
    """Mamba-2's step sizes and decays: dt = softplus(x + bias), log decay = -exp(A_log) * dt.

    As published (arXiv 2405.21060): A is uniform in 1..16 and dt log-uniform in 0.001..0.1 at the
    start.
    """

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.A_log = nn.Parameter(torch.empty(heads).uniform_(1, 16).log_())
        dt = torch.empty(heads).uniform_(math.log(1e-3), math.log(1e-1)).exp_()
        self.bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The step sizes and the log decays, both (B, T, H)."""
        x = at_least_float32(x)
        dt = F.softplus(x + self.bias.to(x.dtype))
        return dt, -self.A_log.to(x.dtype).exp() * dt
