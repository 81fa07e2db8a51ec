"""The Triton kernels without a GPU: in Triton's interpreter, and compiled without what is optional.

`test_launches.py` compiles them with all of it.

The interpreter must be switched on before the kernels are decorated, so it runs in a process of its
own (`triton_cases.py`). It says nothing of bfloat16, of speed, or of races between threads.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from functools import cache
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
import torch
from compiled import SHARED_KIB, compiled, parsed
from offsets import wrapping_offsets

from mendel.kernels.backend import HAS_TRITON, Unsupported, choose, use_backend
from mendel.kernels.bench_cases import FORMS, Case, function_of, pinned
from mendel.kernels.long_conv import long_conv
from mendel.kernels.matrix_state import matrix_state

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")

SCRIPT = Path(__file__).with_name("triton_cases.py")


def _names() -> list[str]:
    spec = spec_from_file_location("triton_cases", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return [*module.CASES, *module.DECODED, *module.HALF]


@cache
def _errors() -> dict[str, dict[str, float]]:
    ran = subprocess.run(
        [sys.executable, str(SCRIPT)],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    found: dict[str, dict[str, float]] = json.loads(ran.stdout)
    return found


@pytest.mark.parametrize("case", _names() if HAS_TRITON else [])
def test_equals_definition(case: str) -> None:
    """Output, final state, gradients in float32: 1e-5, a hundred roundings of 6e-8.

    The gradient of a decay is a sum of differences (of q.dq and k.dk) that nearly cancel, with a
    fixed decay over all tokens: it loses one digit more. In float16 every tile is rounded to 2**-11
    (5e-4) before it is multiplied: 4e-3, a few of these.
    """
    for part, error in _errors()[case].items():
        assert math.isfinite(error), part
        if case.endswith("float16"):
            assert error < 4e-3, part
        else:
            assert error < (1e-4 if part == "dlog_decay" else 1e-5), part


WIDE: dict[str, Any] = {"K": 128, "V": 128, "C": 64, "DECAY": True}
TILES = {"TILE_K": 64, "TILE_V": 64}
WALK = {"FULL_K": 128, "TILE_V": 32, "START": True}
VECTOR: dict[str, Any] = {"K": 128, "V": 128, "C": 64, "TILE_V": 64}
INSIDE: dict[str, Any] = {**VECTOR, "LEVELS": 6, "TILE_K": 16}
HALVES: dict[str, Any] = {**INSIDE, "READ": True}
SOLVE: dict[str, Any] = {**WIDE, **TILES, "LEVELS": 6, "PRECISION": "tf32"}
ACROSS = {"K": 128, "V": 128, "C": 64, "FULL_K": 128, "TILE_V": 32}
SHORT = {"C": 16, "LEVELS": 4, "K": 64, "V": 64, "H": 1, "N": 1}
"""One chunk of one head, short: these kernels take long to compile."""
STEP = {"T": 3, "K": 128, "V": 128, "FULL_K": 128, "TILE_V": 32}
NO_STEP = {f"{p}_ptr": None for p in ("a", "b", "beta", "bonus", "log_decay", "state")}
FIRST = {"DECAY": False, "prefix_ptr": None, "H": 1, "N": 1}
"""What a launch turns into constants: one head, one chunk, no decay."""

SLOW = ("vector_decay", "low_rank", "low_rank_solve", "delta_solve")
"""Modules whose products by halves take long to compile: on the chip with the least memory."""
PLAIN: list[tuple[str, str, dict[str, Any]]] = [
    (
        "matrix_state",
        "_states",
        {**WIDE, **TILES, **FIRST, "START": False, "start_ptr": None, "REVERSE": False},
    ),
    ("matrix_state", "_outputs", {**WIDE, **TILES, **FIRST}),
    ("matrix_state", "_gradients", {**WIDE, **TILES, **FIRST}),
    ("delta_rule", "_delta_states", {**WIDE, **WALK, **FIRST, "START": False, "start_ptr": None}),
    ("delta_rule", "_delta_gradients", {**WIDE, **WALK, **FIRST}),
    ("delta_solve", "_solve", {**SOLVE, **SHORT, "DECAY": False, "prefix_ptr": None}),
    ("delta_solve", "_solve_gradients", {**SOLVE, **SHORT, "DECAY": False, "prefix_ptr": None}),
    ("vector_decay", "_decayed", {"K": 128, "C": 64, "TILE_K": 64, "END": False, "PRE": True}),
    ("vector_decay", "_outputs", {**HALVES, **SHORT, "PRE": False, "bonus_ptr": None}),
    ("vector_decay", "_gradients", {**HALVES, **SHORT, "PRE": False, "bonus_ptr": None}),
    ("low_rank_solve", "_solve", {**INSIDE, **SHORT, "k_ptr": None, "PRECISION": "tf32x3"}),
    ("low_rank", "_direct", {**INSIDE, **SHORT}),
    (
        "low_rank",
        "_low_rank_states",
        {**ACROSS, "H": 1, "N": 1, "late_k_ptr": None, "start_ptr": None},
    ),
    (
        "low_rank_solve",
        "_solve_gradients",
        {**INSIDE, **SHORT, "k_ptr": None, "dk_ptr": None, "PRECISION": "tf32x3"},
    ),
    ("step", "_step", {**STEP, "DECAY": 4}),
    ("step", "_step", {**STEP, **NO_STEP, "T": 1, "DECAY": 0}),
]  # fmt: skip


@pytest.mark.parametrize(("module", "name", "constants"), PLAIN)
def test_compiles_with_what_a_launch_makes_constant(
    module: str, name: str, constants: dict[str, Any]
) -> None:
    capability = 80 if module in SLOW else 90
    options = {"num_warps": 4, "num_stages": 1}
    found = compiled(parsed(module, name, constants), options, capability)
    assert len(found.asm["cubin"]) > 0
    assert found.metadata.shared <= SHARED_KIB[capability] * 1024
    assert wrapping_offsets(found.asm["ttir"]) == []


def test_the_default_of_a_gpu() -> None:
    assert choose("matrix_state", "cuda", "scalar") == "triton"
    assert choose("matrix_state", "cuda", "vector") == "triton"
    assert choose("delta_rule", "cuda", "diagonal-low-rank") == "triton"
    assert choose("long_conv", "cuda") == "chunked"
    assert choose("short_conv", "cuda") == "triton"
    assert choose("short_conv", "cuda", "wide") == "chunked"
    assert choose("matrix_state", "cuda", "none", width=273) == "chunked"
    assert choose("delta_rule", "cuda", dtype=torch.float64) == "chunked"


@pytest.mark.parametrize(
    ("width", "dtype", "reason"),
    [
        (8, torch.float32, "tensors are on a CUDA device, not on cpu"),
        (8, torch.float64, "tensors are on a CUDA device, not on cpu"),
    ],
)
def test_what_the_kernels_do_not_serve(width: int, dtype: torch.dtype, reason: str) -> None:
    x = torch.zeros(1, 4, 2, width, dtype=dtype)
    with use_backend("triton"), pytest.raises(Unsupported, match=reason) as caught:
        matrix_state(x, x, x)
    assert caught.value.others == ("definition", "chunked")
    with use_backend("triton"), pytest.raises(Unsupported, match=r"long_conv.*it has no kernel"):
        long_conv(x[:, :, 0], x[0, :, 0])


@pytest.mark.parametrize(("op", "form"), FORMS)
def test_every_kernel_refuses_and_says_who_serves(
    op: str, form: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors of a CPU, float64 and too wide heads: the reason, and the backends that do serve."""
    import triton

    size = {"selective_scan": 4, "linear_cross_entropy": 9, "moe_permute": 2}.get(op, 0)

    def refused(reason: str, width: int, dtype: torch.dtype, size: int = size) -> None:
        case = Case(op, form, 1, 5, 2, width, dtype, size)
        with pytest.raises(Unsupported, match=reason) as caught:
            pinned(function_of(case), "triton")(**case.inputs("cpu"))
        assert caught.value.others == ("definition", "chunked")

    refused("tensors are on a CUDA device, not on cpu", 8, torch.bfloat16)
    # Past the check of the device; none of the cases gets as far as a launch.
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    refused("inputs are float32, bfloat16 or float16, not float64", 8, torch.float64)
    if op in ("matrix_state", "delta_rule"):
        refused("K is at most 256, not 264", 264, torch.bfloat16)
    if op == "selective_scan":
        refused("N is at most 256, not 300", 8, torch.bfloat16, 300)


def test_limits_of_the_kernels() -> None:
    from mendel.kernels import triton_common

    with pytest.raises(Unsupported, match="K is at most 256, not 320"):
        triton_common.check_width("matrix_state", K=320, V=64)
    with pytest.raises(Unsupported, match="not float64"):
        triton_common.common_dtype("matrix_state", torch.zeros(1, dtype=torch.float64))
