"""The short causal depthwise convolution over tokens.

y_t = act(bias + sum_w weight[:, w] * x_{t-W+1+w}): the last tap meets the token itself. H3
(arXiv 2212.14052), Mamba (2312.00752) and most linear recurrences after them put it before q, k, v.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from . import definitions
from .backend import choose
from .letters import BTD, DW, D


def short_conv(
    x: BTD,
    weight: DW,
    bias: D | None = None,
    state: Tensor | None = None,
    *,
    activation: Literal["none", "silu"] = "none",
) -> tuple[BTD, Tensor]:
    """The outputs (x's dtype) and the state: the last W - 1 inputs, oldest first, (B, D, W-1).

    `state` continues a sequence (None: zeros); the new one has its dtype, or x's where it is None.
    Raises `Unsupported` where a pinned backend does not serve the case.
    """
    choose("short_conv", x.device)
    return definitions.short_conv(x, weight, bias, state, activation)
