"""Norms over the width, by name."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..kernels.backend import current, pinned
from ..kernels.rms_norm import norm_form, rms_norm
from .base import GeneError

NORMS = ("rmsnorm", "layernorm", "dyt", "none")
RMSNORM_EPS = 1e-6
LAYERNORM_EPS = 1e-5

DYT_ALPHA = 0.5
"""alpha's initial value outside language models (arXiv 2503.10622)."""
_DYT_ALPHAS = ((1024, 1.0, 1.0), (2048, 1.0, 0.5), (4096, 0.8, 0.2), (5120, 0.6, 0.15))
_DYT_WIDEST = (0.2, 0.05)


def dyt_alpha(width: int, attention: bool) -> float:
    """alpha's initial value in a language model: before attention, and everywhere else.

    The values that the authors tuned for LLaMA (arXiv 2503.10622): 1.0 and 1.0 at width 1024, 1.0
    and 0.5 at 2048, 0.8 and 0.2 at 4096, 0.6 and 0.15 at 5120, 0.2 and 0.05 at 8192. A width
    between two of them takes the wider one's, one below 1024 those of 1024.
    """
    for widest, before_attention, elsewhere in _DYT_ALPHAS:
        if width <= widest:
            return before_attention if attention else elsewhere
    return _DYT_WIDEST[0 if attention else 1]


def make_norm(kind: str, width: int, alpha: float = DYT_ALPHA) -> nn.Module:
    """The norm of that name over the last axis, with fresh weights.

    `rmsnorm` (Zhang and Sennrich, arXiv 1910.07467): x / rms(x) * weight. `layernorm` (Ba et al.,
    arXiv 1607.06450): (x - mean) / std * weight + bias. `dyt` (Zhu et al., arXiv 2503.10622):
    weight * tanh(alpha * x) + bias with one learned alpha, initially the argument. `none`: x.
    Raises GeneError for any other name.
    """
    if kind == "rmsnorm":
        return RMSNorm(width, eps=RMSNORM_EPS)
    if kind == "layernorm":
        return nn.LayerNorm(width, eps=LAYERNORM_EPS)
    if kind == "dyt":
        return DynamicTanh(width, alpha)
    if kind == "none":
        return nn.Identity()
    raise _unknown(kind)


def norm_params(kind: str, width: int) -> int:
    """The parameters of `make_norm(kind, width)`. Raises GeneError for an unknown name."""
    if kind not in NORMS:
        raise _unknown(kind)
    return {"rmsnorm": width, "layernorm": 2 * width, "dyt": 2 * width + 1, "none": 0}[kind]


def _unknown(kind: str) -> GeneError:
    return GeneError(f"norm is one of {', '.join(NORMS)}, not {kind}")


class DynamicTanh(nn.Module):
    """DyT: weight * tanh(alpha * x) + bias, elementwise (Zhu et al., arXiv 2503.10622)."""

    def __init__(self, width: int, alpha: float) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.tensor([alpha]))
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.bias, torch.tanh(self.alpha * x), self.weight)


class RMSNorm(nn.RMSNorm):
    """torch's RMSNorm, with a backward pass of its own on the CPU and our kernels on a GPU.

    On a CPU torch 2.13 has no fused kernel: its backward pass goes over x about twice as often.
    """

    def forward(self, x: Tensor) -> Tensor:
        assert self.eps is not None
        # Other pins than this one speak of the operators that mix tokens.
        if pinned() == "triton" or (pinned() is None and x.is_cuda):
            dtype = torch.promote_types(x.dtype, self.weight.dtype)
            form = norm_form(x.shape[-1])
            if current("rms_norm", x.device, form, dtype=dtype) == "triton":
                return rms_norm(x, self.weight, eps=self.eps)[0]
        fused = x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)
        if not fused or self.weight.dtype != x.dtype:
            return super().forward(x)
        y: Tensor = _RmsNorm.apply(x, self.weight, self.eps)  # type: ignore[no-untyped-call]
        return y


class HeadsNorm(RMSNorm):
    """RMSNorm over the channels of all heads together: x (..., H, K), one scale per channel.

    OLMoE's norm of queries and of keys (Muennighoff et al., arXiv 2409.02060).
    """

    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__(heads * head_dim, eps=RMSNORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(-2)).view_as(x)


class UnscaledNorm(nn.Module):
    """RMSNorm without learned scales over the last `axes` axes."""

    def __init__(self, axes: int = 1) -> None:
        super().__init__()
        self.axes = axes

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-self.axes :], eps=RMSNORM_EPS)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        width = x.shape[-1]
        length: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = length.square_().div_(width).add_(eps).rsqrt_()
        normed: Tensor = x * scale
        ctx.save_for_backward(normed, weight, scale)
        return normed * weight

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        """dx = (w g - n mean(w g n)) / rms, dw = sum g n, with n = x / rms."""
        normed, weight, scale = ctx.saved_tensors
        product = grad * normed
        along = (product @ weight).div_(normed.shape[-1]).unsqueeze(-1)
        dx = (grad * weight).addcmul_(normed, along, value=-1).mul_(scale)
        return dx, product.flatten(0, -2).sum(0), None
