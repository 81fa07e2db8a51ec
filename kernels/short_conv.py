"""The short causal depthwise convolution over tokens.

y_t = act(bias + sum_w weight[:, w] * x_{t-W+1+w}): the last tap meets the token itself. H3
(arXiv 2212.14052), Mamba (2312.00752) and most linear recurrences after them put it before q, k, v.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from . import definitions
from .backend import choose, kernels, without_autocast
from .definitions import accumulator
from .letters import BTD, DW, D

MOST_TAPS = 8
"""The taps that the Triton kernels unroll at most, in the backward pass W times W."""


@without_autocast
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
    batch, tokens, width = x.shape
    taps = weight.shape[1]
    dtype = accumulator(x, weight, bias, state)
    form = None if taps <= MOST_TAPS else "wide"
    backend = choose("short_conv", x.device, form, dtype=dtype)
    if backend == "definition":
        return definitions.short_conv(x, weight, bias, state, activation)
    if backend == "triton":
        return kernels("short_conv")(x, weight, bias, state, activation)
    if state is None:
        state = x.new_zeros(batch, width, taps - 1)
    if tokens == 1:
        window = torch.cat((state.to(dtype), x.to(dtype).mT), dim=-1)
        # A product per channel, (B, W) by (W, 1): a fraction of a convolution's start-up time.
        y = torch.bmm(window.transpose(0, 1), weight.to(dtype).unsqueeze(-1))
        y = y.view(width, batch).t().reshape(batch, 1, width)
        last = window[:, :, 1:]
    else:
        window = torch.cat((state.to(dtype).mT, x.to(dtype)), dim=1)
        y = _Conv.apply(window, weight.to(dtype))  # type: ignore[no-untyped-call]
        last = window[:, tokens:].mT
    if bias is not None:
        y = y + bias.to(dtype)
    if activation == "silu":
        y = F.silu(y)
    return y.to(x.dtype), last.to(state.dtype)


class _Conv(torch.autograd.Function):
    """The convolution of (B, W-1+T, D) by (D, W), and its gradient.

    Its own, because torch's gradient of a depthwise convolution takes several times longer on a
    CPU than the convolution of the gradient and one sum per tap, which it equals.
    """

    @staticmethod
    def forward(ctx: Any, window: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(window, weight)
        return _correlate(window, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        window, weight = ctx.saved_tensors
        tokens, taps = dy.shape[1], weight.shape[1]
        dwindow = _correlate(F.pad(dy, (0, 0, taps - 1, taps - 1)), weight.flip(1))
        dweight = [(dy * window[:, w : w + tokens]).sum(dim=(0, 1)) for w in range(taps)]
        return dwindow, torch.stack(dweight, dim=1)


def _correlate(window: Tensor, weight: Tensor) -> Tensor:
    """sum_w weight[:, w] * window[:, t + w] for every t with W inputs."""
    taps = weight.shape[1]
    tokens = window.shape[1] - taps + 1
    if window.is_cuda:
        # cuDNN may compute a float32 convolution in TF32, with three digits.
        y = window[:, :tokens] * weight[:, 0]
        for w in range(1, taps):
            y = torch.addcmul(y, window[:, w : w + tokens], weight[:, w])
        return y
    # Two-dimensional because (B, D, 1, T) with channels last is how the tokens lie in memory.
    y = F.conv2d(window.mT.unsqueeze(2), weight[:, None, None], groups=weight.shape[0])
    return y.squeeze(2).mT
