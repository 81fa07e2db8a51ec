"""The objectives that a study can choose. Directions and units stand here and nowhere else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, create_model

from ..genome.cost import cost
from ..genome.genome import Genome
from ..primitives.base import DTYPES

Direction = Literal["maximize", "minimize"]
Stage = Literal["cheap", "trained", "measured"]
DtypeName = Literal["fp64", "fp32", "fp16", "bf16"]


class Settings(BaseModel):
    """The settings of an objective; an unknown one is refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class NoSettings(Settings):
    """Nothing to set."""


class QualitySettings(Settings):
    """The weight of each proxy in the mean; a proxy that is not named weighs 1."""

    weights: dict[str, float] = Field(default_factory=dict)


class ScoreSettings(Settings):
    """Whose score."""

    proxy: str


class ContextSettings(Settings):
    """Tokens of one sequence."""

    context: int = Field(4096, ge=1)


class CacheSettings(ContextSettings):
    """Bytes that one sequence carries."""

    dtype: DtypeName = "bf16"


class LatencySettings(ContextSettings):
    """A call of the stand-alone model."""

    context: int = Field(512, ge=1)
    batch: int = Field(1, ge=1)
    dtype: DtypeName = "fp32"


class TrainingSettings(Settings):
    """A training step of the stand-alone model: forward, backward and the optimiser's step."""

    length: int = Field(128, ge=1)
    batch: int = Field(16, ge=1)
    dtype: DtypeName = "fp32"


@dataclass(frozen=True)
class Objective:
    """A row of the table. `stage`: cheap is counted before any training, trained comes from the
    proxies' scores, measured from the clock or the allocator."""

    name: str
    direction: Direction
    unit: str
    stage: Stage
    settings: type[Settings]
    summary: str
    bounds: tuple[float, float] | None = None
    """The range of values where the definition gives one."""


_ROWS = (
    Objective(
        "quality",
        "maximize",
        "score",
        "trained",
        QualitySettings,
        "weighted mean of the proxies' scores (equal weights unless `weights` says otherwise)",
        (0.0, 1.0),
    ),
    Objective(
        "score",
        "maximize",
        "score",
        "trained",
        ScoreSettings,
        "the score of one proxy, written score:<proxy>",
        (0.0, 1.0),
    ),
    Objective("params", "minimize", "parameters", "cheap", NoSettings, "parameters"),
    Objective(
        "active_params",
        "minimize",
        "parameters",
        "cheap",
        NoSettings,
        "parameters that one token uses",
    ),
    Objective(
        "flops_per_token",
        "minimize",
        "FLOPs",
        "cheap",
        ContextSettings,
        "floating-point operations of the forward pass, per token, at a context",
    ),
    Objective(
        "cache_bytes",
        "minimize",
        "bytes",
        "cheap",
        CacheSettings,
        "what one sequence carries at a context: key-value cache and recurrent state",
    ),
    Objective(
        "latency_prefill",
        "minimize",
        "s",
        "measured",
        LatencySettings,
        "time to read a context",
    ),
    Objective(
        "latency_decode",
        "minimize",
        "s",
        "measured",
        LatencySettings,
        "time of one decoding step after a context",
    ),
    Objective(
        "throughput",
        "maximize",
        "tokens/s",
        "measured",
        TrainingSettings,
        "tokens per second of training steps",
    ),
    Objective(
        "peak_memory",
        "minimize",
        "bytes",
        "measured",
        TrainingSettings,
        "most memory that training steps hold at once",
    ),
)
OBJECTIVES: dict[str, Objective] = {row.name: row for row in _ROWS}


@dataclass(frozen=True)
class Goal:
    """An objective as a study chose it: with its settings and a label of its own."""

    label: str
    objective: Objective
    settings: Settings

    def loss(self, value: float) -> float:
        """The value with the sign that makes less better."""
        return -value if self.objective.direction == "maximize" else value

    def loss_bounds(self) -> tuple[float, float] | None:
        bounds = self.objective.bounds
        if bounds is None:
            return None
        low, high = sorted(self.loss(b) for b in bounds)
        return low, high

    def as_json(self) -> dict[str, Any]:
        """What `goal_from_json` reads."""
        settings = self.settings.model_dump()
        return {"label": self.label, "name": self.objective.name, "settings": settings}


def goal_from_json(content: Mapping[str, Any]) -> Goal:
    objective = OBJECTIVES[content["name"]]
    settings = objective.settings.model_validate(content["settings"])
    return Goal(content["label"], objective, settings)


ObjectiveChoice: type[BaseModel] = create_model(
    "ObjectiveChoice",
    __config__=ConfigDict(extra="forbid", frozen=True),
    **{name: (row.settings | None, None) for name, row in OBJECTIVES.items()},  # type: ignore[call-overload]
)
"""One entry of a study's `objectives`, in the form {name: settings}; exactly one key is set."""


def spelled_out(entry: Any) -> Any:
    """An entry as the user may write it (`params`, `score:recall`, `{params: }`) in full."""
    if isinstance(entry, str):
        name, _, rest = entry.partition(":")
        return {name: {"proxy": rest}} if rest and name == "score" else {entry: {}}
    if isinstance(entry, Mapping):
        return {key: {} if value is None else value for key, value in entry.items()}
    return entry


def goals(choices: Sequence[BaseModel]) -> list[Goal]:
    """The goals of a study. A label is the objective's name, `score:<proxy>`, or, where a study has
    one objective more than once, the name with the settings: `cache_bytes@context=8192`."""
    chosen = []
    for choice in choices:
        name, settings = next((k, v) for k, v in choice if v is not None)
        assert isinstance(settings, Settings)
        label = f"score:{settings.proxy}" if isinstance(settings, ScoreSettings) else name
        chosen.append(Goal(label, OBJECTIVES[name], settings))
    labels = [goal.label for goal in chosen]
    return [
        Goal(_detailed(goal), goal.objective, goal.settings)
        if labels.count(goal.label) > 1
        else goal
        for goal in chosen
    ]


def _detailed(goal: Goal) -> str:
    parts = [f"{k}={v}" for k, v in goal.settings.model_dump().items()]
    return f"{goal.label}@{','.join(parts)}"


def cheap_values(chosen: Sequence[Goal], genome: Genome) -> dict[str, float]:
    """The values of the goals that need no training, per label."""
    return {g.label: _cheap(g, genome) for g in chosen if g.objective.stage == "cheap"}


def _cheap(goal: Goal, genome: Genome) -> float:
    settings = goal.settings
    if isinstance(settings, CacheSettings):
        whole = cost(genome, settings.context, DTYPES[settings.dtype])
        return float(whole.total.state_bytes)
    if isinstance(settings, ContextSettings):
        return float(cost(genome, settings.context).total.flops_per_token)
    total = cost(genome).total
    return float(total.params if goal.objective.name == "params" else total.active_params)


def trained_values(
    chosen: Sequence[Goal], scores: Mapping[str, Mapping[str, float]]
) -> dict[str, float]:
    """The values of the goals that come from scores: per proxy a mapping with key `score`."""
    values = {}
    for goal in chosen:
        if isinstance(goal.settings, ScoreSettings):
            values[goal.label] = float(scores[goal.settings.proxy]["score"])
        elif isinstance(goal.settings, QualitySettings):
            weights = {proxy: goal.settings.weights.get(proxy, 1.0) for proxy in scores}
            total = sum(weights[proxy] * scores[proxy]["score"] for proxy in scores)
            values[goal.label] = float(total / sum(weights.values()))
    return values
