"""RMSNorm and linear cross-entropy in torch: against their definitions and torch's own."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mendel.kernels import linear_cross_entropy as loss_module
from mendel.kernels.backend import Unsupported, use_backend, used_backends
from mendel.kernels.linear_cross_entropy import linear_cross_entropy, piece_rows
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


def loss_case(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    hidden, weight = torch.randn(3, 100, 24).to(dtype), torch.randn(37, 24).to(dtype)
    targets = torch.randint(0, 37, (3, 100))
    targets[0, :30] = -100
    return hidden.requires_grad_(), weight.requires_grad_(), targets


@pytest.mark.parametrize("backend", ["definition", "chunked"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_linear_cross_entropy_equals_torch(
    dtype: torch.dtype, backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pieces of 128 rows, so there are three; bfloat16 rounds the logits and their gradient."""
    monkeypatch.setitem(loss_module.PIECE_BYTES, "cpu", 1)
    hidden, weight, targets = loss_case(dtype)
    scale = torch.linspace(0.5, 2, 37).to(dtype).requires_grad_()
    with use_backend(backend):
        loss = linear_cross_entropy(hidden, weight, targets, scale=scale, z_weight=1e-2)
    (3 * loss).backward()
    found = [loss.detach(), *(t.grad for t in (hidden, weight, scale))]
    leaves = [t.detach().double().requires_grad_() for t in (hidden, weight, scale)]
    z = leaves[0] @ leaves[1].mT * leaves[2]
    right = F.cross_entropy(z.flatten(0, 1), targets.flatten())
    right = right + 1e-2 * torch.logsumexp(z, -1)[targets != -100].square().mean()
    (3 * right).backward()
    bound = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1e-2}[dtype]
    for have, want in zip(found, [right.detach(), *(t.grad for t in leaves)], strict=True):
        assert have is not None
        assert want is not None
        assert (have.double() - want).norm() <= bound * want.norm()
    assert loss.dtype == torch.promote_types(dtype, torch.float32)


def test_linear_cross_entropy_keeps_no_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest tensor that is made holds 128 rows of logits, or one number per weight."""
    monkeypatch.setitem(loss_module.PIECE_BYTES, "cpu", 1)
    hidden, weight = torch.randn(1024, 16), torch.randn(300, 16, requires_grad=True)
    sizes = []

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            out = func(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in (out,) if isinstance(t, Tensor))
            return out

    with Largest():
        linear_cross_entropy(hidden, weight, torch.zeros(1024, dtype=torch.int64)).backward()
    assert max(sizes) == 128 * 300
    assert piece_rows(300, hidden) == 128


def test_linear_cross_entropy_needs_no_gradient() -> None:
    hidden, weight, targets = loss_case(torch.float32)
    with torch.no_grad(), used_backends() as used:
        loss = linear_cross_entropy(hidden, weight, targets)
    assert used == {"linear_cross_entropy": {"chunked"}}
    assert not loss.requires_grad
    linear_cross_entropy(hidden.detach(), weight, targets).backward()
    assert hidden.grad is None
    assert weight.grad is not None
    tied = torch.randn(37, 37, requires_grad=True)
    linear_cross_entropy(tied, tied, torch.arange(37)).backward()
    right = tied.detach().clone().requires_grad_()
    F.cross_entropy(right @ right.mT, torch.arange(37)).backward()
    assert tied.grad is not None
    torch.testing.assert_close(tied.grad, right.grad)


def test_linear_cross_entropy_without_gradients_is_one_product() -> None:
    """Also of parameters that require them."""
    hidden, weight, targets = loss_case(torch.float32)
    products = []

    class Products(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if "mm" in str(func):
                products.append(str(func))
            return func(*args, **(kwargs or {}))

    right = linear_cross_entropy(hidden, weight, targets)
    with torch.no_grad(), Products():
        loss = linear_cross_entropy(hidden, weight, targets)
    assert products == ["aten.mm.default"]
    assert loss == right.detach()


def test_linear_cross_entropy_under_autocast_multiplies_in_its_dtype() -> None:
    hidden, weight, targets = loss_case(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, targets)
    low = linear_cross_entropy(hidden.bfloat16(), weight.bfloat16(), targets)
    assert loss.dtype == torch.float32
    assert loss == low
    loss.backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32


def test_linear_cross_entropy_refuses() -> None:
    hidden, weight, targets = loss_case(torch.float32)
    with pytest.raises(ValueError, match=r"targets \(\.\.\.\), not \(3, 100, 24\)"):
        linear_cross_entropy(hidden, weight, targets[:2])
    with use_backend("triton"), pytest.raises(Unsupported, match="on a CUDA device, not on cpu"):
        linear_cross_entropy(hidden, weight, targets)
    with pytest.raises((IndexError, RuntimeError)):
        linear_cross_entropy(hidden, weight, targets + 37)
    assert linear_cross_entropy(hidden, weight, torch.full_like(targets, -100)).isnan()
