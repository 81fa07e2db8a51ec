"""Norms over the width, by name."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .base import GeneError

RMSNORM_EPS = 1e-6
LAYERNORM_EPS = 1e-5


def make_norm(kind: str, width: int) -> nn.Module:
    """The norm of that name over the last axis, with fresh weights.

    `rmsnorm` (Zhang and Sennrich, arXiv 1910.07467): x / rms(x) * weight. `layernorm` (Ba et al.,
    arXiv 1607.06450): (x - mean) / std * weight + bias. Raises GeneError for any other name.
    """
    if kind == "rmsnorm":
        return RMSNorm(width, eps=RMSNORM_EPS)
    if kind == "layernorm":
        return nn.LayerNorm(width, eps=LAYERNORM_EPS)
    raise GeneError(f"norm is one of rmsnorm, layernorm, not {kind}")


def norm_params(kind: str, width: int) -> int:
    """The parameters of `make_norm(kind, width)`. Raises GeneError for an unknown name."""
    if kind == "rmsnorm":
        return width
    if kind == "layernorm":
        return 2 * width
    raise GeneError(f"norm is one of rmsnorm, layernorm, not {kind}")


class RMSNorm(nn.RMSNorm):
    """torch's RMSNorm, with a backward pass of its own on the CPU.

    There torch 2.13 has no fused kernel: its backward pass goes over x about twice as often.
    """

    def forward(self, x: Tensor) -> Tensor:
        fused = x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)
        if not fused or self.weight.dtype != x.dtype:
            return super().forward(x)
        assert self.eps is not None
        y: Tensor = _RmsNorm.apply(x, self.weight, self.eps)  # type: ignore[no-untyped-call]
        return y


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
