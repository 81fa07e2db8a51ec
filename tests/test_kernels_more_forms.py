"""Chunked forms of the pre-read, the delta rule per channel and diagonal plus low rank.

Each against its definition.

Outputs, final states and every gradient, as norms of differences over norms: 1e-10 in float64, far
above its rounding and far below a mistake in a formula; 1e-5 in float32, about 100 times its
rounding for sums of up to 130 terms in another order. What cancels may differ by a few units in the
last place of the numbers that cancel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mendel.kernels.backend import use_backend
from mendel.kernels.delta_rule import delta_rule
from mendel.kernels.diagonal_low_rank import diagonal_low_rank
from mendel.kernels.preread import matrix_state_preread

B, H, K, V = 2, 3, 8, 6
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
Inputs = dict[str, Tensor | None]
OPS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "preread": matrix_state_preread,
    "delta_rule": delta_rule,
    "low_rank": diagonal_low_rank,
}
CASES = [
    *(("preread", form) for form in ("none", "fixed", "scalar", "vector")),
    ("delta_rule", "vector"),
    ("low_rank", "vector"),
]
DECAYING = [case for case in CASES if case[1] != "none"]


def decay(kind: str, shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    """Log-decays: between 0 and -1, none forgotten, all forgotten, and both in one sequence."""
    if kind == "usual":
        return -torch.rand(shape, generator=g, dtype=torch.float64)
    lost = torch.rand(shape, generator=g) < {"kept": 0.0, "lost": 1.0, "mixed": 0.15}[kind]
    return torch.where(lost, -1e4, 0.0 if kind == "kept" else -0.01).double()


def inputs(op: str, form: str, tokens: int, kind: str = "usual") -> Inputs:
    g = torch.Generator().manual_seed(tokens)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    shapes = {"fixed": (H,), "scalar": (B, tokens, H), "vector": (B, tokens, H, K)}
    found: Inputs = {
        "q": normal(B, tokens, H, K),
        "k": normal(B, tokens, H, K),
        "v": normal(B, tokens, H, V),
        "log_decay": decay(kind, shapes[form], g) if form in shapes else None,
        "state": normal(B, H, K, V),
    }
    if op == "preread":
        found["bonus"] = normal(H, K)
    elif op == "low_rank":
        unit = F.normalize(normal(B, tokens, H, K), dim=-1)
        found["a"] = -unit
        found["b"] = unit * torch.rand((B, tokens, H, K), generator=g, dtype=torch.float64)
    else:
        assert found["k"] is not None
        found["k"] = F.normalize(found["k"], dim=-1)
        found["beta"] = torch.rand((B, tokens, H), generator=g, dtype=torch.float64)
    return found


def cast(given: Inputs, dtype: torch.dtype) -> Inputs:
    return {name: None if t is None else t.to(dtype) for name, t in given.items()}


def with_gradients(op: str, given: Inputs, backend: Any) -> dict[str, Tensor]:
    leaves = {name: None if t is None else t.clone().requires_grad_() for name, t in given.items()}
    with use_backend(backend):
        out, final = OPS[op](**leaves)
    g = torch.Generator().manual_seed(99)
    loss = torch.zeros((), dtype=out.dtype)
    for t in (out, final):
        weight = torch.randn(t.shape, generator=g, dtype=torch.float64).to(t.dtype)
        loss = loss + (t * weight).sum()
    loss.backward()
    found = {"out": out.detach(), "final": final.detach()}
    for name, leaf in leaves.items():
        if leaf is not None:
            found["d" + name] = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
    return found


def assert_close(found: dict[str, Tensor], right: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == right.keys()
    for name, want in right.items():
        have = found[name]
        assert have.shape == want.shape, name
        assert have.dtype == want.dtype, name
        assert have.isfinite().all(), f"{name} is not finite"
        rounding = 20 * torch.finfo(want.dtype).eps * want.numel() ** 0.5
        error = (have - want).norm().item()
        assert error <= tolerance * want.norm().item() + rounding, f"{name}: off by {error:.1e}"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("tokens", [1, 2, 31, 33, 64, 130])
@pytest.mark.parametrize(("op", "form"), CASES)
def test_equals_definition(op: str, form: str, tokens: int, dtype: torch.dtype) -> None:
    given = cast(inputs(op, form, tokens), dtype)
    for start in (given, {**given, "state": None}):
        assert_close(
            with_gradients(op, start, "chunked"),
            with_gradients(op, start, "definition"),
            TOLERANCE[dtype],
        )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("kind", ["kept", "lost", "mixed"])
@pytest.mark.parametrize(("op", "form"), DECAYING)
def test_extreme_decays(op: str, form: str, kind: str, dtype: torch.dtype) -> None:
    """Nothing forgotten, everything forgotten, and both: no infinity, no loss of digits."""
    given = cast(inputs(op, form, 70, kind), dtype)
    assert_close(
        with_gradients(op, given, "chunked"),
        with_gradients(op, given, "definition"),
        TOLERANCE[dtype],
    )


@pytest.mark.parametrize(("op", "form"), CASES)
def test_any_split_continues_the_sequence(op: str, form: str) -> None:
    tokens = 75
    given = inputs(op, form, tokens)
    whole, final = OPS[op](**given)
    for cuts in ((1, 2, 40), (32, 64), tuple(range(1, tokens))):
        state, parts = given["state"], []
        for start, end in zip((0, *cuts), (*cuts, tokens), strict=True):
            piece = {
                name: t[:, start:end] if t is not None and t.shape[:2] == (B, tokens) else t
                for name, t in given.items()
            }
            part, state = OPS[op](**{**piece, "state": state})
            parts.append(part)
        assert state is not None
        assert_close(
            {"out": torch.cat(parts, dim=1), "final": state}, {"out": whole, "final": final}, 1e-10
        )


@pytest.mark.parametrize("tokens", [1, 45])
@pytest.mark.parametrize(("op", "form"), CASES)
def test_bfloat16_inputs(op: str, form: str, tokens: int) -> None:
    """The sums are float32: only the rounding of the output to bfloat16 is lost (2**-9)."""
    given = cast(inputs(op, form, tokens), torch.bfloat16)
    state = inputs(op, form, tokens)["state"]
    assert state is not None
    given["state"] = state.float()
    out, final = OPS[op](**given)
    with use_backend("definition"):
        right, right_final = OPS[op](**cast(given, torch.float32))
    assert out.dtype == torch.bfloat16
    assert_close({"out": out.float()}, {"out": right}, 2**-8)
    assert final.dtype == torch.float32
    assert_close({"final": final}, {"final": right_final}, 1e-5)
