"""The operators at real sizes on a GPU, where there is one; the same bodies, small, on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import gpu_cases
import pytest
import torch

CASES = Path(__file__).with_name("gpu_cases.py")
ABSENT = {
    *("pytest", "jaxtyping", "beartype", "optuna", "ray", "yaml", "moocore"),
    *("plotly", "dash", "pydantic", "typer", "rich", "safetensors", "psutil", "sqlalchemy"),
}
SESSION = Path(__file__).parent.parent / "benchmarks" / "gpu_session.sh"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("name", list(gpu_cases.cases("cuda")))
def test_on_a_gpu(name: str) -> None:
    dtype, body = gpu_cases.cases("cuda")[name]
    assert gpu_cases.verdict(dtype, body()) is None


@pytest.mark.parametrize("name", list(gpu_cases.cases("cpu")))
def test_the_same_on_the_cpu(name: str) -> None:
    dtype, body = gpu_cases.cases("cpu")[name]
    errors = body()
    assert errors
    assert gpu_cases.verdict(dtype, errors) is None


def test_what_the_gpu_is_asked() -> None:
    names = list(gpu_cases.cases("cuda"))
    assert len(gpu_cases.served("cuda")) >= 12
    for op, form in gpu_cases.served("cuda"):
        for kind in ("small", "real"):
            wanted = f"{kind} {op} {form} bfloat16"
            assert any(name.startswith(wanted) for name in names), wanted
    # In order of weight: half precision at the main width, at real sizes, and decoding come first.
    kinds = [name.split()[0] + name.partition("bfloat16")[1] for name in names]
    first = ("smallbfloat16", "realbfloat16", "decodingbfloat16")
    assert list(dict.fromkeys(kinds))[:3] == list(first)
    assert all(name.endswith("128") for name in names[: kinds.index("realbfloat16")])
    sizes = gpu_cases.SIZES["cuda"]
    assert sizes.rows * 4096 > 2**31
    assert sizes.heads * sizes.long_tokens * 128 > 2**31


def test_a_wrong_case_has_a_verdict() -> None:
    assert (
        gpu_cases.verdict(torch.float32, {"out": 1e-6, "dq": 1e-3}) == "above 0.0001: {'dq': 0.001}"
    )
    assert gpu_cases.verdict(torch.float32, {"out": float("nan")}) is not None


def test_the_runner_without_pytest(tmp_path: Path) -> None:
    """What a bare machine runs, with too little time for all: what is not done is no success."""
    out = tmp_path / "checks.json"
    ran = subprocess.run(
        [sys.executable, str(CASES), "--out", str(out), "--workers", "1", "--seconds", "0"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    rows = json.loads(out.read_text())
    assert ran.returncode == 1, ran.stderr
    assert {row["case"] for row in rows} == set(gpu_cases.cases("cpu"))
    assert "not done in time" in {row["wrong"] for row in rows}
    row = gpu_cases.run("small short_conv None float32 16", "cpu")
    assert row["wrong"] is None
    assert row["errors"].keys() >= {"out", "final", "dx", "dweight", "step out"}


def test_the_session_says_what_it_lacks() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    ran = subprocess.run(
        ["bash", str(SESSION)],
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.returncode == 2
    assert ran.stderr.strip() == "gpu_session: torch sees no CUDA device here"


def test_a_bare_machine_needs_torch_and_triton_alone() -> None:
    """With every package out of reach that the project has and torch has not."""
    code = f"""
import sys
absent = {sorted(ABSENT)!r}
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in absent:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
sys.path.insert(0, {str(CASES.parent)!r})
import gpu_cases
from mendel.kernels import bench
gpu_cases.cases("cuda")
assert gpu_cases.run("real matrix_state scalar float32", "cpu")["wrong"] is None
sys.argv = ["bench", "--op", "short_conv", "--minutes", "0"]
bench.main()
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=200)
