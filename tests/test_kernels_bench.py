"""The bench checks before it times, and the kernels on a GPU where there is one."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mendel.kernels import bench
from mendel.kernels.backend import backends
from mendel.kernels.bench import FORMS, TOLERANCE, Case, check, line, main, measure
from mendel.kernels.matrix_state import matrix_state

SMALL = Case("matrix_state", "scalar", 1, 20, 2, 8, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("op", "form"), FORMS)
def test_the_chunked_forms_pass_their_check(op: str, form: str | None, dtype: torch.dtype) -> None:
    for tokens in (1, 20):
        errors = check(Case(op, form, 1, tokens, 2, 8, dtype), "chunked", "cpu")
        assert {"out", "final"} < errors.keys()
        assert max(errors.values()) <= TOLERANCE[dtype], errors


def test_a_wrong_operator_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor | None) -> object:
        out, final = matrix_state(q, k, v, log_decay, state)
        return (out * 1.001 if bench_backend() == "chunked" else out), final

    def bench_backend() -> str:
        from mendel.kernels.backend import current

        return current("matrix_state", "cpu")

    monkeypatch.setitem(bench.FUNCTIONS, "matrix_state", wrong)
    row = measure(SMALL, "chunked", "cpu")
    assert row["refused"] == "differs from the definition"
    assert "forward" not in row
    assert "not timed" in line(row)


def test_floor_of_the_matrix_state() -> None:
    """N H (4 K V + C (K + V)) and e N H (2 K + 2 V) + 4 N H, at N H = 8192 * 96, K = V = 128."""
    floor = Case("matrix_state", "scalar", 1, 8192, 96, 128, torch.bfloat16).floor()
    assert floor["forward_flops"] == 8192 * 96 * (4 * 128 * 128 + 64 * 256)
    assert floor["forward_bytes"] == 8192 * 96 * (2 * 512 + 4)
    step = Case("matrix_state", "none", 2, 1, 4, 64, torch.float32).floor()
    assert step["forward_flops"] == 2 * 4 * 4 * 64 * 64
    assert step["forward_bytes"] == 2 * 4 * (4 * 4 * 64 + 8 * 64 * 64)


def test_writes_a_table_and_json(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "kernels.json"
    monkeypatch.setitem(bench.SHAPES, "cpu", ((1, 20, 2, 8),))
    monkeypatch.setitem(bench.SECONDS, "cpu", 0.01)
    monkeypatch.setattr(sys, "argv", ["bench", "--op", "short_conv", "--out", str(out)])
    main()
    rows = json.loads(out.read_text())["rows"]
    assert [row["backend"] for row in rows] == ["definition", "chunked"]
    assert all(row["forward"]["median_ms"] > 0 for row in rows)
    assert capsys.readouterr().out.count("short_conv") == 2


def test_a_missing_folder_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench", "--out", "/nowhere/at/all.json"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    assert "there is no folder /nowhere/at" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [16, 24, 64, 80, 128, 256])
@pytest.mark.parametrize(("op", "form"), [pair for pair in FORMS if "triton" in backends(*pair)])
def test_triton_on_a_gpu(op: str, form: str | None, width: int, dtype: torch.dtype) -> None:
    for tokens in (1, 193):
        errors = check(Case(op, form, 1, tokens, 2, width, dtype), "triton", "cuda")
        assert max(errors.values()) <= TOLERANCE[dtype], errors
