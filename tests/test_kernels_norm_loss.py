"""RMSNorm and linear cross-entropy in torch: against their definitions and torch's own."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mendel.kernels.backend import use_backend
from mendel.kernels.rms_norm import rms_norm


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("residual", "gate", "first", "activation"),
    [
        *product([False, True], [False], [False], ["silu"]),
        *product([False, True], [True], [False, True], ["silu", "sigmoid"]),
    ],
)
def test_rms_norm_equals_its_definition(
    residual: bool, gate: bool, first: bool, activation: Any, dtype: torch.dtype
) -> None:
    """Sums in another order: 1e-6, 1e-12 in float64; bfloat16 rounds the residual's sum first."""
    torch.manual_seed(0)
    given = {
        name: torch.randn(2, 5, 24).to(dtype) if there else None
        for name, there in (("x", True), ("residual", residual), ("gate", gate))
    }
    found = []
    for backend in ("definition", "chunked"):
        leaves = {n: None if t is None else t.clone().requires_grad_() for n, t in given.items()}
        weight = torch.linspace(-1, 2, 24).to(dtype).requires_grad_()
        with use_backend(backend):  # type: ignore[arg-type]
            y, h = rms_norm(
                weight=weight, eps=1e-3, gate_first=first, activation=activation, **leaves
            )  # type: ignore[arg-type]
        (y * torch.linspace(-1, 1, 24)).sum().backward(retain_graph=True)
        (h * torch.linspace(2, -1, 24)).sum().backward()
        grads = [t.grad for t in (weight, *leaves.values()) if t is not None]
        found.append([y, h, *grads])
        assert y.dtype == h.dtype == dtype
    bound = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
    for want, have in zip(*found, strict=True):
        assert want is not None
        assert have is not None
        assert (have - want).norm() <= bound * want.norm()


def test_rms_norm_equals_torch() -> None:
    x, weight = torch.randn(3, 7, 20), torch.randn(20)
    residual = torch.randn(3, 7, 20)
    y, h = rms_norm(x, weight, residual, eps=1e-5)
    assert torch.equal(h, x + residual)
    assert torch.equal(y, F.rms_norm(x + residual, (20,), weight, 1e-5))
    assert rms_norm(x, weight)[1] is x


def test_rms_norm_refuses_other_shapes() -> None:
    x: Tensor = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"gate has the shape of x, \(2, 3\), not \(3,\)"):
        rms_norm(x, x[0], gate=x[0])
