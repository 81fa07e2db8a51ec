"""Where jobs run: in this process, or on a pool of Ray actors. Both treat a job the same."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any, Protocol

import ray
import torch

from .records import Failure
from .store import RunError
from .worker import Limits, Payload, failure_of, hung, run_job, warm_up

Key = tuple[int, int, str]
"""Trial, rung, and kind: `train` or `measure`."""

OBJECT_STORE_BYTES = 100_000_000
"""Jobs and results are a few kilobytes; Ray would take a third of the memory otherwise."""

START_SECONDS = 120.0
"""For a worker to import torch and say that it is there."""


@dataclass(frozen=True)
class Task:
    """One job: its key and what `evaluate` gets."""

    key: Key
    payload: Payload


@dataclass(frozen=True)
class Outcome:
    """What became of a job: its content, or its failure."""

    key: Key
    content: dict[str, Any] | None
    failure: Failure | None


class Executor(Protocol):
    """Runs jobs. `next` blocks until one has ended; jobs begin in the order of submission."""

    @property
    def workers(self) -> int: ...
    def submit(self, task: Task) -> None: ...
    def next(self) -> Outcome: ...
    def close(self) -> None: ...


@dataclass(frozen=True)
class Plan:
    """How many workers, with what."""

    evaluate: str
    limits: Limits
    count: int
    threads: int = 1
    gpus: int = 0
    """Devices that Ray hands out; 0 trains on the CPU."""
    measures: bool = False
    """Measurements get a worker of their own."""
    recycle: int = 100


class SerialExecutor:
    """One job after another in this process, for debugging, tests and machines without Ray.

    The same limits hold: memory by the operating system, time between steps, and a signal ends
    Python code that hangs. Native code that hangs or crashes takes the process with it; a resumed
    run gives such a trial up after its third start.
    """

    workers = 1

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._queue: deque[Task] = deque()
        torch.set_num_threads(plan.threads)
        warm_up(plan.evaluate)

    def submit(self, task: Task) -> None:
        self._queue.append(task)

    def next(self) -> Outcome:
        task = self._queue.popleft()
        answer = run_job(self._plan.evaluate, task.payload, self._plan.limits, alarm=True)
        return Outcome(task.key, answer.get("content"), failure_of(answer))

    def close(self) -> None:
        self._queue.clear()


class _Actor:
    """A worker process. Created through Ray."""

    def __init__(self, evaluate: str, threads: int, cores: list[int] | None) -> None:
        # Ctrl-C at the terminal reaches every process; only the driver decides what it means.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if cores:
            os.sched_setaffinity(0, cores)
        torch.set_num_threads(threads)
        warm_up(evaluate)

    def ready(self) -> int:
        return os.getpid()

    def run(self, evaluate: str, payload: Payload, limits: Limits) -> dict[str, Any]:
        return run_job(evaluate, payload, limits, alarm=False)


@dataclass
class _Slot:
    measures: bool
    cores: list[int] | None
    actor: Any = None
    reference: Any = None
    """Of the call under way: `ready` while it starts, then `run`."""
    task: Task | None = None
    deadline: float | None = None
    jobs: int = 0


@dataclass
class _Queues:
    train: deque[Task] = field(default_factory=deque)
    measure: deque[Task] = field(default_factory=deque)


class RayExecutor:
    """A pool of long-lived actors, one job each at a time.

    A job past its hard limit is ended with its actor. A job whose actor dies is tried once more,
    then it has failed; one that Ray's memory monitor ends has failed at once, for the same would
    happen again. An actor is replaced after `recycle` jobs and after a failure of a CUDA
    device, which can leave the process unfit.
    """

    def __init__(self, plan: Plan, address: str | None = None) -> None:
        self._plan = plan
        self._queues = _Queues()
        self._died: dict[Key, int] = {}
        self._done: deque[Outcome] = deque()
        self._owns = not ray.is_initialized()
        local = address is None
        if self._owns:
            _connect(plan, address)
        self._slots = [_Slot(False, c) for c in _cores(plan, local)]
        if plan.measures:
            last = [max(os.sched_getaffinity(0))] if local and _pins(plan) else None
            self._slots.append(_Slot(True, last))
        for slot in self._slots:
            self._start(slot)

    @property
    def workers(self) -> int:
        return self._plan.count

    @property
    def measuring(self) -> int:
        """Workers that only measure."""
        return sum(slot.measures for slot in self._slots)

    def pids(self) -> list[int]:
        """Process ids of the workers, once all are there. Only while none has a job."""
        return [int(ray.get(slot.actor.ready.remote())) for slot in self._slots]

    def submit(self, task: Task) -> None:
        own = self._plan.measures and task.key[2] == "measure"
        (self._queues.measure if own else self._queues.train).append(task)
        self._feed()

    def next(self) -> Outcome:
        while not self._done:
            self._feed()
            busy = {s.reference: s for s in self._slots if s.reference is not None}
            if all(s.task is None for s in busy.values()) and not self._waiting():
                raise RuntimeError("no job is under way")
            ready, _ = ray.wait(list(busy), num_returns=1, timeout=self._patience())
            for reference in ready:
                self._collect(busy[reference])
            self._end_late()
        return self._done.popleft()

    def close(self) -> None:
        for slot in self._slots:
            if slot.actor is not None:
                ray.kill(slot.actor)
        self._slots = []
        if self._owns:
            ray.shutdown()

    def _waiting(self) -> bool:
        return bool(self._queues.train or self._queues.measure)

    def _start(self, slot: _Slot) -> None:
        actor = ray.remote(_Actor).options(
            num_cpus=self._plan.threads, num_gpus=1 if self._plan.gpus else 0, max_restarts=0
        )
        slot.actor = actor.remote(self._plan.evaluate, self._plan.threads, slot.cores)
        slot.reference = slot.actor.ready.remote()
        slot.task, slot.jobs = None, 0
        slot.deadline = time.monotonic() + START_SECONDS

    def _replace(self, slot: _Slot) -> None:
        ray.kill(slot.actor)
        self._start(slot)

    def _feed(self) -> None:
        for slot in self._slots:
            queue = self._queues.measure if slot.measures else self._queues.train
            if slot.reference is not None or not queue:
                continue
            if slot.jobs >= self._plan.recycle:
                self._replace(slot)
                continue
            slot.task = queue.popleft()
            slot.jobs += 1
            limits = self._plan.limits
            slot.reference = slot.actor.run.remote(self._plan.evaluate, slot.task.payload, limits)
            hard = limits.hard_seconds
            slot.deadline = None if hard is None else time.monotonic() + hard

    def _collect(self, slot: _Slot) -> None:
        task, reference = slot.task, slot.reference
        slot.task = slot.reference = slot.deadline = None
        try:
            answer = ray.get(reference)
        except ray.exceptions.RayError as error:
            if task is None:
                raise RunError(f"a worker does not start: {_first_line(error)}") from None
            # The actor may live on where only its answer or its node is out of reach.
            self._replace(slot)
            failure = self._lost(task, error)
            if failure is not None:
                self._done.append(Outcome(task.key, None, failure))
            else:
                own = self._plan.measures and task.key[2] == "measure"
                (self._queues.measure if own else self._queues.train).appendleft(task)
            return
        if task is None:
            return
        failure = failure_of(answer)
        self._done.append(Outcome(task.key, answer.get("content"), failure))
        if failure is not None and "CUDA" in failure.reason + failure.detail:
            self._replace(slot)

    def _lost(self, task: Task, error: ray.exceptions.RayError) -> Failure | None:
        """The failure of a job whose answer did not come; None where it is tried once more."""
        if isinstance(error, ray.exceptions.OutOfMemoryError):
            reason = f"the machine ran out of memory: {_first_line(error)}"
            return Failure("memory", reason, str(error)[-8000:])
        if isinstance(error, ray.exceptions.RayTaskError):
            # The worker lives: the answer cannot be sent.
            last = [line.strip() for line in str(error).splitlines() if line.strip()][-1:]
            reason = f"its answer cannot be sent: {''.join(last)[:200]}"
            return Failure("error", reason, str(error)[-8000:])
        self._died[task.key] = self._died.get(task.key, 0) + 1
        if self._died[task.key] < 2:
            return None
        return Failure("worker-died", f"its worker died twice: {_first_line(error)}")

    def _patience(self) -> float | None:
        deadlines = [s.deadline for s in self._slots if s.deadline is not None]
        return max(0.0, min(deadlines) - time.monotonic()) if deadlines else None

    def _end_late(self) -> None:
        for slot in self._slots:
            if slot.deadline is None or time.monotonic() < slot.deadline:
                continue
            if slot.task is None:
                raise RunError(
                    f"no worker could start within {START_SECONDS:g} s: the cluster has no free "
                    f"place with {self._plan.threads} CPUs and {self._plan.gpus and 1} GPUs"
                )
            self._done.append(Outcome(slot.task.key, None, hung(self._plan.limits)))
            self._replace(slot)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if "exit" in line.lower() or "died" in line.lower()]
    return (told or lines or [type(error).__name__])[0][:200]


def _connect(plan: Plan, address: str | None) -> None:
    # Ray 2.60 warns about a change of this default on every start without a GPU.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # At Ray's default niceness of 15 any other program on the machine would starve the workers past
    # their time limits and stretch every latency that they measure.
    os.environ.setdefault("RAY_worker_niceness", "0")
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if address is not None:
            ray.init(address=address, **quiet)
        else:
            ray.init(
                num_cpus=(plan.count + plan.measures) * plan.threads,
                num_gpus=plan.gpus,
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                **quiet,
            )
    except (ConnectionError, ValueError, RuntimeError) as error:
        where = f"the cluster at {address}" if address else "Ray"
        raise RunError(f"{where} cannot be reached: {_first_line(error)}") from None


def _pins(plan: Plan) -> bool:
    """Whether training keeps off the core that measurements use."""
    return (
        plan.measures
        and not plan.gpus
        and hasattr(os, "sched_getaffinity")
        and len(os.sched_getaffinity(0)) > 1
    )


def _cores(plan: Plan, local: bool) -> list[list[int] | None]:
    if local and _pins(plan):
        return [sorted(os.sched_getaffinity(0))[:-1]] * plan.count
    return [None] * plan.count
