"""What the pool makes of Ray's errors; no Ray is started, its errors are fed by hand."""

from collections import deque
from typing import Any

import pytest
import ray
from ray.exceptions import (
    ActorDiedError,
    ActorUnschedulableError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayError,
    RayTaskError,
)

from mendel.search import executors
from mendel.search.executors import Plan, RayExecutor, Task
from mendel.search.store import RunError
from mendel.search.worker import Limits

TASK = Task((3, 0, "train"), {"trial": 3})


class Pool(RayExecutor):
    """A pool of one slot whose actor is not there."""

    def __init__(self) -> None:
        self._plan = Plan("chaos:quick", Limits(), count=1)
        self._queues = executors._Queues()
        self._died, self._done = {}, deque()
        self._slots = [executors._Slot(False, None)]
        self.replaced = 0

    def _replace(self, slot: Any) -> None:
        self.replaced += 1

    def meet(self, error: RayError, monkeypatch: pytest.MonkeyPatch, task: Task | None) -> None:
        def get(reference: object) -> None:
            raise error

        monkeypatch.setattr(ray, "get", get)
        self._slots[0].task, self._slots[0].reference = task, object()
        self._collect(self._slots[0])


DEATHS = [
    ActorDiedError(),
    NodeDiedError("the node is dead"),
    ObjectLostError("00" * 28, None, ""),
    ActorUnschedulableError("no place"),
]


@pytest.mark.parametrize("error", DEATHS, ids=lambda e: type(e).__name__)
def test_a_lost_job_is_tried_once_more(error: RayError, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = Pool()
    pool.meet(error, monkeypatch, TASK)
    assert list(pool._queues.train) == [TASK]
    assert not pool._done
    pool.meet(error, monkeypatch, TASK)
    outcome = pool._done.popleft()
    assert outcome.key == TASK.key
    assert outcome.failure is not None
    assert outcome.failure.kind == "worker-died"
    assert "died twice" in outcome.failure.reason
    assert pool.replaced == 2


def test_what_the_memory_monitor_ends_has_needed_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = Pool()
    pool.meet(OutOfMemoryError("Task was killed: low memory\nmore"), monkeypatch, TASK)
    failure = pool._done.popleft().failure
    assert failure is not None
    assert failure.kind == "memory"
    assert "low memory" in failure.reason
    assert "\n" not in failure.reason
    assert not pool._queues.train
    assert pool.replaced == 1


def test_an_answer_that_cannot_be_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "Traceback (most recent call last):\n  in run\nTypeError: cannot pickle"
    error = RayTaskError("run", text, TypeError("cannot pickle"))
    pool = Pool()
    pool.meet(error, monkeypatch, TASK)
    failure = pool._done.popleft().failure
    assert failure is not None
    assert failure.kind == "error"
    assert "TypeError: cannot pickle" in failure.reason


@pytest.mark.parametrize("error", DEATHS[1:], ids=lambda e: type(e).__name__)
def test_a_worker_that_does_not_start(error: RayError, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RunError, match="a worker does not start"):
        Pool().meet(error, monkeypatch, None)
