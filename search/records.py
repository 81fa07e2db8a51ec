"""What is known of a trial: the driver writes it, every reader (front, report, CLI) sees it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from errno import EDQUOT, ENOSPC
from typing import Any, Literal

TrialState = Literal["running", "complete", "stopped", "infeasible", "failed"]
"""`complete`: trained to the last rung; only these stand on the front. `stopped`: halving ended it
at an earlier rung. `infeasible`: a constraint refused it. `failed`: see its failure."""

FailureKind = Literal["diverged", "memory", "timeout", "error", "disk", "worker-died", "abandoned"]
"""`disk`, a full one, is no fault of the trial: the driver stops and records nothing."""

FULL_DISK = (ENOSPC, EDQUOT)
"""The system's errors."""


@dataclass(frozen=True)
class Failure:
    """Why a trial failed, with a sentence for a person. `detail` may hold a traceback."""

    kind: FailureKind
    reason: str
    detail: str = ""


@dataclass(frozen=True)
class Measurement:
    """A measured quantity: median and spread of repeats, and the conditions it holds under."""

    median: float
    low: float
    """The 10th percentile of the repeats."""
    high: float
    """The 90th percentile."""
    unit: str
    repeats: int
    conditions: dict[str, Any] = field(default_factory=dict)
    """device, backend, dtype, batch, context, threads, versions."""
    slots: list[float] = field(default_factory=list)
    """Of a latency: the median seconds of each slot; empty for other quantities."""


@dataclass(frozen=True)
class RungResult:
    """One rung of one trial: all proxies trained to `steps`, scored, and the objectives' values."""

    rung: int
    steps: dict[str, int]
    """Steps trained so far, per proxy."""
    scores: dict[str, dict[str, float]]
    """Per proxy: `score` (in 0..1, higher is better) and every metric beside it."""
    values: dict[str, float]
    """Per objective, in the objective's own unit and direction."""
    seconds: float
    tokens: int
    measurements: dict[str, Measurement] = field(default_factory=dict)
    statistics: dict[str, Any] = field(default_factory=dict)
    """Loads of experts, chosen learning rates and the like."""


@dataclass
class TrialRecord:
    """One trial, whole."""

    number: int
    state: TrialState
    genome: dict[str, Any]
    """The genome in its JSON form, with the grammar version."""
    notation: str
    hash: str
    baseline: str | None = None
    """The baseline's name; None for a searched candidate."""
    parents: list[int] = field(default_factory=list)
    variation: str = "random"
    """How the genome came about, in words: `random`, `mutation: insert slot 3`, `crossover ...`."""
    rungs: list[RungResult] = field(default_factory=list)
    failure: Failure | None = None
    constraints: dict[str, float] = field(default_factory=dict)
    """Per constraint: how far it is exceeded, feasible where <= 0."""
    started: str = ""
    finished: str = ""
    """ISO 8601, UTC."""

    @property
    def values(self) -> dict[str, float]:
        """The objectives at the last rung reached; empty where none was."""
        return self.rungs[-1].values if self.rungs else {}

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)
