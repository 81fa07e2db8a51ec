"""RMSNorm (Zhang and Sennrich, arXiv 1910.07467) with what stands around it in a model.

h = x + residual;  y = w * h / sqrt(mean(h^2) + eps) * act(gate), or, where the gate is first (the
norm of Mamba-2, arXiv 2405.21060), y = w * u / sqrt(mean(u^2) + eps) with u = h * act(gate).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from . import definitions
from .backend import choose, kernels, without_autocast
from .definitions import accumulator

MOST_CHANNELS = 16384
"""The widest row that a program of the kernels holds."""


def norm_form(width: int) -> str | None:
    """The case of `rms_norm` that rows of this width are: None, or `wide`, which has no kernel."""
    return None if width <= MOST_CHANNELS else "wide"


@without_autocast
def rms_norm(
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    *,
    eps: float = 1e-6,
    activation: Literal["silu", "sigmoid"] = "silu",
    gate_first: bool = False,
) -> tuple[Tensor, Tensor]:
    """y and h, the sum that the residual stream carries on (x itself without a residual).

    x, residual and gate are (..., D) and weight is (D,). Sums are taken in float32 at least; y has
    the widest dtype of x, residual and weight, h that of x and residual. Raises ValueError where
    shapes differ, `Unsupported` where a pinned backend does not serve the case.
    """
    for name, other in (("residual", residual), ("gate", gate)):
        if other is not None and other.shape != x.shape:
            raise ValueError(
                f"rms_norm: {name} has the shape of x, {tuple(x.shape)}, not {tuple(other.shape)}"
            )
    dtype = accumulator(x, weight, residual, gate)
    backend = choose("rms_norm", x.device, norm_form(x.shape[-1]), dtype=dtype)
    if backend == "definition":
        return definitions.rms_norm(x, weight, residual, gate, eps, activation, gate_first)
    if backend == "triton":
        return kernels("rms_norm")(x, weight, residual, gate, eps, activation, gate_first)
    h = x if residual is None else x + residual
    u = h.to(dtype) if residual is None else x.to(dtype) + residual.to(dtype)
    opening = None
    if gate is not None:
        opening = F.silu(gate.to(dtype)) if activation == "silu" else gate.to(dtype).sigmoid()
    if opening is not None and gate_first:
        u = u * opening
    y = F.rms_norm(u, x.shape[-1:], weight.to(dtype), eps)
    if opening is not None and not gate_first:
        y = y * opening
    return y.to(torch.promote_types(h.dtype, weight.dtype)), h
