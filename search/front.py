"""The outcome of a run, sorted: front, baselines, stopped, infeasible and failed trials."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from . import pareto
from .objectives import Goal
from .records import Measurement, TrialRecord
from .run import RunView
from .terminal import Mistake
from .units import value_text


@dataclass(frozen=True)
class Outcome:
    """Trials by what became of them. Every trial stands in exactly one of the lists that are not
    `baselines`; `baselines` repeats those that the study's baselines are, whatever their state."""

    goals: tuple[Goal, ...]
    front: tuple[TrialRecord, ...]
    """Complete trials that no other dominates, the best in the first objective first."""
    dominated: tuple[TrialRecord, ...]
    stopped: tuple[TrialRecord, ...]
    infeasible: tuple[TrialRecord, ...]
    failed: tuple[TrialRecord, ...]
    running: tuple[TrialRecord, ...]
    baselines: tuple[TrialRecord, ...]
    knee: int | None
    """The number of the front's member that is farthest below the line through the ends."""
    history: tuple[tuple[int, float], ...]
    """(trial, hypervolume) after each complete trial, in the order in which they finished."""

    @property
    def complete(self) -> tuple[TrialRecord, ...]:
        return self.front + self.dominated

    @property
    def hypervolume(self) -> float:
        return self.history[-1][1] if self.history else 0.0

    @property
    def searched(self) -> int:
        """Trials that are no baselines."""
        everything = self.complete + self.stopped + self.infeasible + self.failed + self.running
        return sum(t.baseline is None for t in everything)


def losses(goals: Sequence[Goal], trials: Sequence[TrialRecord]) -> pareto.Losses:
    """One row per trial, one column per goal, less is better."""
    return pareto.as_losses([[g.loss(t.values[g.label]) for g in goals] for t in trials])


def outcome_of(run: RunView, labels: Sequence[str] | None = None) -> Outcome:
    """The outcome of a run, in the study's objectives or in those of them that `labels` names.

    Raises Mistake for a label that the study does not have."""
    if labels is None:
        return outcome(run.goals, run.trials, run.frame())
    frame = run.frame()
    known = [goal.label for goal in run.goals]
    for label in labels:
        if label not in known:
            raise Mistake(f"the run has no objective {label!r}; it has {', '.join(known)}")
    if not labels or len(set(labels)) != len(labels):
        raise Mistake("name one objective or more, each once")
    columns = [known.index(label) for label in labels]
    chosen = pareto.Frame(
        tuple(frame.low[i] for i in columns), tuple(frame.high[i] for i in columns)
    )
    return outcome([run.goals[i] for i in columns], run.trials, chosen)


def outcome(goals: Sequence[Goal], trials: Sequence[TrialRecord], frame: pareto.Frame) -> Outcome:
    """Sort trials by these goals; `frame` normalises their losses for the hypervolume."""
    by_state: dict[str, list[TrialRecord]] = {}
    for trial in trials:
        by_state.setdefault(trial.state, []).append(trial)
    complete = by_state.get("complete", [])
    rows = losses(goals, complete)
    on_front = set(pareto.front(rows))
    front = sorted((complete[i] for i in on_front), key=lambda t: _order(goals, t))
    best = pareto.knee(losses(goals, front))
    return Outcome(
        tuple(goals),
        tuple(front),
        tuple(t for i, t in enumerate(complete) if i not in on_front),
        tuple(by_state.get("stopped", [])),
        tuple(by_state.get("infeasible", [])),
        tuple(by_state.get("failed", [])),
        tuple(by_state.get("running", [])),
        tuple(t for t in trials if t.baseline is not None),
        None if best is None else front[best].number,
        tuple(_history(goals, complete, frame)),
    )


def _order(goals: Sequence[Goal], trial: TrialRecord) -> tuple[float, ...]:
    return (*(g.loss(trial.values[g.label]) for g in goals), trial.number)


def _history(
    goals: Sequence[Goal], complete: Sequence[TrialRecord], frame: pareto.Frame
) -> list[tuple[int, float]]:
    ordered = sorted(complete, key=lambda t: (t.finished, t.number))
    rows = losses(goals, ordered)
    volumes = frame.hypervolume_history(rows)
    return [(t.number, v) for t, v in zip(ordered, volumes, strict=True)]


def measurement(trial: TrialRecord, label: str) -> Measurement | None:
    """The measurement behind a value of the trial's last rung, where the value was measured."""
    return trial.rungs[-1].measurements.get(label) if trial.rungs else None


def shown_value(trial: TrialRecord, goal: Goal) -> str:
    """A trial's value for people, with the spread of its repeats where it was measured."""
    if goal.label not in trial.values:
        return ""
    text = value_text(trial.values[goal.label], goal.objective.unit)
    found = measurement(trial, goal.label)
    if found is not None and found.high > found.low:
        low, high = (value_text(v, goal.objective.unit) for v in (found.low, found.high))
        if low == high:
            return text
        # A unit that both ends share stands once.
        number, _, unit = low.partition(" ")
        return f"{text} ({number if high.endswith(f' {unit}') else low} to {high})"
    return text


def label_text(goal: Goal) -> str:
    """The objective's label with the direction that is better."""
    return f"{goal.label} {'↑' if goal.objective.direction == 'maximize' else '↓'}"


def goal_dict(goal: Goal) -> dict[str, Any]:
    return {
        "label": goal.label,
        "direction": goal.objective.direction,
        "unit": goal.objective.unit,
        "summary": goal.objective.summary,
        "settings": goal.settings.model_dump(),
    }


def trial_dict(trial: TrialRecord) -> dict[str, Any]:
    """What a listing says of a trial."""
    last = trial.rungs[-1] if trial.rungs else None
    shown: dict[str, Any] = {
        "trial": trial.number,
        "baseline": trial.baseline,
        "state": trial.state,
        "notation": trial.notation,
        "hash": trial.hash,
        "values": trial.values,
        "scores": last.scores if last else {},
        "steps": last.steps if last else {},
        "parents": trial.parents,
        "variation": trial.variation,
    }
    if last and last.measurements:
        shown["measurements"] = {k: _measurement_dict(m) for k, m in last.measurements.items()}
    if trial.state == "infeasible":
        shown["constraints"] = trial.constraints
    if trial.failure is not None:
        shown["failure"] = {"kind": trial.failure.kind, "reason": trial.failure.reason}
    return shown


def _measurement_dict(found: Measurement) -> Mapping[str, Any]:
    shown = asdict(found)
    if not found.slots:
        del shown["slots"]
    return shown


def outcome_dict(found: Outcome) -> dict[str, Any]:
    """The outcome as JSON."""
    return {
        "objectives": [goal_dict(goal) for goal in found.goals],
        "hypervolume": found.hypervolume,
        "knee": found.knee,
        "front": [trial_dict(t) for t in found.front],
        "baselines": [trial_dict(t) for t in found.baselines],
        "dominated": [trial_dict(t) for t in found.dominated],
        "stopped": [trial_dict(t) for t in found.stopped],
        "infeasible": [trial_dict(t) for t in found.infeasible],
        "failed": [trial_dict(t) for t in found.failed],
        "running": [trial_dict(t) for t in found.running],
        "history": [{"trial": n, "hypervolume": v} for n, v in found.history],
    }
