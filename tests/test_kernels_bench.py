"""The bench checks before it times, ends in time, and its page is what its JSON says."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mendel.kernels import (
    bench,
    bench_cases,
    bench_floor,
    bench_jobs,
    bench_processes,
    bench_timing,
)
from mendel.kernels.backend import current
from mendel.kernels.bench import line, main, measure
from mendel.kernels.bench_cases import FORMS, STATELESS, TOLERANCE, Case, check
from mendel.kernels.bench_floor import floor
from mendel.kernels.bench_jobs import Job, check_job, jobs
from mendel.kernels.bench_peers import peers
from mendel.kernels.bench_table import RESULTS, page
from mendel.kernels.matrix_state import matrix_state

SMALL = Case("matrix_state", "scalar", 1, 20, 2, 8, torch.float32)
CEILINGS = {"copy_bytes_per_s": 1e9, "matmul_float32_per_s": 1e9}
SIZE = {"selective_scan": 4, "linear_cross_entropy": 30, "moe_permute": 2}


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_cases, "CHECKED_LENGTH", 37)
    monkeypatch.setitem(bench_timing.MOST_SECONDS, "cpu", 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("op", "form"), FORMS)
def test_the_chunked_forms_pass_their_check(op: str, form: str | None, dtype: torch.dtype) -> None:
    for tokens in (20,) if op in STATELESS else (1, 20):
        errors = check(Case(op, form, 1, tokens, 2, 8, dtype, SIZE.get(op, 0)), "chunked", "cpu")
        # Decoding asks for no gradients.
        assert errors.keys() >= ({"out", "final"} if tokens == 1 else {"out"})
        assert (len(errors) >= 3) == (tokens > 1)
        assert max(errors.values()) <= TOLERANCE[dtype], errors


def test_a_wrong_operator_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor | None) -> object:
        out, final = matrix_state(q, k, v, log_decay, state)
        return (out * 1.001 if current("matrix_state", "cpu") == "chunked" else out), final

    monkeypatch.setitem(bench_cases.FUNCTIONS, "matrix_state", wrong)
    job = Job(SMALL, "chunked")
    row = measure(job, check_job(job, "cpu"), "cpu", CEILINGS)
    assert row["refused"] == "differs from the definition"
    assert "forward" not in row
    assert "not timed" in line(row)


def test_what_a_backend_lacks_or_raises_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "does not serve" in check_job(Job(SMALL, "triton"), "cpu")["refused"]

    def broken(**given: object) -> object:
        raise RuntimeError("one\nthe last line")

    monkeypatch.setitem(bench_cases.FUNCTIONS, "matrix_state", broken)
    job = Job(SMALL, "chunked")
    assert check_job(job, "cpu") == {"refused": "failed: RuntimeError: the last line"}
    row = measure(job, {"errors": {"out": 0.0}}, "cpu", CEILINGS)
    assert row["refused"] == "failed: RuntimeError: the last line"


def test_peers_of_a_cpu_pass_their_checks() -> None:
    for op, size in (("attention", 0), ("linear_cross_entropy", 30)):
        case = Case(op, None, 1, 20, 2, 8, torch.float32, size)
        found = list(peers(case, "cpu"))
        assert found
        for peer in found:
            errors = check(case, peer.make(), "cpu")
            assert max(errors.values()) <= 1e-6, peer.name
    assert not list(peers(SMALL, "cpu"))


def test_floor_of_the_matrix_state() -> None:
    """N H (4 K V + C (K + V)) and e N H (2 K + 2 V) + 4 N H, at N H = 8192 * 96, K = V = 128."""
    least = floor(Case("matrix_state", "scalar", 1, 8192, 96, 128, torch.bfloat16))
    assert least["forward_flops"] == 8192 * 96 * (4 * 128 * 128 + 64 * 256)
    assert least["forward_bytes"] == 8192 * 96 * (2 * 512 + 4)
    step = floor(Case("matrix_state", "none", 2, 1, 4, 64, torch.float32))
    assert step["forward_flops"] == 2 * 4 * 4 * 64 * 64
    assert step["forward_bytes"] == 2 * 4 * (4 * 4 * 64 + 8 * 64 * 64)


def test_floors_of_what_stands_around() -> None:
    """Linear cross-entropy 2 and 6 N D A; a norm with residual reads two and writes two rows."""
    loss = floor(Case("linear_cross_entropy", None, 1, 100, 2, 8, torch.bfloat16, 50))
    assert loss["forward_flops"] == 2 * 100 * 16 * 50
    assert loss["both_flops"] == 3 * loss["forward_flops"]
    assert loss["forward_bytes"] == 2 * (100 + 50) * 16
    norm = floor(Case("rms_norm", None, 1, 100, 2, 8, torch.bfloat16))
    assert norm["forward_bytes"] == 4 * 2 * 100 * 16
    seconds = bench_floor.seconds("forward", norm, CEILINGS, "float32")
    assert seconds == norm["forward_bytes"] / 1e9


def test_ceilings() -> None:
    h100 = bench_floor.stated_ceilings("NVIDIA H100 80GB HBM3")
    pcie = bench_floor.stated_ceilings("NVIDIA H100 PCIe")
    assert h100 is not None
    assert pcie is not None
    assert h100["copy_bytes_per_s"] == 3.35e12 > pcie["copy_bytes_per_s"]
    assert bench_floor.stated_ceilings("EPYC") is None
    found = bench_floor.measured_ceilings("cpu", (torch.float32,))
    assert found.keys() == CEILINGS.keys()
    assert min(found.values()) > 1e8


def test_the_highest_clock_is_the_drivers(monkeypatch: pytest.MonkeyPatch) -> None:
    """In kHz there; torch's properties have none with CUDA 13."""
    utils = SimpleNamespace(get_device_properties=lambda device: {"sm_clock_rate": 1_980_000})
    driver = SimpleNamespace(active=SimpleNamespace(utils=utils))
    monkeypatch.setattr(bench_floor, "import_module", lambda name: SimpleNamespace(driver=driver))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert bench_floor.highest_clock() == 1.98e9


def test_the_order_and_the_reach_of_the_jobs() -> None:
    found = list(jobs("cuda"))
    assert len({job.key() for job in found}) == len(found)
    assert {job.case.op for job in found[:40]} >= {"matrix_state", "delta_rule", "rms_norm"}
    assert found[0].case.tokens == 2048
    decoded = {job.case.batch for job in found if job.case.tokens == 1}
    assert decoded == {1, 4, 16, 64, 256}
    shapes = {(c.batch, c.tokens, c.heads, c.width) for c in (job.case for job in found)}
    assert shapes >= {(1, 8192, 96, 128), (2, 16384, 16, 128), (8, 2048, 32, 256), (8, 1024, 8, 64)}
    names = {job.backend for job in found}
    assert names >= {"triton", "chunked", "sdpa flash", "FlexAttention", "torch.compile"}
    # What torch compiles takes tens of seconds each: last, attention first.
    compiled = [job.backend in ("FlexAttention", "torch.compile") for job in found]
    assert compiled == sorted(compiled)
    assert found[compiled.index(True)].backend == "FlexAttention"
    # A check stands for all sizes of a case, and for no other width, dtype or operator.
    assert len({job.check_key() for job in found}) < len(found)
    assert "triton" not in {job.backend for job in jobs("cpu")}


@pytest.fixture
def _few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bench_jobs.MAIN, "cpu", (1, 20, 2, 8))
    monkeypatch.setitem(bench_jobs.LONGER, "cpu", ((1, 40, 2, 8),))
    monkeypatch.setitem(bench_jobs.DECODED, "cpu", (1,))
    monkeypatch.setattr(bench_floor, "measured_ceilings", lambda device, dtypes: CEILINGS)


@pytest.mark.usefixtures("_few")
def test_writes_json_and_resumes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "kernels-test.json"
    run = ["bench", "--op", "short_conv", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", run)
    main()
    record = json.loads(out.read_text())
    shapes = [(row["backend"], row["tokens"]) for row in record["rows"]]
    assert shapes == [
        *(("chunked", 20), ("definition", 20), ("chunked", 1), ("definition", 1), ("chunked", 40))
    ]
    for row in record["rows"]:
        assert row["forward"]["median_ms"] > 0
        assert 0 < row["share"]["forward"] < 1
    assert record["skipped"] == []
    assert record["conditions"]["kind"] == "cpu"
    assert capsys.readouterr().out.count("short_conv") == 5
    # Going on keeps what there is, and measures what is not there, or had failed.
    first, second, *kept = record["rows"]
    facts = {name: second[name] for name in (*Case.__dataclass_fields__, "backend")}
    record["rows"] = [{**facts, "refused": "failed: RuntimeError: gone by now"}, *kept]
    out.write_text(json.dumps(record))
    monkeypatch.setattr(sys, "argv", [*run, "--resume"])
    main()
    assert capsys.readouterr().out.count("short_conv") == 2
    again = json.loads(out.read_text())
    assert again["rows"][:3] == kept
    assert [row["backend"] for row in again["rows"][3:]] == [first["backend"], second["backend"]]
    assert all("forward" in row for row in again["rows"])
    table = page(tmp_path)
    assert "No figure has been taken on a GPU yet" in table
    assert table.count("| short_conv | ") == 5
    record["conditions"]["torch"] = "1.0"
    out.write_text(json.dumps(record))
    with pytest.raises(SystemExit, match="other conditions"):
        main()


@pytest.mark.usefixtures("_few")
def test_ends_in_time_and_names_what_it_left(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def slow(*_: object) -> object:
        time.sleep(1)
        raise AssertionError("it was not stopped")

    monkeypatch.setattr(bench, "measure", slow)
    out = tmp_path / "kernels-test.json"
    given = ["bench", "--op", "rms_norm", "--out", str(out), "--minutes", "0.005"]
    monkeypatch.setattr(sys, "argv", given)
    main()
    record = json.loads(out.read_text())
    assert record["rows"] == []
    assert [row["tokens"] for row in record["skipped"]] == [20, 20, 40]
    assert "out of time: 3 left" in capsys.readouterr().err
    assert "Left out for want of time: 3 of 3 rows" in page(tmp_path)


@pytest.mark.usefixtures("_few")
def test_ends_in_time_where_a_library_takes_the_signal_for_its_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def catches(error: type[BaseException]) -> list[str]:
        met = []

        def stubborn(*_: object) -> object:
            met.append("job")
            try:
                time.sleep(5)
            except error:
                met.append("caught")
            time.sleep(5)
            raise AssertionError("it was not stopped")

        monkeypatch.setattr(bench, "measure", stubborn)
        monkeypatch.setattr(sys, "argv", ["bench", "--op", "rms_norm", "--minutes", "0.005"])
        main()
        assert "out of time: 3 left" in capsys.readouterr().err
        return met

    assert catches(Exception) == ["job"]
    assert catches(BaseException) == ["job", "caught"]


def test_no_cast_of_the_gradients_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """They come in float32, and an output may be in bfloat16."""
    casts = []

    class Casts(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            casts.extend(["cast"] if "_to_copy" in str(func) else [])
            return func(*args, **(kwargs or {}))

    def plain(x: Tensor, weight: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
        return x * weight, x + residual

    def clock(work: Callable[[], object], device: str) -> dict[str, Any]:
        with Casts():
            work()
        return {"median_ms": 1.0, "low_ms": 1.0, "high_ms": 1.0, "repeats": 1}

    monkeypatch.setattr(bench, "timed", clock)
    monkeypatch.setitem(bench_cases.FUNCTIONS, "rms_norm", plain)
    case = Case("rms_norm", None, 1, 20, 2, 8, torch.bfloat16)
    ceilings = {"copy_bytes_per_s": 1e9, "matmul_bfloat16_per_s": 1e9}
    row = measure(Job(case, "chunked"), {"errors": {"out": 0.0}}, "cpu", ceilings)
    assert "both" in row, row
    assert casts == []


def test_the_selective_scan_waits_for_its_exponentials() -> None:
    """N D n of them forward, 16 per clock and multiprocessor of a GPU."""
    least = floor(Case("selective_scan", None, 1, 100, 2, 8, torch.bfloat16, 4))
    assert (least["forward_exps"], least["both_exps"]) == (100 * 16 * 4, 2 * 100 * 16 * 4)
    ceilings = {"copy_bytes_per_s": 1e30, "matmul_bfloat16_per_s": 1e30, "exps_per_s": 16e9}
    assert bench_floor.seconds("forward", least, ceilings, "bfloat16") == 100 * 16 * 4 / 16e9
    assert bench_floor.seconds("forward", least, CEILINGS, "float32") > 0


@pytest.mark.usefixtures("_few")
def test_a_red_check_ends_with_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(TOLERANCE, torch.float32, 0.0)
    monkeypatch.setattr(sys, "argv", ["bench", "--op", "rms_norm"])
    with pytest.raises(SystemExit, match="a check is red"):
        main()
    assert "not timed: differs from the definition" in capsys.readouterr().out


def test_checks_in_processes_of_their_own() -> None:
    """One process, as on a GPU, where several compile side by side."""
    found = bench_jobs.checks([Job(SMALL, "chunked")], "cpu", 1, time.monotonic() + 100)
    (row,) = found.values()
    assert max(row["errors"].values()) < 1e-5
    assert bench_jobs.checks([Job(SMALL, "chunked")], "cpu", 1, time.monotonic() - 1) == {}


def test_a_process_that_ends_spoils_no_other_check() -> None:
    given = {"ends": ("__import__('os')._exit(3)",), "goes on": ("1 + 1",)}
    late = time.monotonic() + 100
    found = dict(bench_processes.side_by_side(eval, given, 1, late, ended="{}: {}".format))
    assert found == {"ends": "ends: its process ended with 3", "goes on": 2}
    assert not bench_processes.device_is_lost()


@pytest.mark.usefixtures("_few")
def test_nothing_is_timed_on_a_lost_device(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An illegal address would make every later row red."""
    monkeypatch.setattr(bench, "device_is_lost", lambda: True)
    out = tmp_path / "kernels-test.json"
    monkeypatch.setattr(sys, "argv", ["bench", "--op", "rms_norm", "--out", str(out)])
    main()
    record = json.loads(out.read_text())
    assert (len(record["rows"]), len(record["skipped"])) == (1, 2)
    assert "the device is lost: 2 left" in capsys.readouterr().err


def test_the_page_of_results_is_what_the_json_says() -> None:
    assert (RESULTS.parent / "RESULTS.md").read_text() == page(RESULTS)


def test_a_missing_folder_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench", "--out", "/nowhere/at/all.json"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    assert "there is no folder /nowhere/at" in capsys.readouterr().err
