"""Things that go wrong, done for real: killed drivers, and candidates that fail in every way."""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from chaos import DIVERGES, EXCEEDS, HANGS, RAISES
from small_study import story, write

from mendel.search import evaluate as evaluation
from mendel.search.driver import Interrupted, search
from mendel.search.front import outcome_of
from mendel.search.records import TrialRecord
from mendel.search.run import open_run
from mendel.search.store import read_events
from mendel.search.worker import STARTS

COMMAND = "import sys; from mendel.search.driver import search; search(sys.argv[1])"


def start(path: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND, str(path)], env=environment, stdout=subprocess.DEVNULL
    )


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def kill_after(path: Path, log: Path, count: int) -> None:
    """Start the driver and kill -9 it once so many evaluations have ended."""
    process = start(path)
    while len(lines(log)) < count:
        assert process.poll() is None, "the driver ended before it could be killed"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()


def finish(path: Path) -> None:
    process = start(path)
    assert process.wait(timeout=240) == 0


def test_a_killed_driver_loses_nothing_and_repeats_nothing(tmp_path: Path) -> None:
    whole = story(search(write(tmp_path / "whole")).folder)
    path = write(tmp_path / "killed", evaluate="chaos:logged")
    folder = tmp_path / "killed" / "runs" / "small"
    log = folder / "evaluations"
    stored: set[tuple[int, int]] = set()
    for count in (3, 8):
        kill_after(path, log, count)
        assert open_run(folder).state == "interrupted"
        events = read_events(folder / "events.jsonl")
        now = {(e["trial"], e["result"]["rung"]) for e in events if e["event"] == "rung"}
        assert stored <= now
        stored = now
    assert stored
    finish(path)
    run = open_run(folder)
    assert run.state == "complete"
    assert story(folder) == whole
    # Each kill can cost the one evaluation whose answer was on its way.
    done = Counter(lines(log))
    assert sum(done.values()) - len(done) <= 2
    assert all(done[f"{trial} {rung}"] == 1 for trial, rung in stored)


def test_a_job_that_takes_the_driver_with_it_is_given_up(tmp_path: Path) -> None:
    # In process a crash of native code is one of the driver; trial 2 crashes every time.
    path = write(tmp_path, evaluate="chaos:crashing")
    assert start(path).wait(timeout=240) == -signal.SIGKILL
    run = open_run(tmp_path / "runs" / "small")
    assert run.state == "interrupted"
    # As two more lives leave it.
    with (run.trial_folder(2) / STARTS).open("a") as handle:
        handle.write("0 train\n0 train\n")
    run = search(path)
    assert failures(run.trials) == {2: ("abandoned", "3 starts of rung 0 ended with the driver")}
    assert run.state == "complete"


def failures(trials: list[TrialRecord]) -> dict[int, tuple[str, str]]:
    return {t.number: (t.failure.kind, t.failure.reason) for t in trials if t.failure}


def check_faults(run: Any) -> None:
    found = failures(run.trials)
    assert set(found) == {DIVERGES, EXCEEDS, HANGS, RAISES}
    assert found[DIVERGES][0] == "diverged"
    assert "step" in found[DIVERGES][1]
    assert found[EXCEEDS][0] == "memory"
    assert "2 GiB" in found[EXCEEDS][1]
    assert found[HANGS][0] == "timeout"
    assert found[RAISES] == ("error", "ZeroDivisionError: the candidate raises")
    assert run.state == "complete"
    assert all(t.state == "failed" for t in run.trials if t.number in found)
    assert all(t.state in ("complete", "stopped") for t in run.trials if t.number not in found)
    assert {t.number for t in outcome_of(run).failed} == set(found)


FAULTS = {
    "evaluate": "chaos:faulty",
    "workers__time_limit": 2.0,
    "workers__memory_limit": "2GiB",
}


def test_failing_candidates_are_recorded_and_the_run_goes_on(tmp_path: Path) -> None:
    run = search(write(tmp_path, **FAULTS))
    check_faults(run)
    detail = run.trial(RAISES).failure
    assert detail is not None
    assert "chaos.py" in detail.detail
    # They are not tried again.
    before = story(run.folder)
    assert story(search(write(tmp_path, **FAULTS)).folder) == before


def test_a_candidate_that_ends_the_program(tmp_path: Path) -> None:
    run = search(write(tmp_path, evaluate="chaos:leaving"))
    assert failures(run.trials) == {2: ("error", "SystemExit: the candidate leaves")}
    assert run.state == "complete"


def test_an_evaluation_that_answers_nonsense(tmp_path: Path) -> None:
    run = search(write(tmp_path, evaluate="chaos:nonsense"))
    assert {t.state for t in run.trials} == {"failed"}
    assert all("not as agreed" in reason for _, reason in failures(run.trials).values())


def test_ctrl_c_stops_cleanly_and_the_run_goes_on_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = story(search(write(tmp_path / "whole")).folder)
    path = write(tmp_path / "stopped")
    count = iter(range(100))

    def interrupt(job: dict[str, Any]) -> dict[str, Any]:
        if next(count) == 4:
            raise KeyboardInterrupt
        return real(job)

    real = evaluation.evaluate
    monkeypatch.setattr(evaluation, "evaluate", interrupt)
    with pytest.raises(Interrupted, match=r"the same command resumes .*small"):
        search(path)
    assert open_run(tmp_path / "stopped" / "runs" / "small").state == "interrupted"
    monkeypatch.undo()
    assert story(search(path).folder) == whole
