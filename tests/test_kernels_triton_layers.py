"""Triton kernels of what stands around the mixers, without a GPU: interpreted, and compiled.

Short convolution, RMSNorm, linear cross-entropy, the rows of experts; the method is that of
`test_kernels_triton.py`.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from compiled import SHARED_KIB, compiled, parsed
from offsets import wrapping_offsets

from mendel.kernels.backend import HAS_TRITON, Unsupported, backends, use_backend
from mendel.kernels.rms_norm import rms_norm
from mendel.kernels.short_conv import short_conv
from mendel.primitives.norm import make_norm

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")

SCRIPT = Path(__file__).with_name("triton_layer_cases.py")


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


@pytest.mark.parametrize("op", ["short_conv", "rms_norm", "linear_cross_entropy", "moe_permute"])
def test_equals_definition(op: str) -> None:
    """Outputs, state and gradients: 1e-6 in float32, some tens of roundings of 6e-8.

    In float16 the definition gets the same rounded inputs and computes in float32; results are
    rounded to 2**-11 (5e-4), and where tiles are multiplied the factors too: 2e-3, a few of these.
    A softmax has the roundings of its logits in its exponents: 3e-6 where these are near 20.
    """
    found = {name: errors for name, errors in _errors().items() if name.startswith(op)}
    assert len(found) >= 7
    assert sum(name.endswith("float16") for name in found) >= 2
    for name, errors in found.items():
        exact = 3e-6 if op == "linear_cross_entropy" else 1e-6
        bound = 2e-3 if name.endswith("float16") else exact
        for part, error in errors.items():
            assert math.isfinite(error), (name, part)
            assert error < bound, (name, part)


SHAPES = {"TILE_T": 16, "TILE_D": 64, "W": 4}
BARE: dict[str, Any] = {**SHAPES, "BIAS": False, "START": False, "SILU": False}
ABSENT = {"bias_ptr": None, "state_ptr": None}

NORM: dict[str, Any] = {"ROWS": 1, "FULL_D": 4096, "GATE": True, "SILU": True, "FIRST": False}
HEADS: dict[str, Any] = {**NORM, "ROWS": 16, "FULL_D": 128, "GATE": False, "gate_ptr": None}
PAIRS: dict[str, Any] = {"K": 6, "FULL_K": 8, "TILE_D": 1024}
COPIES = {f"{p}_ptr": None for p in ("weights", "y", "dots")}

OTHERS: list[tuple[str, str, dict[str, Any]]] = [
    ("short_conv", "_forward", {**BARE, **ABSENT}),
    ("short_conv", "_backward", {**BARE, **ABSENT, "WALK": 8, "dstate_ptr": None}),
    ("rms_norm", "_forward", {**NORM, "RESIDUAL": True, "FIRST": True}),
    ("rms_norm", "_forward", {**HEADS, "RESIDUAL": False, "residual_ptr": None, "h_ptr": None}),
    ("rms_norm", "_backward", {**NORM, "CARRIED": True, "FIRST": True}),
    ("rms_norm", "_backward", {**HEADS, "CARRIED": False, "dh_ptr": None, "dgate_ptr": None}),
    ("linear_cross_entropy", "_rows", {"TILE_A": 4096, "GRADIENT": False}),
    ("moe_permute", "_gather_rows", {"K": 6, "TILE_D": 1024, "weights_ptr": None}),
    ("moe_permute", "_spread_rows", {**PAIRS, **COPIES}),
]
"""What is absent, and other orders."""


@pytest.mark.parametrize(("module", "name", "constants"), OTHERS)
def test_compiles(module: str, name: str, constants: dict[str, Any]) -> None:
    warps = 8 if constants.get("FULL_D") == 4096 else 4
    options = {"num_warps": warps, "num_stages": 1}
    found = compiled(parsed(module, name, constants), options, 90)
    assert len(found.asm["cubin"]) > 0
    assert found.metadata.shared <= SHARED_KIB[90] * 1024
    assert wrapping_offsets(found.asm["ttir"]) == []


def test_more_taps_than_the_kernel_unrolls() -> None:
    x = torch.zeros(1, 4, 2)
    with use_backend("triton"):
        with pytest.raises(Unsupported, match=r"short_conv, form wide.*it has no kernel"):
            short_conv(x, torch.zeros(2, 9))
        with pytest.raises(Unsupported, match="on a CUDA device, not on cpu"):
            short_conv(x, torch.zeros(2, 4))


def test_rows_that_no_program_holds() -> None:
    assert "triton" in backends("rms_norm")
    x = torch.zeros(1, 16385)
    with use_backend("triton"):
        with pytest.raises(Unsupported, match=r"rms_norm, form wide.*it has no kernel"):
            rms_norm(x, x[0])
        with pytest.raises(Unsupported, match="on a CUDA device, not on cpu"):
            make_norm("rmsnorm", 16)(x[:, :16])
    with use_backend("flex"):
        assert make_norm("rmsnorm", 16)(x[:, :16]).count_nonzero() == 0
