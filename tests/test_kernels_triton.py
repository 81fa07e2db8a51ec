"""The Triton kernels without a GPU: in Triton's interpreter, and compiled for three chips.

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

from mendel.kernels.backend import HAS_TRITON, Unsupported, choose, use_backend
from mendel.kernels.matrix_state import matrix_state

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")

SCRIPT = Path(__file__).with_name("triton_cases.py")


def _names() -> list[str]:
    spec = spec_from_file_location("triton_cases", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return list(module.CASES)


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
    fixed decay over all tokens: it loses one digit more.
    """
    for part, error in _errors()[case].items():
        assert math.isfinite(error), part
        assert error < (1e-4 if part == "dlog_decay" else 1e-5), part


def _compile(kernel: Any, capability: int, types: dict[str, str], constants: dict[str, Any]) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {
        name: "constexpr"
        if name in constants
        else types.get(name, "*bf16" if name.endswith("_ptr") else "i32")
        for name in kernel.arg_names
    }
    return triton.compile(
        ASTSource(kernel, signature, constexprs=constants),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": 4, "num_stages": 2},
    )


SHARED_KIB = {80: 163, 90: 227, 100: 227}
"""The shared memory that one program may take (CUDA programming guide, table of capabilities)."""
MATRIX_INSTRUCTION = {80: "mma.sync", 90: "wgmma", 100: "tcgen05.mma"}


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("name", ["_states", "_outputs", "_gradients"])
def test_compiles_with_tensor_cores(name: str, capability: int) -> None:
    from mendel.kernels import triton_matrix_state as module

    constants: dict[str, Any] = {
        "K": 128, "V": 128, "C": 64, "TILE_K": 64, "TILE_V": 64, "DECAY": True,
    }  # fmt: skip
    if name == "_states":
        constants |= {"START": True, "REVERSE": True}
    floats = ("prefix_ptr", "start_ptr", "last_ptr", "dprefix_ptr")
    types = {"scale": "fp32", **dict.fromkeys(floats, "*fp32")}
    compiled = _compile(getattr(module, name), capability, types, constants)
    assert len(compiled.asm["cubin"]) > 0
    assert MATRIX_INSTRUCTION[capability] in compiled.asm["ptx"]
    assert compiled.metadata.shared <= SHARED_KIB[capability] * 1024


def test_the_default_of_a_gpu() -> None:
    assert choose("matrix_state", "cuda", "scalar") == "triton"
    assert choose("matrix_state", "cuda", "vector") == "chunked"
    assert choose("short_conv", "cuda") == "chunked"


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
    with (
        use_backend("triton"),
        pytest.raises(Unsupported, match="matrix_state with decay vector.*it has no kernel"),
    ):
        matrix_state(x, x, x, -x.abs())


def test_limits_of_the_kernels() -> None:
    from mendel.kernels import triton_common

    with pytest.raises(Unsupported, match="K is at most 256, not 320"):
        triton_common.check_width("matrix_state", K=320, V=64)
    with pytest.raises(Unsupported, match="not float64"):
        triton_common.common_dtype("matrix_state", torch.zeros(1, dtype=torch.float64))
