"""Asynchronous halving by non-dominated rank, in virtual time: pure, without input or output.

Real workers finish in an order that differs from run to run. Decisions here follow a clock of their
own instead: a job takes as long as its training steps, `in_flight` jobs run at once, and jobs end
in the order of their virtual ends (equal ends: the lower trial first). So the same results make the
same decisions with one real worker, a hundred, or none (a replay from stored results).

The rule is that of asynchronous successive halving (Li et al., arXiv 1810.05934) with NSGA-II's
order in place of the loss: of the `n` trials that ended a rung, the best n // eta may go on.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from .pareto import Losses, best


@dataclass(frozen=True, order=True)
class Job:
    """Train trial `trial` up to rung `rung`."""

    trial: int
    rung: int


@dataclass(frozen=True)
class Propose:
    """A new trial is due; `baseline` is its index, or None for a searched candidate."""

    baseline: int | None = None


@dataclass
class _Rung:
    finished: list[int] = field(default_factory=list)
    table: Losses = field(default_factory=lambda: np.zeros((0, 0)))
    """Their losses, with room for more rows: making it anew at each judgement takes longer than
    the ranking."""
    paused: dict[int, int] = field(default_factory=dict)
    """Trial that waits here for promotion, and how many had ended the rung when it did."""
    judged: int = 0
    """n // eta when the rung was last judged."""
    promoted: int = 0
    top: list[int] = field(default_factory=list)
    """Paused trials among the best n // eta, best first: they go on as workers come free."""

    @property
    def losses(self) -> Losses:
        return self.table[: len(self.finished)]

    def add(self, trial: int, losses: Sequence[float]) -> None:
        count = len(self.finished)
        if count == len(self.table):
            larger = np.empty((max(64, 2 * count), len(losses)))
            larger[:count] = self.table[:count] if count else 0.0
            self.table = larger
        self.table[count] = losses
        self.finished.append(trial)


class Schedule:
    """The state machine. The caller alternates `decide` (until None), then `due` and `finish`.

    `ends[r]` is the virtual time at which a trial that starts at 0 ends rung r: its training steps.
    A paused trial is stopped for good once `patience` later trials have ended its rung while it
    stood outside the best n // eta; that bounds how many wait with their checkpoints on disk.
    """

    def __init__(
        self,
        *,
        trials: int,
        ends: Sequence[float],
        eta: int,
        in_flight: int,
        patience: int,
        baselines: int = 0,
    ) -> None:
        if list(ends) != sorted(set(ends)) or not ends or ends[0] <= 0:
            raise ValueError("the ends of the rungs increase and are above 0")
        if eta < 2 or in_flight < 1 or patience < 1:
            raise ValueError("eta is at least 2, in_flight and patience at least 1")
        self.trials = trials
        self.ends = tuple(float(e) for e in ends)
        self.eta = eta
        self.in_flight = in_flight
        self.patience = patience
        self.baselines = baselines
        self.now = 0.0
        self.proposed = 0
        """Searched candidates that were started."""
        self._baselines_proposed = 0
        self._pending: Propose | None = None
        self._running: list[tuple[float, int, int]] = []
        self._is_baseline: set[int] = set()
        self._onward: list[Job] = []
        self._rungs = [_Rung() for _ in ends]
        self._exhausted = False

    @property
    def last(self) -> int:
        """The index of the top rung."""
        return len(self.ends) - 1

    def running(self) -> list[Job]:
        """Jobs that were started and have not ended, in the order in which they will."""
        return [Job(trial, rung) for _, trial, rung in sorted(self._running)]

    def decide(self) -> Job | Propose | None:
        """What to start now: a job (it is counted as started), a proposal (call `start` or `reject`
        or `exhaust` next), or None when nothing can start before the next job ends."""
        if self._pending is not None:
            raise RuntimeError("answer the proposal before the next decision")
        if len(self._running) >= self.in_flight:
            return None
        if self._onward:
            return self._begin(self._onward.pop(0))
        if self._baselines_proposed < self.baselines:
            self._pending = Propose(self._baselines_proposed)
            return self._pending
        for r in range(self.last - 1, -1, -1):
            if self._rungs[r].top:
                return self._promote(r, self._rungs[r].top[0])
        if self.proposed < self.trials and not self._exhausted:
            self._pending = Propose()
            return self._pending
        if not self._running:
            return self._last_chance()
        return None

    def start(self, trial: int) -> Job:
        """Answer a proposal with the number of the new trial, which starts at rung 0."""
        proposal = self._answer()
        if proposal.baseline is not None:
            self._baselines_proposed += 1
            self._is_baseline.add(trial)
        else:
            self.proposed += 1
        return self._begin(Job(trial, 0))

    def reject(self) -> None:
        """Answer a proposal: that trial is infeasible and takes no worker. A baseline's turn is
        over; a searched candidate's place stays open."""
        if self._answer().baseline is not None:
            self._baselines_proposed += 1

    def exhaust(self) -> None:
        """Answer a proposal: there are no more candidates, now or later."""
        self._answer()
        self._exhausted = True

    def due(self) -> Job | None:
        """The job that ends next; None when none runs."""
        if not self._running:
            return None
        _, trial, rung = self._running[0]
        return Job(trial, rung)

    def finish(self, job: Job, losses: Sequence[float] | None) -> list[int]:
        """The due job ended with these losses, None where it failed. Returns trials to stop."""
        if self.due() != job:
            raise RuntimeError(f"{job} is not the job that is due")
        self.now, _, _ = heapq.heappop(self._running)
        if losses is None:
            return []
        if job.trial in self._is_baseline:
            if job.rung < self.last:
                self._onward.append(Job(job.trial, job.rung + 1))
            return []
        rung = self._rungs[job.rung]
        rung.add(job.trial, losses)
        if job.rung == self.last:
            return []
        rung.paused[job.trial] = len(rung.finished)
        return self._judge(rung)

    def forget(self, trial: int) -> None:
        """The trial was stopped in an earlier life of the run and cannot go on."""
        for rung in self._rungs:
            rung.paused.pop(trial, None)
            if trial in rung.top:
                rung.top.remove(trial)

    def duration(self, rung: int) -> float:
        """The virtual time of a job of that rung."""
        return self.ends[rung] - (self.ends[rung - 1] if rung else 0.0)

    def work_left(self) -> float:
        """The virtual time of the jobs that are still to end, about: promotions are one in eta."""
        started = self._baselines_proposed
        left = (self.baselines - started) * self.ends[-1]
        for rung in range(len(self.ends)):
            candidates = self.trials / self.eta**rung
            done = len(self._rungs[rung].finished)
            left += max(0.0, candidates - done) * self.duration(rung)
        left += sum(
            self.ends[-1] - self.ends[j.rung - 1] if j.rung else self.ends[-1]
            for j in self.running()
            if j.trial in self._is_baseline
        )
        return left

    def waiting(self) -> list[int]:
        """Trials that are paused below the top rung."""
        return sorted(t for rung in self._rungs for t in rung.paused)

    def _answer(self) -> Propose:
        if self._pending is None:
            raise RuntimeError("no proposal is open")
        proposal, self._pending = self._pending, None
        return proposal

    def _begin(self, job: Job) -> Job:
        end = self.now + self.duration(job.rung)
        heapq.heappush(self._running, (end, job.trial, job.rung))
        return job

    def _promote(self, r: int, trial: int) -> Job:
        rung = self._rungs[r]
        rung.paused.pop(trial)
        if trial in rung.top:
            rung.top.remove(trial)
        rung.promoted += 1
        return self._begin(Job(trial, r + 1))

    def _judge(self, rung: _Rung) -> list[int]:
        """Rank the rung anew. Only when n // eta has grown: the ranking of a large rung takes
        milliseconds, and no more than that many can go on anyway."""
        count = len(rung.finished) // self.eta
        if count == rung.judged:
            return []
        rung.judged = count
        good = [rung.finished[i] for i in best(rung.losses, count)]
        rung.top = [t for t in good if t in rung.paused]
        tired = [
            trial
            for trial, since in rung.paused.items()
            if trial not in rung.top and len(rung.finished) - since >= self.patience
        ]
        for trial in tired:
            del rung.paused[trial]
        return tired

    def _last_chance(self) -> Job | None:
        """At the end a rung that never sent anyone on sends its best, so that a short search ends
        with a trained candidate too."""
        for r in range(self.last - 1, -1, -1):
            rung = self._rungs[r]
            if rung.promoted or not rung.paused:
                continue
            for i in best(rung.losses, len(rung.finished)):
                if rung.finished[i] in rung.paused:
                    return self._promote(r, rung.finished[i])
        return None
