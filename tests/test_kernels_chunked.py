"""Every chunked form against its definition: outputs, final states, every gradient.

Tolerances are norms of differences over norms. float64: 1e-10, far above its rounding (1e-16 times
a few hundred operations) and far below any mistake in a formula. float32: 1e-5, about 100 times
its rounding error of 6e-8, for sums of up to 130 terms in another order. What is exactly 0 in the
definition may be the rounding of numbers of order 1 that cancel: a few units in the last place.
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
from mendel.kernels.diagonal_scan import diagonal_scan
from mendel.kernels.matrix_state import decay_form, matrix_state
from mendel.kernels.short_conv import short_conv

LENGTHS = (1, 2, 31, 32, 33, 63, 64, 65, 130)
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
B, H, K, V, D = 2, 3, 8, 6, 5

Inputs = dict[str, Tensor | None]
Op = Callable[..., tuple[Tensor, Tensor]]


def decay(kind: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """Log-decays: between 0 and -1, none forgotten, all forgotten, and both in one sequence."""
    g = torch.Generator().manual_seed(seed)
    if kind == "usual":
        return -torch.rand(shape, generator=g, dtype=torch.float64)
    if kind == "kept":
        return torch.zeros(shape, dtype=torch.float64)
    if kind == "lost":
        return torch.full(shape, -1e4, dtype=torch.float64)
    lost = torch.rand(shape, generator=g) < 0.15
    return torch.where(lost, -1e4, -0.01).double()


def inputs(op: str, form: str, tokens: int, kind: str = "usual", seed: int = 0) -> Inputs:
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    if op == "diagonal_scan":
        return {
            "log_a": decay(kind, (D,) if form == "fixed" else (B, tokens, D), seed),
            "b": normal(B, tokens, D),
            "state": normal(B, D),
        }
    if op == "short_conv":
        taps = int(form)
        return {
            "x": normal(B, tokens, D),
            "weight": normal(D, taps),
            "bias": normal(D),
            "state": normal(B, D, taps - 1),
        }
    shapes = {"fixed": (H,), "scalar": (B, tokens, H), "vector": (B, tokens, H, K)}
    found: Inputs = {
        "q": normal(B, tokens, H, K),
        "k": normal(B, tokens, H, K),
        "v": normal(B, tokens, H, V),
        "log_decay": decay(kind, shapes[form], seed) if form in shapes else None,
        "state": normal(B, H, K, V),
    }
    if op == "delta_rule":
        assert found["k"] is not None
        found["k"] = F.normalize(found["k"], dim=-1)
        found["beta"] = torch.rand((B, tokens, H), generator=g, dtype=torch.float64)
    return found


OPS: dict[str, Op] = {
    "matrix_state": matrix_state,
    "delta_rule": delta_rule,
    "diagonal_scan": diagonal_scan,
    "short_conv": short_conv,
}
CASES = [
    *(("matrix_state", form) for form in ("none", "fixed", "scalar", "vector")),
    *(("delta_rule", form) for form in ("none", "scalar")),
    ("diagonal_scan", ""),
    ("diagonal_scan", "fixed"),
    *(("short_conv", taps) for taps in ("1", "2", "4")),
]


def cast(given: Inputs, dtype: torch.dtype) -> Inputs:
    return {name: None if t is None else t.to(dtype) for name, t in given.items()}


def with_gradients(op: str, given: Inputs, backend: Any, **options: Any) -> dict[str, Tensor]:
    """Output, final state and the gradient of every input, for random output gradients."""
    leaves = {name: None if t is None else t.clone().requires_grad_() for name, t in given.items()}
    with use_backend(backend):
        out, final = OPS[op](**leaves, **options)
    g = torch.Generator().manual_seed(99)
    loss = sum(
        (t * torch.randn(t.shape, generator=g, dtype=torch.float64).to(t.dtype)).sum()
        for t in (out, final)
    )
    assert isinstance(loss, Tensor)
    loss.backward()
    found = {"out": out.detach(), "final": final.detach()}
    for name, t in leaves.items():
        if t is not None:
            found["d" + name] = torch.zeros_like(t) if t.grad is None else t.grad
    return found


def assert_close(found: dict[str, Tensor], right: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == right.keys()
    for name, want in right.items():
        have = found[name]
        assert have.shape == want.shape, name
        assert have.dtype == want.dtype, name
        assert have.isfinite().all(), f"{name} is not finite"
        error = (have - want).norm().item()
        rounding = 20 * torch.finfo(want.dtype).eps * want.numel() ** 0.5
        assert error <= tolerance * want.norm().item() + rounding, f"{name}: off by {error:.1e}"


@pytest.mark.parametrize(
    ("tokens", "dtype"),
    [
        *((tokens, torch.float64) for tokens in LENGTHS),
        *((tokens, torch.float32) for tokens in (1, 33, 130)),
    ],
)
@pytest.mark.parametrize(("op", "form"), CASES)
def test_equals_definition(op: str, form: str, tokens: int, dtype: torch.dtype) -> None:
    given = cast(inputs(op, form, tokens, seed=tokens), dtype)
    for start in (given, {**given, "state": None}):
        assert_close(
            with_gradients(op, start, "chunked"),
            with_gradients(op, start, "definition"),
            TOLERANCE[dtype],
        )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("kind", ["kept", "lost", "mixed"])
@pytest.mark.parametrize(
    ("op", "form"), [c for c in CASES if c[1] in ("fixed", "scalar", "vector", "")]
)
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
    for cuts in ((1, 2, 40), (32, 64), (33, 34, 74), tuple(range(1, tokens))):
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
    if op == "short_conv":
        # Its state is no sum but the last inputs, in whatever dtype these have.
        given["state"] = None
    else:
        given["state"] = inputs(op, form, tokens)["state"].float()  # type: ignore[union-attr]
    out, final = OPS[op](**given)
    with use_backend("definition"):
        right, right_final = OPS[op](**cast(given, torch.float32))
    assert out.dtype == torch.bfloat16
    assert_close({"out": out.float()}, {"out": right}, 2**-8)
    assert final.dtype == (torch.bfloat16 if op == "short_conv" else torch.float32)
    assert_close({"final": final.float()}, {"final": right_final}, 1e-5)


@pytest.mark.parametrize(("op", "form"), CASES)
def test_autocast_changes_nothing(op: str, form: str) -> None:
    for tokens in (1, 40):
        given = cast(inputs(op, form, tokens), torch.float32)
        want, want_final = OPS[op](**given)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            have, final = OPS[op](**given)
        assert torch.equal(have, want)
        assert torch.equal(final, want_final)


@pytest.mark.parametrize("tokens", [1, 40])
def test_conv_options(tokens: int) -> None:
    given = inputs("short_conv", "4", tokens)
    for bias in (given["bias"], None):
        start = {**given, "bias": bias}
        assert_close(
            with_gradients("short_conv", start, "chunked", activation="silu"),
            with_gradients("short_conv", start, "definition", activation="silu"),
            1e-10,
        )


@pytest.mark.parametrize("op", ["matrix_state", "delta_rule"])
def test_scale(op: str) -> None:
    given = inputs(op, "scalar", 40)
    usual, _ = OPS[op](**given)
    plain, _ = OPS[op](**given, scale=1.0)
    torch.testing.assert_close(usual, plain * K**-0.5, rtol=1e-12, atol=1e-12)


def test_inputs_are_left_alone() -> None:
    """The scan writes in place into memory of its own, also where a view would be enough."""
    for op, form in CASES:
        for tokens in (1, 16, 40):
            # One sequence: there a copy into another order of axes is only a view.
            given = {
                n: t if t is None or t.ndim < 2 or n == "weight" else t[:1]
                for n, t in inputs(op, form, tokens).items()
            }
            before = {n: None if t is None else t.clone() for n, t in given.items()}
            OPS[op](**given)
            for name, t in given.items():
                if t is not None:
                    assert torch.equal(t, before[name]), (op, name)


def test_a_decay_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="log_decay is None"):
        decay_form(torch.zeros(B, 4))
