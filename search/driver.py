"""The driver: the one writer of a study. It asks, dispatches, tells, and resumes by replay."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from errno import ENOSPC
from pathlib import Path
from typing import Any, Literal

import torch

from .evaluate import resolve_device
from .executors import Executor, Key, Outcome, Plan, RayExecutor, SerialExecutor, Task
from .front import outcome
from .grammar import Proposal, SpaceGrammar
from .ledger import Ledger
from .objectives import cheap_values, trained_values
from .provenance import provenance
from .records import Failure, TrialRecord
from .run import RunView, frame_of, open_run, rung_result
from .samplers import Exhausted, make_sampler
from .schedule import Job, Propose, Schedule
from .store import RunError, RunStore, read_json, storage_errors, write_json
from .study import Study, load_study
from .worker import Limits, forget_starts, starts

MOST_STARTS = 3
"""A job that a worker began so often without an end, because the driver died each time, is given
up: it may be what killed it."""

INFEASIBLE_PER_TRIAL = 20
"""A search ends early after so many infeasible candidates per trial that it may train."""


class Interrupted(RunError):
    """Ctrl-C. The message says how to go on."""


@dataclass(frozen=True)
class Progress:
    """How far a search is; `eta` in seconds, None before there is a basis."""

    state: Literal["running", "complete"]
    finished: int
    """Candidates that are complete, stopped or failed."""
    trials: int
    running: int
    failed: int
    infeasible: int
    baselines: int
    front: int
    hypervolume: float
    elapsed: float
    eta: float | None


Report = Callable[[Progress], None]


def search(
    study: Study | Path | str,
    *,
    out: Path | str | None = None,
    executor: Executor | Literal["serial", "ray"] | None = None,
    address: str | None = None,
    progress: Report | None = None,
) -> RunView:
    """Run a study to its end, or go on with it where an earlier call was stopped or killed.

    `out` replaces the study's `runs` folder, `executor` the study's, `address` joins a Ray cluster
    (which must see the runs folder under the same path). `progress` is called as results come in.
    Raises StudyError, RunError or Interrupted, each with one line.
    """
    if not isinstance(study, Study):
        study = load_study(study)
    elif (found := study.problem()) is not None:
        raise study.error(*found)
    if out is not None:
        study = study.moved(Path(out))
    with RunStore.open(study) as store, storage_errors(study.folder):
        place = store.folder / "provenance.json"
        write_json(place, provenance(study, read_json(place)))
        own = executor is None or isinstance(executor, str)
        if executor is None or isinstance(executor, str):
            pool = make_executor(study, executor, address)
        else:
            pool = executor
        try:
            driver = _Driver(study, store, pool, progress)
            try:
                driver.run()
            except KeyboardInterrupt:
                driver.forgive()
                raise
            finally:
                driver.ledger.close()
        except KeyboardInterrupt:
            store.tell("interrupted")
            raise Interrupted(f"stopped; the same command resumes {store.folder}") from None
        finally:
            if own:
                pool.close()
    return open_run(study.folder)


def make_executor(
    study: Study, kind: Literal["serial", "ray"] | None = None, address: str | None = None
) -> Executor:
    """The executor that a study asks for, sized for this machine or the cluster at `address`."""
    workers = study.workers
    kind = kind or ("ray" if address is not None else workers.executor)
    memory = None if workers.memory_limit is None else int(workers.memory_limit)
    limits = Limits(workers.time_limit, memory)
    measures = any(g.objective.stage == "measured" for g in study.goals)
    on_gpu = resolve_device(workers.device).startswith("cuda")
    gpus = torch.cuda.device_count() if on_gpu else 0
    places = gpus or max(1, (os.cpu_count() or 1) // workers.threads)
    apart = measures and kind == "ray" and (places > 1 or address is not None)
    auto = max(1, places - apart)
    count = workers.count if isinstance(workers.count, int) else auto
    plan = Plan(study.evaluate, limits, count, workers.threads, gpus, apart, workers.recycle)
    return SerialExecutor(plan) if kind == "serial" else RayExecutor(plan, address)


class _Driver:
    """One life of a run. The schedule is replayed from its start; what an earlier life stored is
    taken as it is, and only what is missing is run."""

    def __init__(
        self, study: Study, store: RunStore, executor: Executor, progress: Report | None
    ) -> None:
        self.study, self.store, self.executor = study, store, executor
        self.progress = progress
        self.goals = study.goals
        self.measured = [g for g in self.goals if g.objective.stage == "measured"]
        search = study.search
        grammar = SpaceGrammar(study.space)
        self.sampler = make_sampler(search, grammar, len(self.goals))
        self.ledger = Ledger(study, store, self.sampler)
        self.trials: dict[int, TrialRecord] = {}
        self.waiting: dict[Key, Outcome | None] = {}
        """Jobs that were submitted; None until they end. Removed when the trial's rung is whole."""
        last = study.steps(len(search.rungs) - 1)
        whole = sum(last.values())
        ends = [sum(study.steps(r).values()) / whole for r in range(len(search.rungs))]
        self.schedule = Schedule(
            trials=search.trials,
            ends=ends,
            eta=search.eta,
            in_flight=search.slots_in_flight,
            patience=search.population,
            baselines=len(study.baselines),
        )
        self.infeasible = 0
        self.began = time.monotonic()
        self.reported = 0.0
        self.work = 0.0
        """Virtual time of the jobs that ended in this life."""
        self.sampler.queue = [
            Proposal.of_baseline(name, genome, grammar) for name, genome in study.baseline_genomes()
        ]

    def run(self) -> None:
        self.store.tell("begin", study=self.study.name, workers=self.executor.workers)
        while True:
            self._start_what_can_start()
            job = self.schedule.due()
            if job is None:
                break
            while not self._known(job):
                self._take(self.executor.next())
                self._report("running")
            self._settle(job)
        for number in self.schedule.waiting():
            self._stop(number)
        # Jobs of trials that failed otherwise may still run; nobody waits for them.
        self.store.tell("complete")
        self._report("complete", force=True)

    def _start_what_can_start(self) -> None:
        while (action := self.schedule.decide()) is not None:
            if isinstance(action, Job):
                self._dispatch(action)
            else:
                self._propose(action)

    def _propose(self, action: Propose) -> None:
        number = len(self.trials)
        try:
            proposal = self.ledger.proposal(number)
        except Exhausted:
            self.schedule.exhaust()
            text = "the space holds no more candidates that are new"
            self.store.tell("remark", text=f"{text}; the search ends after {number} trials")
            return
        self.sampler.adopt(number, proposal)
        content = proposal.as_json()
        folder = self.store.trial_folder(number)
        if self.store.tell("start", number, **{k: content[k] for k in _SHOWN}):
            write_json(folder / "genome.json", content["genome"])
        self.trials[number] = TrialRecord(
            number,
            "running",
            **{k: content[k] for k in _SHOWN},
            started=self.store.when("start", number),
        )
        if proposal.feasible or proposal.baseline is not None:
            self._dispatch(self.schedule.start(number))
            return
        self.schedule.reject()
        self.ledger.tell(number, "infeasible")
        self._end(number, "infeasible")
        self.infeasible += 1
        if self.infeasible >= INFEASIBLE_PER_TRIAL * self.study.search.trials:
            self.schedule.trials = self.schedule.proposed
            text = f"{self.infeasible} infeasible candidates: the constraints leave too little"
            self.store.tell("remark", text=text)

    def forgive(self) -> None:
        """The jobs under way were interrupted on purpose: that is no start without an end."""
        for number in {key[0] for key in self.waiting}:
            forget_starts(self.store.trial_folder(number))

    def _known(self, job: Job) -> bool:
        stored = self.ledger.results.get(job.trial, {})
        return job.rung in stored or job.trial in self.ledger.failures

    def _dispatch(self, job: Job) -> None:
        if self._known(job):
            return
        folder = self.store.trial_folder(job.trial)
        kinds = ["measure"] if self.measured and job.rung == 0 else []
        for kind in [*kinds, "train"]:
            if starts(folder, job.rung, kind) >= MOST_STARTS:
                text = f"{MOST_STARTS} starts of rung {job.rung} ended with the driver"
                self.ledger.keep_failure(job.trial, Failure("abandoned", text))
                return
        for kind in [*kinds, "train"]:
            key = (job.trial, job.rung, kind)
            self.waiting[key] = None
            self.executor.submit(Task(key, self._payload(job, kind, folder)))

    def _payload(self, job: Job, kind: str, folder: Path) -> dict[str, Any]:
        study = self.study
        return {
            "trial": job.trial,
            "rung": job.rung,
            "kind": kind,
            "genome": self.trials[job.trial].genome,
            "folder": str(folder.absolute()),
            "seed": study.search.seed,
            "device": study.workers.device,
            "steps": study.steps(job.rung),
            "proxies": {k: p.model_dump(mode="json") for k, p in study.proxies.items()},
            "train": study.train.model_dump(mode="json"),
            "goals": [g.as_json() for g in self.measured],
        }

    def _take(self, outcome: Outcome) -> None:
        """A job ended, in whatever order: store what it gave once the trial's rung is whole."""
        number, rung, _ = outcome.key
        if number in self.ledger.failures:
            del self.waiting[outcome.key]
            return
        if outcome.failure is not None and outcome.failure.kind == "disk":
            self.forgive()
            raise OSError(ENOSPC, os.strerror(ENOSPC), outcome.failure.reason or None)
        if outcome.failure is not None:
            del self.waiting[outcome.key]
            self.ledger.keep_failure(number, outcome.failure)
            return
        self.waiting[outcome.key] = outcome
        parts = {k[2]: o for k, o in self.waiting.items() if k[:2] == (number, rung)}
        if any(o is None for o in parts.values()):
            return
        for kind in parts:
            del self.waiting[number, rung, kind]
        content = {k: o.content for k, o in parts.items() if o is not None}
        try:
            result = self._result(number, rung, content)
        except (KeyError, TypeError, ValueError) as error:
            text = f"the evaluation's answer is not as agreed: {type(error).__name__}: {error}"
            self.ledger.keep_failure(number, Failure("error", text))
            return
        self.ledger.keep_result(number, rung, result)
        self.store.tell("rung", number, result=result)
        self.work += self.schedule.duration(rung)

    def _result(
        self, number: int, rung: int, parts: Mapping[str, Mapping[str, Any] | None]
    ) -> dict[str, Any]:
        """The RungResult as JSON, from the answers of the jobs and the costs."""
        trained = parts["train"]
        assert trained is not None
        if rung == 0:
            measurements = dict((parts.get("measure") or {}).get("measurements", {}))
        else:
            measurements = self.ledger.results[number][0]["measurements"]
        genome = self.ledger.proposals[number].draw.genome
        values = {
            **cheap_values(self.goals, genome),
            **trained_values(self.goals, trained["scores"]),
            **{g.label: float(measurements[g.label]["median"]) for g in self.measured},
        }
        bad = [label for label, v in values.items() if not abs(v) < float("inf")]
        if bad:
            raise ValueError(f"{bad[0]} is {values[bad[0]]}")
        return {
            "rung": rung,
            "steps": dict(trained["steps"]),
            "scores": {k: dict(v) for k, v in trained["scores"].items()},
            "values": {g.label: values[g.label] for g in self.goals},
            "seconds": float(trained["seconds"]),
            "tokens": int(trained["tokens"]),
            "measurements": measurements,
            "statistics": dict(trained.get("statistics", {})),
        }

    def _settle(self, job: Job) -> None:
        """The job's virtual end: what it gave counts from here on."""
        number = job.trial
        stored = self.ledger.results.get(number, {}).get(job.rung)
        if stored is None:
            self.schedule.finish(job, None)
            failure = self.ledger.failures[number]
            self.trials[number].failure = failure
            self.ledger.tell(number, "failed")
            self._end(number, "failed", failure)
            self.store.drop_checkpoints(number)
            return
        record = self.trials[number]
        record.rungs.append(rung_result(stored))
        self.store.tell("rung", number, result=stored)
        losses = [g.loss(record.values[g.label]) for g in self.goals]
        stopped = self.schedule.finish(job, losses)
        self.sampler.observe(number, job.rung, losses)
        if job.rung == self.schedule.last:
            # A baseline is trained whatever the constraints say, and then stands off the front.
            feasible = all(v <= 0 for v in record.constraints.values())
            self.ledger.tell(number, "complete", [record.values[g.label] for g in self.goals])
            self._end(number, "complete" if feasible else "infeasible")
        elif self.ledger.was_stopped(number) and job.rung + 1 not in self.ledger.results[number]:
            # An earlier life ended here, before the study was given more trials.
            self.schedule.forget(number)
            stopped = [*(n for n in stopped if n != number), number]
        for n in stopped:
            self._stop(n)

    def _stop(self, number: int) -> None:
        if self.ledger.is_complete(number):
            # An earlier life, with fewer trials, took it to the top.
            self.trials[number].rungs = [
                rung_result(r) for _, r in sorted(self.ledger.results[number].items())
            ]
            self._end(number, "complete")
            return
        self.ledger.tell(number, "stopped")
        self._end(number, "stopped")
        self.store.drop_checkpoints(number)

    def _end(
        self,
        number: int,
        state: Literal["complete", "stopped", "infeasible", "failed"],
        failure: Failure | None = None,
    ) -> None:
        record = self.trials[number]
        record.state = state
        told = asdict(failure) if failure else None
        if self.store.tell("end", number, state=state, failure=told):
            record.finished = self.store.when("end", number)
            write_json(self.store.trial_folder(number) / "result.json", record.as_dict())

    def _report(self, state: Literal["running", "complete"], force: bool = False) -> None:
        if self.progress is None or (not force and time.monotonic() - self.reported < 0.5):
            return
        self.reported = time.monotonic()
        records = list(self.trials.values())
        found = outcome(
            self.goals, records, frame_of(self.goals, records, self.study.search.population)
        )
        searched = [t for t in records if t.baseline is None]
        finished = sum(t.state in ("complete", "stopped", "failed") for t in searched)
        elapsed = time.monotonic() - self.began
        left = self.schedule.work_left()
        eta = elapsed * left / self.work if self.work > 0 else None
        self.progress(
            Progress(
                state,
                finished,
                self.study.search.trials,
                sum(t.state == "running" for t in records),
                len(found.failed),
                len(found.infeasible),
                len(found.baselines),
                len(found.front),
                found.hypervolume,
                elapsed,
                eta,
            )
        )


_SHOWN = ("genome", "notation", "hash", "baseline", "parents", "variation", "constraints")
