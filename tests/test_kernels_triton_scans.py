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
from compiled import SHARED_KIB, compiled, parsed
from compiled_launches import source
from offsets import wrapping_offsets

from mendel.kernels.backend import HAS_TRITON, Unsupported, choose, use_backend
from mendel.kernels.complex_scan import complex_scan
from mendel.kernels.launches import CHOICES
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


WALK: dict[str, Any] = {"TILE_T": 16, "TILE_D": 32}
TURNED: dict[str, Any] = {**WALK, "FIXED": False, "TURN": True}
STILL: dict[str, Any] = {**WALK, "FIXED": True, "TURN": True}
TILE: dict[str, Any] = {"TILE_T": 8, "HIGH": 4, "LOW": 4, "TILE_D": 32}

OTHERS: list[tuple[str, str, dict[str, Any]]] = [
    ("diagonal_scan", "_forward", {**WALK, "TILE_T": 1, "FIXED": True, "start_ptr": None}),
    ("diagonal_scan", "_backward", {**WALK, "FIXED": True, "start_ptr": None}),
    ("complex_scan", "_forward", {**STILL, "TILE_T": 4, "factor_ptr": None, "start_ptr": None}),
    ("complex_scan", "_backward", {**TURNED, "factor_ptr": None, "dfactor_ptr": None}),
    ("selective_scan", "_forward", {**TILE, "TILE_T": 1, "CHUNK": 64, "states_ptr": None}),
    ("selective_scan", "_ends", {**TILE, "REVERSE": True}),
]
"""Short tiles, and what is absent."""


@pytest.mark.parametrize(("module", "name", "constants"), OTHERS)
def test_compiles(module: str, name: str, constants: dict[str, Any]) -> None:
    options = {"num_warps": 4 if module == "selective_scan" else 1}
    found = compiled(parsed(module, name, constants), options, 90)
    assert len(found.asm["cubin"]) > 0
    assert found.metadata.shared <= SHARED_KIB[90] * 1024
    assert wrapping_offsets(found.asm["ttir"]) == []


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize(
    ("name", "i"), [("diagonal_scan", 0), ("diagonal_scan", 1), ("complex_scan", 0),
                    ("complex_scan", 1), ("selective_scan.forward", 0)],
)  # fmt: skip
def test_a_walk_exchanges_nothing(name: str, i: int, capability: int) -> None:
    """From token to token nothing goes between threads: the scans without a sum over states have
    no shuffle, no barrier and no shared memory."""
    made, options = source(name, i, CHOICES[name].configs[0])
    found = compiled(made, options, capability)
    if name == "selective_scan.forward":
        # The sum over the 4 threads of a channel's states, 2 for each of 8 tokens; barriers where
        # inputs and outputs change threads.
        assert found.asm["ptx"].count("shfl.sync") == 16
        return
    assert re.search(r"shfl\.sync|bar\.sync", found.asm["ptx"]) is None
    assert found.metadata.shared == 0


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
