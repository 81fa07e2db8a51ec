"""What in a genome goes with what in its results: traits, importances, rank correlations.

Importance is optuna's PED-ANOVA (Watanabe et al., arXiv 2304.10255): how much a trait's values
among the best tenth of the trials differ from those among all. Its sign and size against an
objective are told by Spearman's rank correlation. Both describe the trials of a search, which went
where results were good: they are hints for the next study, not effects of causes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
)
from optuna.importance import PedAnovaImportanceEvaluator

from ..primitives.base import GeneError
from ..primitives.catalogue import find
from .objectives import Goal
from .records import TrialRecord

Trait = float | str
LEAST_TRIALS = 12
"""Fewer say nothing."""
MOST_TRIALS = 400
"""More are thinned evenly; the importances settle long before."""
TRAITS = {
    "attention share": "share of the mixer slots that hold attention",
    "first attention": "where attention first stands, 0 at the input to 1 at the end; 1 without",
    "parallel share": "share of the mixer slots with parallel branches; 0 is all serial",
    "depth": "number of slots",
}
"""Numeric traits that every genome has."""


@dataclass(frozen=True)
class Effect:
    """One trait against one objective. `rank` is Spearman's correlation with the objective's value,
    None for a trait that is no number."""

    trait: str
    importance: float
    rank: float | None
    trials: int


def traits(genome: Mapping[str, Any]) -> dict[str, Trait]:
    """The traits of a genome in its JSON form: counts of operators, axes, positions, shape."""
    slots = [slot.get("parallel", [slot]) for slot in genome["slots"]]
    found: dict[str, Trait] = {"depth": float(len(slots)), "width": float(genome["width"])}
    found["position encoding"] = str(genome.get("position", "rope"))
    found["norm"] = str(genome.get("norm", "rmsnorm"))
    mixers = attention = parallel = 0
    first = 1.0
    for i, branches in enumerate(slots):
        names = [str(op["op"]) for op in branches]
        found[f"slot {i} is"] = " | ".join(names)
        kinds = [_kind(name) for name in names]
        for op, name in zip(branches, names, strict=True):
            found[f"share of {name}"] = float(found.get(f"share of {name}", 0.0)) + 1 / len(slots)
            for axis, value in op.get("genes", {}).items():
                number = isinstance(value, int | float) and not isinstance(value, bool)
                found[f"{name}.{axis}"] = float(value) if number else str(value)
        if any(kind != "channel" for kind in kinds):
            mixers += 1
            parallel += len(branches) > 1
            if "attention" in kinds:
                attention += 1
                first = min(first, i / max(1, len(slots) - 1))
    found["attention share"] = attention / mixers if mixers else 0.0
    found["parallel share"] = parallel / mixers if mixers else 0.0
    found["first attention"] = first
    found["routed joins"] = float(sum(s.get("join") in ("gate", "top1") for s in genome["slots"]))
    found["tokens per slot"] = sum(s.get("tokens", 1.0) for s in genome["slots"]) / len(slots)
    found["shared weights"] = float(sum("weights" in op for ops in slots for op in ops))
    found["shared features"] = float(sum("features" in op for ops in slots for op in ops))
    return found


def _kind(name: str) -> str:
    """`channel`, `attention` or `mixer`; a name that this version does not know is a mixer."""
    try:
        primitive, _ = find(name)
    except GeneError:
        return "mixer"
    return "attention" if primitive.attends else primitive.kind


def judged(trials: Sequence[TrialRecord]) -> list[TrialRecord]:
    """The trials that effects are computed over: complete ones, thinned evenly where many."""
    complete = [t for t in trials if t.state == "complete"]
    if len(complete) <= MOST_TRIALS:
        return complete
    picked = np.linspace(0, len(complete) - 1, MOST_TRIALS).round().astype(int)
    return [complete[i] for i in picked]


def effects(trials: Sequence[TrialRecord], goal: Goal) -> list[Effect]:
    """The traits in order of their importance for one objective; none for too few trials."""
    if len(trials) < LEAST_TRIALS:
        return []
    rows = [traits(t.genome) for t in trials]
    values = np.array([t.values[goal.label] for t in trials])
    columns = _columns(rows)
    if not columns or values.max() == values.min():
        return []
    shares = _importances(columns, values, goal)
    found = []
    for name, column in columns.items():
        numbers = np.array([v if isinstance(v, float) else math.nan for v in column])
        known = np.isfinite(numbers)
        rank = spearman(numbers[known], values[known]) if known.sum() >= LEAST_TRIALS else None
        found.append(Effect(name, shares.get(name, 0.0), rank, len(trials)))
    return sorted(found, key=lambda e: (-e.importance, e.trait))


def _columns(rows: Sequence[Mapping[str, Trait]]) -> dict[str, list[Trait]]:
    """Per trait that varies its value in every genome; a share that is absent is 0, an axis or a
    position that is absent is the word `absent`."""
    names = sorted({name for row in rows for name in row})
    columns: dict[str, list[Trait]] = {}
    for name in names:
        missing: Trait = 0.0 if name.startswith("share of ") else "absent"
        column = [row.get(name, missing) for row in rows]
        if len(set(column)) > 1:
            columns[name] = column
    return columns


def _importances(
    columns: Mapping[str, Sequence[Trait]], values: NDArray[np.float64], goal: Goal
) -> dict[str, float]:
    """Optuna's PED-ANOVA over a study in memory; shares that sum to 1."""
    space: dict[str, BaseDistribution] = {}
    coded: dict[str, list[Trait]] = {}
    for name, column in columns.items():
        if all(isinstance(v, float) for v in column):
            numbers = [float(v) for v in column]
            space[name] = FloatDistribution(min(numbers), max(numbers))
            coded[name] = list(column)
        else:
            coded[name] = [str(v) for v in column]
            space[name] = CategoricalDistribution(sorted({str(v) for v in column}))
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        study = optuna.create_study(direction=goal.objective.direction)
        study.add_trials(
            [
                optuna.create_trial(
                    params={name: column[i] for name, column in coded.items()},
                    distributions=space,
                    value=float(value),
                )
                for i, value in enumerate(values)
            ]
        )
        return optuna.importance.get_param_importances(
            study, evaluator=PedAnovaImportanceEvaluator()
        )
    finally:
        optuna.logging.set_verbosity(level)


def spearman(a: NDArray[np.float64], b: NDArray[np.float64]) -> float | None:
    """Spearman's rank correlation, equal values share their mean rank; None without spread."""
    if len(a) < 2:
        return None
    x, y = _ranks(a), _ranks(b)
    x, y = x - x.mean(), y - y.mean()
    size = math.sqrt(float(x @ x) * float(y @ y))
    return float(x @ y) / size if size > 0 else None


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    means: NDArray[np.float64] = (ends - (counts - 1) / 2.0)[inverse]
    return means
