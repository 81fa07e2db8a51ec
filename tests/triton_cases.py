"""The cases of `test_kernels_triton.py`, run by it in a process with Triton's interpreter.

Prints one JSON object: per case, the relative error of the output, the final state and every
gradient against the definition. All memory from `torch.empty` is filled with NaN first, so that a
kernel that leaves an element out is seen. No bfloat16: the interpreter computes it wrongly.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from interpreter import quick_calls
from poison import poisoned
from torch import Tensor
from torch.nn import functional as F

from mendel.kernels import (
    triton_delta_rule,
    triton_matrix_state,
    triton_vector_decay,
)
from mendel.kernels.backend import STEP_TOKENS, use_backend
from mendel.kernels.bench_cases import Case, check
from mendel.kernels.delta_rule import delta_rule
from mendel.kernels.diagonal_low_rank import diagonal_low_rank
from mendel.kernels.diagonal_scan import diagonal_scan
from mendel.kernels.matrix_state import matrix_state
from mendel.kernels.preread import matrix_state_preread

B, H = 2, 2
OPS: dict[str, Any] = {
    "matrix_state": matrix_state,
    "preread": matrix_state_preread,
    "delta_rule": delta_rule,
    "low_rank": diagonal_low_rank,
    "diagonal_scan": diagonal_scan,
}
SIZES = {"small": (8, 6), "tiled": (72, 80), "halves": (16, 16)}
"""K and V. A sequence of `halves` is one chunk of 64: blocks of 32 are cut in halves."""

CASES: dict[str, tuple[str, str, int, str, bool]] = {
    f"{op}-{decay}-{tokens}-{size}-{'state' if start else 'fresh'}": (
        op,
        decay,
        tokens,
        size,
        start,
    )
    for op, decay, tokens, size, start in (
        ("matrix_state", "none", 1, "small", True),
        ("matrix_state", "none", 40, "small", False),
        ("matrix_state", "none", 33, "tiled", True),
        ("matrix_state", "fixed", 17, "small", True),
        ("matrix_state", "fixed", 32, "small", False),
        ("matrix_state", "scalar", 1, "tiled", True),
        ("matrix_state", "fixed", 1, "small", True),
        ("matrix_state", "scalar", 3, "small", False),
        ("matrix_state", "scalar", 2, "small", True),
        ("matrix_state", "scalar", 49, "small", True),
        ("matrix_state", "scalar", 17, "tiled", True),
        ("matrix_state", "forgetting", 40, "small", True),
        ("matrix_state", "vector", 1, "small", True),
        ("matrix_state", "vector", 3, "small", False),
        ("matrix_state", "vector", 33, "small", True),
        ("matrix_state", "vector", 17, "tiled", True),
        ("matrix_state", "strong", 65, "halves", True),
        ("matrix_state", "forgetting-vector", 40, "small", False),
        ("preread", "none", 1, "small", False),
        ("preread", "fixed", 1, "small", True),
        ("preread", "scalar", 3, "small", True),
        ("preread", "fixed", 17, "small", True),
        ("preread", "vector", 1, "small", True),
        ("preread", "vector", 33, "small", False),
        ("preread", "vector", 17, "tiled", True),
        ("preread", "forgetting-vector", 49, "small", True),
        ("diagonal_scan", "scalar", 1, "small", True),
        ("diagonal_scan", "scalar", 40, "small", True),
        ("diagonal_scan", "forgetting", 33, "tiled", False),
        ("delta_rule", "none", 1, "small", True),
        ("delta_rule", "scalar", 1, "tiled", True),
        ("delta_rule", "scalar", 3, "small", True),
        ("delta_rule", "none", 40, "small", False),
        ("delta_rule", "scalar", 49, "small", True),
        ("delta_rule", "scalar", 17, "tiled", True),
        ("delta_rule", "forgetting", 40, "small", False),
        ("delta_rule", "scalar", 65, "halves", True),
        ("delta_rule", "vector", 1, "small", True),
        ("delta_rule", "vector", 2, "small", False),
        ("delta_rule", "vector", 33, "small", True),
        ("delta_rule", "vector", 17, "tiled", True),
        ("delta_rule", "strong", 40, "small", False),
        ("delta_rule", "forgetting-vector", 40, "small", True),
        ("delta_rule", "alike", 65, "halves", True),
        ("low_rank", "vector", 1, "tiled", True),
        ("low_rank", "vector", 2, "small", True),
        ("low_rank", "vector", 33, "small", True),
        ("low_rank", "vector", 17, "tiled", False),
        ("low_rank", "strong", 65, "halves", True),
        ("low_rank", "forgetting-vector", 40, "small", False),
    )
}
DECODED = [f"{name}-decoded" for name, case in CASES.items() if case[2] <= STEP_TOKENS]
"""The cases of few tokens, again without gradients: the kernel that decodes."""
FLOAT16: dict[str, tuple[str, str | None]] = {
    "matrix_state-float16": ("matrix_state", "scalar"),
    "matrix_state-vector-float16": ("matrix_state", "vector"),
    "matrix_state-preread-float16": ("matrix_state", "preread"),
    "delta_rule-float16": ("delta_rule", None),
    "delta_rule-vector-float16": ("delta_rule", "vector"),
    "low_rank-float16": ("delta_rule", "diagonal-low-rank"),
    "diagonal_scan-float16": ("diagonal_scan", None),
}
HALF = list(FLOAT16)
"""The kernels' half-precision paths, against the definition in float32 of the same inputs."""


def unit(x: Tensor) -> Tensor:
    return F.normalize(x, dim=-1)


def inputs(op: str, decay: str, tokens: int, size: str, start: bool) -> dict[str, Tensor | None]:
    key_width, value_width = SIZES[size]
    if op == "diagonal_scan":
        b = torch.randn(B, tokens, key_width)
        forget = torch.rand(b.shape) < 0.2
        return {
            "log_a": torch.where(forget, -1e4, -0.01) if decay == "forgetting" else -b.abs(),
            "b": b,
            "state": torch.randn(B, key_width) if start else None,
        }
    g = {
        "none": None,
        "fixed": -torch.rand(H),
        "scalar": -torch.rand(B, tokens, H),
        "forgetting": torch.where(torch.rand(B, tokens, H) < 0.2, -1e4, -0.01),
        "vector": -torch.rand(B, tokens, H, key_width),
        "alike": -0.01 * torch.rand(B, tokens, H, key_width),
        "strong": -60 * torch.rand(B, tokens, H, key_width),
        "forgetting-vector": torch.where(torch.rand(B, tokens, H, key_width) < 0.2, -1e4, -0.01),
    }[decay]
    found: dict[str, Tensor | None] = {
        "q": torch.randn(B, tokens, H, key_width),
        # Keys that resemble each other are where an inverse in the delta rule loses digits.
        "k": unit(torch.randn(B, tokens, H, key_width) + (3 if decay == "alike" else 0)),
        "v": torch.randn(B, tokens, H, value_width),
        "log_decay": g,
        "state": torch.randn(B, H, key_width, value_width) if start else None,
    }
    if op == "preread":
        found["bonus"] = torch.randn(H, key_width)
    if op == "low_rank":
        direction = unit(torch.randn(B, tokens, H, key_width))
        found["a"] = -direction
        found["b"] = direction * torch.rand(direction.shape)
    if op == "delta_rule":
        found["beta"] = torch.rand(B, tokens, H)
    return found


def run(op: str, given: dict[str, Tensor | None], backend: Any) -> dict[str, Tensor]:
    leaves = {n: None if t is None else t.clone().requires_grad_() for n, t in given.items()}
    with use_backend(backend):
        out, final = OPS[op](**leaves)
    g = torch.Generator().manual_seed(1)
    loss = (out * torch.randn(out.shape, generator=g)).sum()
    loss = loss + (final * torch.randn(final.shape, generator=g)).sum()
    loss.backward()
    found = {"out": out.detach(), "final": final.detach()}
    for name, t in leaves.items():
        if t is not None:
            found["d" + name] = torch.zeros_like(t) if t.grad is None else t.grad
    return found


def error(have: Tensor, want: Tensor) -> float:
    """The norm of the difference over the norm; what is 0 by cancellation may be a rounding."""
    rounding = 20 * torch.finfo(torch.float32).eps * want.numel() ** 0.5
    return ((have - want).norm() / (want.norm() + rounding)).item()


def main() -> None:
    torch.set_num_threads(1)
    quick_calls()
    # Short chunks, so that a short sequence has several and the last is not full.
    kernels = (triton_matrix_state, triton_delta_rule, triton_vector_decay)
    results = {}
    for name, (op, decay, tokens, size, start) in CASES.items():
        torch.manual_seed(tokens)
        given = inputs(op, decay, tokens, size, start)
        for module in kernels:
            module.CHUNK = 64 if size == "halves" else 16
        triton_vector_decay.CHUNK_FLOAT32 = triton_vector_decay.CHUNK
        with poisoned():
            have = run(op, given, "triton")
        want = run(op, given, "definition")
        results[name] = {part: error(have[part], want[part]) for part in want}
        if tokens <= STEP_TOKENS:
            with torch.no_grad(), poisoned(), use_backend("triton"):
                out, final = OPS[op](**given)
            results[name + "-decoded"] = {
                "out": error(out, want["out"]),
                "final": error(final, want["final"]),
            }
    for name, (op, form) in FLOAT16.items():
        case = Case(op, form, 1, 65, 2, 24, torch.float16)
        with poisoned():
            results[name] = check(case, "triton", "cpu")
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
