"""Decays of the matrix-state recurrence: fixed ones, learned ones, and ones from the input.

All are natural logarithms, at most 0. From the input they come per head (scalar) or per key channel
of a group of heads (vector), in one of four forms:

    dt          -softplus(x + b) exp(A_log)            Mamba-2 (arXiv 2405.21060)
    sigmoid     log sigmoid(x + b) / 16                GLA (2312.06635)
    complement  log f, f = l + (1 - l) sigmoid(x)      HGRN2 (2404.07904); what is written is
                                                       scaled by 1 - f
    exp         -exp(x + b)                            RWKV-6 (2404.05892)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .base import state_dtype
from .recurrent_parts import at_least_float32

FORMS = ("dt", "sigmoid", "complement", "exp")
TEMPERATURE = 16.0
SLOWEST, FASTEST = -6.0, -1.0
"""RWKV's channels start with decays exp(-exp(p)), p spread between these."""
MOST = 10.0
"""exp(-exp(10)) is 0 in every dtype, and sums of -exp(10) keep their digits."""


def fixed_log_decay(heads: int, like: Tensor) -> Tensor:
    """RetNet's decays as logarithms, (H,): log(1 - 2^(-5-h)) (arXiv 2307.08621, eq. 8)."""
    h = torch.arange(heads, device=like.device, dtype=state_dtype(like.dtype))
    return torch.log1p(-torch.exp2(-5 - h))


def slope_log_decay(heads: int, share: float, like: Tensor) -> Tensor:
    """Lightning attention's decays as logarithms, (H,): -2^(-8(h+1)/H) * share (2501.08313)."""
    h = torch.arange(1, heads + 1, device=like.device, dtype=state_dtype(like.dtype))
    return -torch.exp2(-8 * h / heads) * share


def slope_share(layer: int, depth: int) -> float:
    """From 1 in the first slot to 1e-5 in the last, which hardly forgets (arXiv 2501.08313)."""
    return 1 - layer / (depth - 1 + 1e-5) + 1e-5


class LearnedDecay(nn.Module):
    """RWKV-5's decays: one learned logarithm -exp(p) per head and key channel, (H, K)."""

    def __init__(self, heads: int, channels: int) -> None:
        super().__init__()
        start = torch.linspace(SLOWEST, FASTEST, heads * channels)
        self.p = nn.Parameter(start.view(heads, channels))

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, H, K) for x of (B, T, ...)."""
        p = at_least_float32(self.p).clamp_max(MOST)
        return -p.exp().expand(*x.shape[:2], *p.shape)


class InputDecay(nn.Module):
    """Decays of `parts` heads or groups with `channels` channels each, from the input.

    `rank` > 0: a second map, from `rank` numbers to all channels; RWKV-6 bends them by tanh.
    `bound` is where l of the form `complement` starts; the papers tie the l of all layers by one
    softmax, which at its start gives the share of the layers below.
    """

    def __init__(self, form: str, parts: int, channels: int, rank: int, bound: float) -> None:
        super().__init__()
        self.form, self.parts, self.channels = form, parts, channels
        shape = (parts, channels)
        self.up = nn.Linear(rank, parts * channels, bias=False) if rank else None
        if form == "complement":
            bound = min(max(bound, 0.02), 0.98)
            self.lower = nn.Parameter(torch.full(shape, math.log(bound / (1 - bound))))
        elif form == "sigmoid":
            self.bias = nn.Parameter(torch.zeros(shape))
        elif form == "exp":
            self.bias = nn.Parameter(torch.linspace(SLOWEST, FASTEST, parts * channels).view(shape))
        else:
            dt = torch.empty(shape).uniform_(math.log(1e-3), math.log(1e-1)).exp_()
            self.bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))
            self.A_log = nn.Parameter(torch.empty(parts, 1).uniform_(1, 16).log_())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """log decays and, for `complement`, 1 - f: both (B, T, parts, channels)."""
        if self.up is not None:
            x = self.up(torch.tanh(x) if self.form == "exp" else x)
        x = at_least_float32(x).reshape(*x.shape[:2], self.parts, self.channels)
        if self.form == "complement":
            low, rest = F.logsigmoid(self.lower.to(x.dtype)), F.logsigmoid(-self.lower.to(x.dtype))
            log_f = torch.logaddexp(low, rest + F.logsigmoid(x))
            return log_f, rest.exp() * torch.sigmoid(-x)
        x = x + self.bias.to(x.dtype)
        if self.form == "sigmoid":
            return F.logsigmoid(x) / TEMPERATURE, None
        if self.form == "exp":
            return -x.clamp_max(MOST).exp(), None
        return -F.softplus(x) * self.A_log.to(x.dtype).exp(), None


def input_decay_params(form: str, parts: int, channels: int, rank: int) -> int:
    return (1 + rank) * parts * channels + (parts if form == "dt" else 0)
