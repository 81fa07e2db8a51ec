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
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
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


SHARED_KIB = {80: 163, 90: 227, 100: 227}

FLOAT32 = ("sums", "losses")
"""Pointers to float32; all others are to the dtype of the inputs."""
SHAPES = {"TILE_T": 16, "TILE_D": 64, "W": 4}
CONV: dict[str, Any] = {**SHAPES, "BIAS": True, "START": True, "SILU": True}
BARE: dict[str, Any] = {**SHAPES, "BIAS": False, "START": False, "SILU": False}
ABSENT = {"bias_ptr": None, "state_ptr": None}

NORM: dict[str, Any] = {"ROWS": 1, "FULL_D": 4096, "GATE": True, "SILU": True, "FIRST": False}
HEADS: dict[str, Any] = {**NORM, "ROWS": 16, "FULL_D": 128, "GATE": False, "gate_ptr": None}
PAIRS: dict[str, Any] = {"K": 6, "FULL_K": 8, "TILE_D": 1024}
COPIES = {f"{p}_ptr": None for p in ("weights", "y", "dots")}

KERNELS: list[tuple[str, str, dict[str, Any]]] = [
    ("short_conv", "_forward", CONV),
    ("short_conv", "_backward", {**CONV, "WALK": 8}),
    ("rms_norm", "_forward", {**NORM, "RESIDUAL": True}),
    ("rms_norm", "_backward", {**NORM, "CARRIED": True}),
    ("linear_cross_entropy", "_rows", {"TILE_A": 4096, "GRADIENT": True}),
    ("moe_permute", "_gather_rows", {"K": 6, "TILE_D": 1024}),
    ("moe_permute", "_spread_rows", PAIRS),
]
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
"""What is absent, and other orders: on one chip."""
COMPILED = [*((*case, chip) for case in KERNELS for chip in (80, 90, 100))]
COMPILED += [(*case, 90) for case in OTHERS]


def _compile(
    module: str, name: str, capability: int, constants: dict[str, Any], warps: int, inputs: str
) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(import_module(f"mendel.kernels.triton_{module}"), name)
    types = {
        "eps": "fp32",
        "z_weight": "fp32",
        "targets_ptr": "*i64",
        "back_ptr": "*i64",
        **{f"{p}_ptr": "*fp32" for p in FLOAT32},
    }
    signature = {
        argument: "constexpr"
        if argument in constants
        else types.get(argument, f"*{inputs}" if argument.endswith("_ptr") else "i32")
        for argument in kernel.arg_names
    }
    return triton.compile(
        ASTSource(kernel, signature, constexprs=constants),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": warps, "num_stages": 3},
    )


@pytest.mark.parametrize(("module", "name", "constants", "capability"), COMPILED)
def test_compiles(module: str, name: str, constants: dict[str, Any], capability: int) -> None:
    warps = 8 if constants.get("FULL_D") == 4096 else 4
    compiled = _compile(module, name, capability, constants, warps, "bf16")
    assert len(compiled.asm["cubin"]) > 0
    assert compiled.metadata.shared <= SHARED_KIB[capability] * 1024
    assert wrapping_offsets(compiled.asm["ttir"]) == []


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
