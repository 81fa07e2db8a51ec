"""Norms over the width, by name."""

from __future__ import annotations

from torch import nn

from .base import GeneError

RMSNORM_EPS = 1e-6
LAYERNORM_EPS = 1e-5


def make_norm(kind: str, width: int) -> nn.Module:
    """The norm of that name over the last axis, with fresh weights.

    `rmsnorm` (Zhang and Sennrich, arXiv 1910.07467): x / rms(x) * weight. `layernorm` (Ba et al.,
    arXiv 1607.06450): (x - mean) / std * weight + bias. Raises GeneError for any other name.
    """
    if kind == "rmsnorm":
        return nn.RMSNorm(width, eps=RMSNORM_EPS)
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
