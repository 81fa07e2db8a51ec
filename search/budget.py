"""Where a run's time went: per rung, per worker, and what stopping early saved."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

import numpy as np
from numpy.typing import NDArray

from .run import RunView


@dataclass(frozen=True)
class RungTime:
    """One rung over all trials."""

    rung: int
    trials: int
    seconds: float
    """Of all workers together."""


@dataclass(frozen=True)
class Saving:
    """What halving saved: for each trial that it stopped, the later rungs at that trial's own pace
    (seconds per step)."""

    trials: int
    seconds: float


@dataclass(frozen=True)
class Occupancy:
    """How busy the workers were. `edges` are seconds at work, one more than `shares`."""

    edges: tuple[float, ...]
    shares: tuple[float, ...]
    mean: float
    workers: int


def rung_times(run: RunView) -> list[RungTime]:
    """Time per rung, lowest rung first."""
    found: dict[int, list[float]] = {}
    for work in run.work:
        found.setdefault(work.rung, []).append(work.seconds)
    return [RungTime(r, len(s), sum(s)) for r, s in sorted(found.items())]


def saving(run: RunView) -> Saving:
    """What stopping early saved."""
    last = len(run.study.search.rungs) - 1
    whole = sum(run.study.steps(last).values())
    stopped = [t for t in run.trials if t.state == "stopped" and t.rungs]
    seconds = 0.0
    for trial in stopped:
        steps = sum(trial.rungs[-1].steps.values())
        pace = sum(r.seconds for r in trial.rungs) / max(1, steps)
        seconds += pace * max(0, whole - steps)
    return Saving(len(stopped), seconds)


def occupancy(run: RunView, bins: int = 40) -> Occupancy | None:
    """The share of the workers that trained, over the time that drivers were at work; None where
    nothing has ended. Measuring, starting and waiting do not count as training."""
    lives = [
        (_seconds(life.began), _seconds(life.last), max(1, life.workers)) for life in run.lives
    ]
    lives = [life for life in lives if life[1] > life[0]]
    if not lives or not run.work:
        return None
    total = sum(end - begin for begin, end, _ in lives)
    edges = np.linspace(0.0, total, bins + 1)
    busy, capacity = np.zeros(bins), np.zeros(bins)
    offset = 0.0
    for begin, end, workers in lives:
        capacity += workers * _covered(edges, offset, offset + end - begin)
        for work in run.work:
            finish = _seconds(work.at)
            if begin <= finish <= end:
                start = max(begin, finish - work.seconds)
                busy += _covered(edges, start - begin + offset, finish - begin + offset)
        offset += end - begin
    shares = np.minimum(1.0, busy / np.maximum(capacity, 1e-9))
    mean = float(min(1.0, busy.sum() / capacity.sum()))
    return Occupancy(tuple(edges), tuple(shares), mean, max(w for _, _, w in lives))


def _covered(edges: NDArray[np.float64], low: float, high: float) -> NDArray[np.float64]:
    """Seconds of each bin that lie between two times."""
    covered = np.minimum(edges[1:], high) - np.maximum(edges[:-1], low)
    found: NDArray[np.float64] = np.maximum(0.0, covered)
    return found


def _seconds(at: str) -> float:
    return datetime.fromisoformat(at).timestamp()
