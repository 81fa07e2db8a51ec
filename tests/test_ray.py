"""The pool of Ray actors: the same records as in process, and workers that are killed."""

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from chaos import DIES, DIES_ONCE, DIVERGES, EXCEEDS, HANGS, RAISES
from small_study import story, write
from test_faults import FAULTS, failures, finish, kill_after, lines

from mendel.search.driver import make_executor, search
from mendel.search.executors import Plan, RayExecutor, Task
from mendel.search.run import open_run
from mendel.search.study import load_study
from mendel.search.worker import Limits

pytestmark = pytest.mark.ray


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    os.environ["PYTHONPATH"] = str(Path(__file__).parent)
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    ray.init(
        num_cpus=3, include_dashboard=False, log_to_driver=False, object_store_memory=100_000_000
    )
    yield
    ray.shutdown()


def job(folder: Path, trial: int, **more: object) -> Task:
    place = folder / str(trial)
    place.mkdir(exist_ok=True)
    payload = {"trial": trial, "rung": 0, "kind": "train", "folder": str(place), **more}
    return Task((trial, 0, "train"), payload)


def test_serial_and_ray_give_the_same_records(tmp_path: Path, cluster: None) -> None:
    serial = search(write(tmp_path / "a"))
    pool = search(write(tmp_path / "b", workers__count=2), executor="ray")
    assert story(pool.folder) == story(serial.folder)


def test_faults_on_workers(tmp_path: Path, cluster: None) -> None:
    changes = {**FAULTS, "evaluate": "chaos:deadly", "workers__count": 2}
    run = search(write(tmp_path, **changes), executor="ray")
    found = failures(run.trials)
    kinds = {n: kind for n, (kind, _) in found.items()}
    assert kinds == {
        DIVERGES: "diverged",
        EXCEEDS: "memory",
        HANGS: "timeout",
        RAISES: "error",
        DIES: "worker-died",
    }
    assert "twice" in found[DIES][1]
    assert run.state == "complete"
    # Killed once, tried once more.
    assert run.trial(DIES_ONCE).state in ("complete", "stopped")
    assert (run.trial_folder(DIES_ONCE) / "died").exists()


def test_a_worker_killed_from_outside(tmp_path: Path, cluster: None) -> None:
    pool = RayExecutor(Plan("chaos:sleepy", Limits(), count=2))
    try:
        pids = set(pool.pids())
        assert len(pids) == 2
        for trial in range(6):
            pool.submit(job(tmp_path, trial, seconds=0.2))
        threading.Timer(0.3, os.kill, (pids.pop(), signal.SIGKILL)).start()
        outcomes = [pool.next() for _ in range(6)]
        assert sorted(o.key[0] for o in outcomes) == list(range(6))
        assert all(o.failure is None for o in outcomes)
    finally:
        pool.close()


def test_workers_are_recycled(tmp_path: Path, cluster: None) -> None:
    pool = RayExecutor(Plan("chaos:sleepy", Limits(), count=1, recycle=2))
    try:
        pids = []
        for trial in range(3):
            pool.submit(job(tmp_path, trial, seconds=0.0))
            outcome = pool.next()
            assert outcome.content is not None
            pids.append(outcome.content["pid"])
        assert pids[0] == pids[1] != pids[2]
    finally:
        pool.close()


def test_measurements_have_a_worker_of_their_own(tmp_path: Path, cluster: None) -> None:
    path = write(tmp_path, objectives=["quality", {"latency_decode": {"context": 8}}])
    study = load_study(path)
    pool = make_executor(study, "ray")
    assert isinstance(pool, RayExecutor)
    try:
        expected = 1 if (os.cpu_count() or 1) > 1 else 0
        assert pool.measuring == expected
    finally:
        pool.close()


def test_a_killed_driver_with_workers_resumes(tmp_path: Path) -> None:
    whole = story(search(write(tmp_path / "whole")).folder)
    changes = {"evaluate": "chaos:logged", "workers__executor": "ray", "workers__count": 2}
    path = write(tmp_path / "killed", **changes)
    folder = tmp_path / "killed" / "runs" / "small"
    kill_after(path, folder / "evaluations", 4)
    # Workers of a killed driver end by themselves; what they still write is whole.
    finish(path)
    assert story(folder) == whole
    assert open_run(folder).state == "complete"
    done = lines(folder / "evaluations")
    # Two jobs can be on their way at the kill.
    assert len(done) - len(set(done)) <= 2
