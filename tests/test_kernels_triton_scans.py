"""Triton kernels of the scans without a GPU: diagonal, complex, selective; interpreted, compiled.

The method is that of `test_kernels_triton.py`.
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from offsets import wrapping_offsets

from mendel.kernels.backend import HAS_TRITON, Unsupported, choose, use_backend
from mendel.kernels.complex_scan import complex_scan
from mendel.kernels.selective_scan import selective_scan

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")

SCRIPT = Path(__file__).with_name("triton_scan_cases.py")


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


@pytest.mark.parametrize("op", ["diagonal_scan", "complex_scan", "selective_scan"])
def test_equals_definition(op: str) -> None:
    """States or outputs, the last state, gradients: 1e-5 in float32, a hundred roundings of 6e-8.

    In float16 the definition gets the same rounded inputs and computes in float32; results are
    rounded to 2**-11 (5e-4): 2e-3, a few of these.
    """
    found = {name: errors for name, errors in _errors().items() if name.startswith(op)}
    assert len(found) >= 6
    for name, errors in found.items():
        bound = 2e-3 if name.endswith("float16") else 1e-5
        for part, error in errors.items():
            assert math.isfinite(error), (name, part)
            assert error < bound, (name, part)


SHARED_KIB = {80: 163, 90: 227, 100: 227}
FLOAT32 = (
    *("log_a", "angle", "factor", "start", "last", "dlog_a", "dangle", "dfactor", "dlast"),
    *("dstart", "dt", "a", "states", "starts", "ahead", "ddt", "da", "db", "dc", "written"),
    "total",
)
"""Pointers to float32; all others are to the dtype of the inputs."""
WALK: dict[str, Any] = {"TILE_T": 16, "TILE_D": 32}
TURNED: dict[str, Any] = {**WALK, "FIXED": False, "TURN": True}
STILL: dict[str, Any] = {**WALK, "FIXED": True, "TURN": True}
TILE: dict[str, Any] = {"TILE_T": 8, "HIGH": 4, "LOW": 4, "TILE_D": 32}
BACK: dict[str, Any] = {"TILE_T": 8, "HIGH": 2, "LOW": 8, "TILE_D": 64, "CHUNK": 64}

KERNELS: list[tuple[str, str, dict[str, Any]]] = [
    ("diagonal_scan", "_forward", {**WALK, "FIXED": False}),
    ("diagonal_scan", "_backward", {**WALK, "FIXED": False}),
    ("complex_scan", "_forward", TURNED),
    ("complex_scan", "_backward", STILL),
    ("selective_scan", "_forward", {**TILE, "CHUNK": 64}),
    ("selective_scan", "_ends", {**TILE, "REVERSE": True}),
    ("selective_scan", "_backward", BACK),
]
OTHERS: list[tuple[str, str, dict[str, Any]]] = [
    ("diagonal_scan", "_forward", {**WALK, "TILE_T": 1, "FIXED": True, "start_ptr": None}),
    ("diagonal_scan", "_backward", {**WALK, "FIXED": True, "start_ptr": None}),
    ("complex_scan", "_forward", {**STILL, "TILE_T": 4, "factor_ptr": None, "start_ptr": None}),
    ("complex_scan", "_backward", {**TURNED, "factor_ptr": None, "dfactor_ptr": None}),
    ("selective_scan", "_forward", {**TILE, "TILE_T": 1, "CHUNK": 64, "states_ptr": None}),
    ("selective_scan", "_ends", {**TILE, "REVERSE": False}),
]
"""Short tiles, and what is absent: on one chip."""
COMPILED = [*((*case, chip) for case in KERNELS for chip in (80, 90, 100))]
COMPILED += [(*case, 90) for case in OTHERS]


def _compile(module: str, name: str, constants: dict[str, Any], capability: int) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(import_module(f"mendel.kernels.triton_{module}"), name)
    types = {f"{p}_ptr": "*fp32" for p in FLOAT32}
    if module != "selective_scan":
        types["db_ptr"] = "*bf16"
    signature = {
        argument: "constexpr"
        if argument in constants
        else types.get(argument, "*bf16" if argument.endswith("_ptr") else "i32")
        for argument in kernel.arg_names
    }
    # Torch's allocations begin at multiples of 16 bytes, which a launch tells the compiler.
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, argument in enumerate(kernel.arg_names)
        if argument.endswith("_ptr") and argument not in constants
    }
    warps = {"_backward": 8}.get(name, 4) if module == "selective_scan" else 1
    return triton.compile(
        ASTSource(kernel, signature, constexprs=constants, attrs=aligned),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": warps},
    )


@pytest.mark.parametrize(("module", "name", "constants", "capability"), COMPILED)
def test_compiles(module: str, name: str, constants: dict[str, Any], capability: int) -> None:
    """A walk from token to token exchanges nothing between threads: the scans without a sum over
    states have no shuffle, no barrier and no shared memory."""
    compiled = _compile(module, name, constants, capability)
    assert len(compiled.asm["cubin"]) > 0
    assert compiled.metadata.shared <= SHARED_KIB[capability] * 1024
    assert wrapping_offsets(compiled.asm["ttir"]) == []
    exchanges = len(re.findall(r"shfl\.sync|bar\.sync", compiled.asm["ptx"]))
    if module != "selective_scan":
        assert exchanges == 0
        assert compiled.metadata.shared == 0
    elif name == "_forward" and constants["TILE_T"] == 8:
        # The sum over the 4 threads of a channel's states, 2 for each of 8 tokens; barriers where
        # inputs and outputs change threads.
        assert compiled.asm["ptx"].count("shfl.sync") == 16


BAD = """
import triton
import triton.language as tl

@triton.jit
def product(x_ptr, T, D, C: tl.constexpr):
    tl.store(x_ptr + tl.program_id(0) * T * D + tl.arange(0, C), 0.0)

@triton.jit
def constant(x_ptr, T, D, C: tl.constexpr):
    spot = tl.program_id(0) * 65536 + tl.arange(0, C)
    tl.store(x_ptr + spot.to(tl.int64), 0.0)

@triton.jit
def carried(x_ptr, T, D, C: tl.constexpr):
    spot = 0
    for _ in range(T):
        tl.store(x_ptr + spot + tl.arange(0, C), 0.0)
        spot += D

@triton.jit
def wide(x_ptr, T, D, C: tl.constexpr):
    tl.store(x_ptr + tl.program_id(0).to(tl.int64) * T * D + tl.arange(0, C), 0.0)
"""


@pytest.mark.parametrize("name", ["product", "constant", "carried", "wide"])
def test_wrapping_offsets_are_seen(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    (tmp_path / "bad_kernels.py").write_text(BAD)
    monkeypatch.syspath_prepend(tmp_path)
    kernel = getattr(import_module("bad_kernels"), name)
    signature = {"x_ptr": "*fp32", "T": "i32", "D": "i32", "C": "constexpr"}
    source = ASTSource(kernel, signature, constexprs={"C": 16})
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    assert bool(wrapping_offsets(compiled.asm["ttir"])) == (name != "wide")


def test_the_default_of_a_gpu_and_what_it_does_not_serve() -> None:
    assert choose("complex_scan", "cuda") == "triton"
    assert choose("selective_scan", "cuda", width=16) == "triton"
    assert choose("selective_scan", "cuda", width=300) == "chunked"
    assert choose("selective_scan", "cuda", dtype=torch.float64) == "chunked"
    x = torch.zeros(1, 4, 2)
    with use_backend("triton"):
        with pytest.raises(Unsupported, match=r"selective_scan: .* on a CUDA device, not on cpu"):
            selective_scan(x, x, -x[0, :2], x, x)
        with pytest.raises(Unsupported, match=r"complex_scan: .* on a CUDA device, not on cpu"):
            complex_scan(x[0, 0, :1], x[0, 0, :1], x)
