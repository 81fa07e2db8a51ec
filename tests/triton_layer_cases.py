"""The cases of `test_kernels_triton_layers.py`: convolution, norm and loss in Triton's interpreter.

Run by it in a process of its own, as `triton_cases.py` is. Prints one JSON object: per case, the
relative error of both results and of every gradient against the definition.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from interpreter import quick_calls
from poison import poisoned
from torch import Tensor

from mendel.kernels import linear_cross_entropy as loss_module
from mendel.kernels import triton_rms_norm
from mendel.kernels.autotune import Config, use_tuning
from mendel.kernels.backend import use_backend
from mendel.kernels.linear_cross_entropy import linear_cross_entropy
from mendel.kernels.moe_permute import dispatch, permute, unpermute
from mendel.kernels.rms_norm import rms_norm
from mendel.kernels.short_conv import short_conv

Call = Callable[..., tuple[Tensor, Tensor]]
Given = dict[str, Tensor | None]


def conv_inputs(
    tokens: int, width: int, taps: int, bias: bool, start: bool, strided: bool = False
) -> Given:
    x = torch.randn(2, tokens, 2 * width if strided else width)
    return {
        "x": x[:, :, width:] if strided else x,
        "weight": torch.randn(width, taps),
        "bias": torch.randn(width) if bias else None,
        "state": torch.randn(2, width, taps - 1) if start else None,
    }


def norm_inputs(rows: int, width: int, residual: bool, gate: bool, strided: bool = False) -> Given:
    x = torch.randn(2, rows, 2 * width if strided else width)
    return {
        "x": x[..., width:] if strided else x,
        "weight": torch.randn(width),
        "residual": 3 * torch.randn(2, rows, width) if residual else None,
        "gate": torch.randn(2, rows, width) if gate else None,
    }


def loss_inputs(rows: int, width: int, alphabet: int, scaled: bool) -> Given:
    targets = torch.randint(0, alphabet, (2, rows))
    targets[:, ::3] = -100
    return {
        "hidden": torch.randn(2, rows, width),
        "weight": torch.randn(alphabet, width),
        "targets": targets,
        "scale": torch.rand(alphabet) if scaled else None,
    }


def expert_inputs(tokens: int, width: int, top_k: int, dropped: bool) -> Given:
    """Distinct experts of 5, and a sixth that computes nothing where pairs are dropped."""
    choices = torch.rand(tokens, 5 + dropped).argsort(-1)[:, :top_k]
    return {
        "x": torch.randn(tokens, width),
        "weights": torch.rand(tokens, top_k),
        "choices": choices,
        "kept": torch.rand(tokens, top_k) < 0.6 if dropped else None,
    }


def to_experts_and_back(
    x: Tensor, weights: Tensor, choices: Tensor, kept: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The weighted sums of what each expert makes of a token, and the rows."""
    where = dispatch(choices, 5, kept)
    rows = permute(x, where)
    scale = torch.linspace(1, 2, rows.shape[0])[:, None].to(x.dtype)
    return unpermute(rows * scale, weights, where), rows


def mean_loss(**given: Any) -> tuple[Tensor, Tensor]:
    return linear_cross_entropy(**given), torch.zeros(0)


ONLY = sys.argv[1] if len(sys.argv) > 1 else ""
"""Only the cases with this in their name."""

CASES: dict[str, tuple[Call, Callable[[], Given], dict[str, Any]]] = {}
for _tokens, _width, _taps, _bias, _start, _silu in (
    (1, 6, 4, True, True, True),
    (2, 6, 4, True, True, False),
    (2, 6, 4, False, False, True),
    (3, 70, 4, True, True, True),
    (37, 6, 4, True, True, True),
    (33, 70, 3, False, False, False),
    (150, 5, 4, True, False, True),
    (17, 6, 1, True, False, True),
    (20, 6, 8, False, True, True),
):
    CASES[f"short_conv-{_tokens}-{_width}-{_taps}-{_bias}-{_start}-{_silu}"] = (
        short_conv,
        lambda t=_tokens, d=_width, w=_taps, b=_bias, s=_start: conv_inputs(t, d, w, b, s),  # type: ignore[misc]
        {"activation": "silu" if _silu else "none"},
    )
CASES["short_conv-strided"] = (
    short_conv,
    lambda: conv_inputs(19, 10, 4, True, True, strided=True),
    {"activation": "silu"},
)
for _rows, _width, _residual, _gate, _options in (
    (1, 5, False, False, {}),
    (150, 5, False, False, {"eps": 1e-2}),
    (3, 2100, False, False, {}),
    (9, 300, True, False, {}),
    (9, 24, False, True, {}),
    (9, 24, True, True, {"activation": "sigmoid"}),
    (9, 24, True, True, {"gate_first": True}),
    (70, 24, False, True, {"gate_first": True, "activation": "sigmoid"}),
):
    CASES[f"rms_norm-{_rows}-{_width}-{_residual}-{_gate}{''.join(_options)}"] = (
        rms_norm,
        lambda n=_rows, d=_width, r=_residual, g=_gate: norm_inputs(n, d, r, g),  # type: ignore[misc]
        _options,
    )
for _rows, _width, _alphabet, _scaled, _options in (
    (2, 8, 3, False, {}),
    (2, 8, 5000, False, {}),
    (200, 6, 70, True, {}),
    (150, 6, 70, False, {"z_weight": 0.1}),
    (40, 16, 300, True, {"z_weight": 1e-3}),
):
    CASES[f"linear_cross_entropy-{_rows}-{_width}-{_alphabet}-{_scaled}{''.join(_options)}"] = (
        mean_loss,
        lambda n=_rows, d=_width, a=_alphabet, s=_scaled: loss_inputs(n, d, a, s),  # type: ignore[misc]
        _options,
    )
for _rows, _width, _top_k, _dropped in (
    (1, 6, 1, False),
    (1, 6, 2, True),
    (9, 70, 3, False),
    (7, 70, 3, True),
    (5, 6, 4, True),
):
    CASES[f"moe_permute-{_rows}-{_width}-{_top_k}-{_dropped}"] = (
        to_experts_and_back,
        lambda n=_rows, d=_width, k=_top_k, p=_dropped: expert_inputs(n, d, k, p),  # type: ignore[misc]
        {},
    )
CASES["rms_norm-strided"] = (rms_norm, lambda: norm_inputs(40, 6, True, True, True), {})
HALF = frozenset([*CASES][::2])
"""Also in float16: of every operator some, with and without what is optional."""


def run(
    op: Call, given: Given, options: dict[str, Any], backend: Any, dtype: torch.dtype
) -> dict[str, Tensor]:
    leaves = {}
    for name, t in given.items():
        if t is None or not (t.is_floating_point() or t.is_complex()):
            leaves[name] = t
        elif t.is_complex():
            leaves[name] = t.detach().requires_grad_()
        else:
            leaves[name] = t.detach().to(dtype).requires_grad_()
    with use_backend(backend):
        out, final = op(**leaves, **options)
    g = torch.Generator().manual_seed(1)
    loss = (out.float() * torch.randn(out.shape, generator=g)).sum()
    loss = loss + (final.float() * torch.randn(final.shape, generator=g)).sum()
    loss.backward()
    found = {"out": out.detach(), "final": final.detach()}
    for name, t in leaves.items():
        if t is not None and t.requires_grad:
            found["d" + name] = torch.zeros_like(t) if t.grad is None else t.grad
    return found


def error(have: Tensor, want: Tensor) -> float:
    """The norm of the difference over the norm; what is 0 by cancellation may be a rounding."""
    rounding = 20 * torch.finfo(torch.float32).eps * max(want.numel(), 1) ** 0.5
    return ((have.to(want.dtype) - want).norm() / (want.norm() + rounding)).item()


def main() -> None:
    torch.set_num_threads(1)
    quick_calls()
    # Pieces of 128 rows, so that a case has several.
    loss_module.PIECE_BYTES["cpu"] = 1
    # Few programs for the rows' gradients, so that each walks over several tiles of them.
    triton_rms_norm.PROGRAMS = 2
    results: dict[str, dict[str, float]] = {}
    for name, (op, inputs, options) in [c for c in CASES.items() if ONLY in c[0]]:
        torch.manual_seed(0)
        given = inputs()
        for dtype in (torch.float32, torch.float16) if name in HALF else (torch.float32,):
            rounded = {
                n: t.to(dtype) if t is not None and t.is_floating_point() else t
                for n, t in given.items()
            }
            with poisoned(), use_tuning(pins={"rms_norm": Config((256,), 4, 1)}):
                have = run(op, rounded, options, "triton", dtype)
            want = run(op, rounded, options, "definition", torch.float32)
            assert have.keys() == want.keys()
            key = name if dtype == torch.float32 else name + "-float16"
            results[key] = {part: error(have[part], want[part]) for part in want}
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
