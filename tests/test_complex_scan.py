"""The complex diagonal scan: its definition, its form in torch, split sequences.

1e-10 in float64, far above its rounding and far below a mistake in a formula; 1e-5 in float32, and
a digit more for the gradient of an angle, a sum over all tokens of differences that nearly cancel.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mendel.kernels.backend import use_backend
from mendel.kernels.complex_scan import complex_scan

B, D = 2, 5
KINDS = ("decay and angle of tokens", "decay of tokens", "angle of tokens", "fixed")


def inputs(kind: str, tokens: int, dtype: torch.dtype, factor: bool) -> dict[str, Tensor | None]:
    g = torch.Generator().manual_seed(tokens)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    per_token = (B, tokens, D)
    log_a = -torch.rand(per_token if "decay" in kind else (D,), generator=g, dtype=torch.float64)
    return {
        "log_a": log_a.to(dtype),
        "angle": normal(*(per_token if "angle" in kind else (D,))).to(dtype),
        "b": normal(B, tokens, 2 * D).to(dtype),
        "state": normal(B, 2 * D).to(dtype),
        "factor": torch.complex(normal(D), normal(D)) if factor else None,
    }


def with_gradients(given: dict[str, Tensor | None], backend: Any) -> dict[str, Tensor]:
    leaves = {n: None if t is None else t.clone().requires_grad_() for n, t in given.items()}
    with use_backend(backend):
        h, last = complex_scan(**leaves)  # type: ignore[arg-type]
    g = torch.Generator().manual_seed(9)
    weight = torch.randn(h.shape, generator=g, dtype=torch.float64).to(h.dtype)
    ((h * weight).sum() + last.square().sum()).backward()
    found = {"h": h.detach(), "last": last.detach()}
    for name, t in leaves.items():
        if t is not None:
            found[name] = torch.zeros_like(t) if t.grad is None else t.grad
    return found


@pytest.mark.parametrize("factor", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("tokens", "dtype"), [(1, torch.float64), (33, torch.float64), (130, torch.float32)]
)
def test_equals_definition(kind: str, tokens: int, dtype: torch.dtype, factor: bool) -> None:
    given = inputs(kind, tokens, dtype, factor)
    for start in (given, {**given, "state": None}):
        have, want = with_gradients(start, "chunked"), with_gradients(start, "definition")
        assert have.keys() == want.keys()
        for name, right in want.items():
            assert have[name].dtype == right.dtype, name
            bound = 1e-10 if dtype == torch.float64 else 1e-4 if name == "angle" else 1e-5
            # What is 0 by cancellation may be a rounding.
            rounding = 20 * torch.finfo(dtype).eps * right.numel() ** 0.5
            assert (have[name] - right).norm() <= bound * right.norm() + rounding, name


def test_definition_is_a_sum_of_powers() -> None:
    """h_t = sum_{s<=t} exp((t - s) (log_a + i angle)) f b_s."""
    given = inputs("fixed", 7, torch.float64, factor=True)
    log_a, angle, b, factor = (given[n] for n in ("log_a", "angle", "b", "factor"))
    assert log_a is not None
    assert angle is not None
    assert b is not None
    assert factor is not None
    exponent = torch.complex(log_a, angle)
    written = factor * torch.complex(*b.chunk(2, -1))
    total = sum(torch.exp((6 - s) * exponent) * written[:, s] for s in range(7))
    assert isinstance(total, Tensor)
    with use_backend("definition"):
        h, last = complex_scan(log_a, angle, b, None, factor)
    want = torch.cat((total.real, total.imag), -1)
    assert torch.allclose(h[:, -1], want, rtol=1e-12)
    assert torch.equal(last, h[:, -1])


@pytest.mark.parametrize("kind", KINDS)
def test_any_split_continues_the_sequence(kind: str) -> None:
    given = inputs(kind, 40, torch.float64, factor=True)
    whole, final = complex_scan(**given)  # type: ignore[arg-type]
    state, parts = given["state"], []
    for start, end in ((0, 1), (1, 4), (4, 33), (33, 40)):
        piece = {
            n: t[:, start:end] if t is not None and t.shape[:2] == (B, 40) else t
            for n, t in given.items()
        }
        part, state = complex_scan(**{**piece, "state": state})  # type: ignore[arg-type]
        parts.append(part)
    assert state is not None
    assert torch.allclose(torch.cat(parts, 1), whole, rtol=1e-10, atol=1e-12)
    assert torch.allclose(state, final, rtol=1e-10, atol=1e-12)
