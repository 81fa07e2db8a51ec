"""The way of tokens to their experts and back: both forms, their gradients, dropped pairs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mendel.kernels.backend import use_backend, used_backends
from mendel.kernels.moe_permute import Dispatch, dispatch, permute, unpermute

EXPERTS = 5


def routing(tokens: int, top_k: int, dropped: bool) -> tuple[Tensor, Tensor | None]:
    """Distinct experts per token of EXPERTS + 1, the last computing nothing, and what is kept."""
    generator = torch.Generator().manual_seed(tokens)
    count = EXPERTS + dropped
    scores = torch.rand(tokens, count, generator=generator)
    choices = scores.argsort(-1)[:, :top_k]
    return choices, torch.rand(tokens, top_k, generator=generator) < 0.6 if dropped else None


@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize(("tokens", "top_k"), [(1, 1), (1, 3), (17, 1), (33, 3)])
def test_a_dispatch_sorts_the_pairs_by_expert(tokens: int, top_k: int, dropped: bool) -> None:
    choices, kept = routing(tokens, top_k, dropped)
    where = dispatch(choices, EXPERTS, kept)
    there = torch.ones_like(choices, dtype=torch.bool) if kept is None else kept
    expected = [
        n * top_k + j
        for expert in range(EXPERTS)
        for n in range(tokens)
        for j in range(top_k)
        if choices[n, j] == expert and there[n, j]
    ]
    assert where.order.tolist() == expected
    counts = [int(((choices == e) & there).sum()) for e in range(EXPERTS)]
    assert where.ends.tolist() == torch.tensor(counts).cumsum(0).tolist()
    assert where.ends.dtype == torch.int32
    for pair, row in enumerate(where.back.flatten().tolist()):
        assert row == (expected.index(pair) if pair in expected else -1)


def passes(
    x: Tensor, weights: Tensor, factor: Tensor, where: Dispatch
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows, sums, and the gradients of x and the weights, with work on the rows between."""
    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    rows = permute(x, where)
    out = unpermute((rows * factor[: rows.shape[0]]).tanh(), weights, where)
    generator = torch.Generator().manual_seed(9)
    slope = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype)
    gradients = torch.autograd.grad((out * slope).sum(), [x, weights])
    return rows, out, *gradients


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize(("tokens", "top_k"), [(1, 1), (17, 1), (33, 3)])
def test_both_forms_agree(tokens: int, top_k: int, dropped: bool, dtype: torch.dtype) -> None:
    """The weights stay float32 beside bfloat16 rows, as a router gives them."""
    generator = torch.Generator().manual_seed(0)
    choices, kept = routing(tokens, top_k, dropped)
    where = dispatch(choices, EXPERTS, kept)
    x = torch.randn(tokens, 12, generator=generator, dtype=torch.float64).to(dtype)
    factor = torch.randn(tokens * top_k, 12, generator=generator, dtype=torch.float64).to(dtype)
    weights = torch.rand(tokens, top_k, generator=generator)
    weights = weights.double() if dtype == torch.float64 else weights
    found = []
    for backend in ("definition", "chunked"):
        with use_backend(backend), used_backends() as used:  # type: ignore[arg-type]
            found.append(passes(x, weights, factor, where))
        assert used == {"moe_permute": {backend}}
    bound = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2e-2}[dtype]
    for want, have in zip(*found, strict=True):
        assert have.dtype == want.dtype
        assert (have - want).double().norm() <= bound * want.double().norm()


def test_everything_dropped_is_zero() -> None:
    choices = torch.tensor([[0, 1], [2, 1]])
    where = dispatch(choices, EXPERTS, torch.zeros(2, 2, dtype=torch.bool))
    for backend in ("definition", "chunked"):
        with use_backend(backend):  # type: ignore[arg-type]
            x, weights = torch.randn(2, 4, requires_grad=True), torch.rand(2, 2, requires_grad=True)
            rows = permute(x, where)
            assert rows.shape == (0, 4)
            out = unpermute(rows, weights, where)
        assert torch.equal(out, torch.zeros(2, 4))
    out.sum().backward()
    assert x.grad is not None
    assert x.grad.abs().max() == 0
    assert weights.grad is not None
    assert weights.grad.abs().max() == 0


def test_autograd_agrees_with_finite_differences() -> None:
    choices, kept = routing(7, 3, True)
    where = dispatch(choices, EXPERTS, kept)
    rows = where.order.numel()
    x = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    y = torch.randn(rows, 3, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(7, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a: permute(a, where), (x,))
    assert torch.autograd.gradcheck(lambda a, b: unpermute(a, b, where), (y, weights))
