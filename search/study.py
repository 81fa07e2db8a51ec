"""The study: what a user asks, as one YAML file, checked before anything is created."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    field_validator,
    model_validator,
)

from ..genome import presets
from ..genome.genome import Genome
from ..genome.notation import parse
from ..genome.quantity import Bytes
from ..genome.resolve import acausal
from ..genome.rules import require_valid
from ..genome.space import Space
from ..genome.space_check import SpaceError, check_space
from ..primitives.base import GeneError
from ..proxies.recipe import TrainConfig
from ..proxies.task import LEAKS, ProxyError
from ..proxies.tasks import TASKS, ProxyConfig, make_task
from .objectives import Goal, ObjectiveChoice, QualitySettings, ScoreSettings, goals, spelled_out
from .study_check import missing_device, unloadable, unopenable, unwritable
from .study_file import Key, StudyError, StudyFile

DEFAULT_EVALUATE = "mendel.search.evaluate:evaluate"

DEFAULT_BASELINES = (
    "transformer++",
    "mamba2",
    "striped",
    "jamba-like",
    "griffin-like",
    "samba-like",
)
"""The presets that run in every study that does not choose its own."""

Strict = ConfigDict(extra="forbid", frozen=True)
WholeNumber = Annotated[int, Field(strict=True)]


class SearchConfig(BaseModel):
    """How candidates are proposed and halved."""

    model_config = Strict

    sampler: Literal["evolution", "random", "tpe"] = "evolution"
    trials: WholeNumber = Field(64, ge=1, description="candidates trained, baselines not counted")
    population: WholeNumber = Field(16, ge=2, description="parents that survive (NSGA-II)")
    seed: WholeNumber = Field(0, ge=0)
    rungs: tuple[float, ...] = Field((1.0,), min_length=1, description="shares of the steps")
    eta: WholeNumber = Field(3, ge=2, description="one in eta goes on to the next rung")
    in_flight: WholeNumber | None = Field(
        None, ge=1, description="trials under way at once; absent: the population"
    )
    crossover: float = Field(0.9, ge=0, le=1, description="share of children with two parents")
    tournament: WholeNumber = Field(2, ge=1, description="trials that compete to be a parent")

    @field_validator("rungs")
    @classmethod
    def _rising(cls, rungs: tuple[float, ...]) -> tuple[float, ...]:
        if list(rungs) != sorted(set(rungs)) or rungs[0] <= 0 or rungs[-1] != 1.0:
            raise ValueError("rungs are shares of the steps that rise from above 0 to 1.0")
        return rungs

    @property
    def slots_in_flight(self) -> int:
        """How many trials are under way at once, in virtual time."""
        return self.population if self.in_flight is None else self.in_flight


class WorkersConfig(BaseModel):
    """Where candidates are trained."""

    model_config = Strict

    executor: Literal["serial", "ray"] = "ray"
    count: WholeNumber | Literal["auto"] = Field("auto")
    threads: WholeNumber = Field(1, ge=1, description="torch threads of a worker")
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    time_limit: float | None = Field(None, gt=0, description="seconds of one rung of one trial")
    memory_limit: Annotated[Bytes, Field(ge=1)] | None = Field(
        None, description="bytes beside the worker's own"
    )
    recycle: WholeNumber = Field(100, ge=1, description="jobs after which a worker starts afresh")

    @field_validator("count")
    @classmethod
    def _some(cls, count: int | str) -> int | str:
        if isinstance(count, int) and count < 1:
            raise ValueError("count is `auto` or a whole number of at least 1")
        return count


class Baseline(BaseModel):
    """A design that always runs: a preset's name, or a name with a genome in notation."""

    model_config = Strict

    name: str = Field(min_length=1)
    genome: str | None = None


def _baseline(entry: Any) -> Any:
    return {"name": entry} if isinstance(entry, str) else entry


class Study(BaseModel):
    """A study. Every key is checked; an unknown one is refused."""

    model_config = Strict

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    question: str = ""
    space: Space
    proxies: dict[str, ProxyConfig] = Field(min_length=1)
    train: TrainConfig = Field(default_factory=lambda: TrainConfig.model_validate({}))
    objectives: tuple[Annotated[ObjectiveChoice, BeforeValidator(spelled_out)], ...] = Field(  # type: ignore[valid-type]
        min_length=1
    )
    search: SearchConfig = Field(default_factory=lambda: SearchConfig.model_validate({}))
    baselines: tuple[Annotated[Baseline, BeforeValidator(_baseline)], ...] = Field(
        tuple(Baseline(name=name) for name in DEFAULT_BASELINES),
        description="designs that always run; [] for none",
    )
    workers: WorkersConfig = Field(default_factory=lambda: WorkersConfig.model_validate({}))
    runs: Path = Path("runs")
    storage: str | None = Field(None, description="an Optuna storage URL instead of the journal")
    evaluate: str = Field(DEFAULT_EVALUATE, pattern=r"^[\w.]+:\w+$")

    _text: str = PrivateAttr(default="")
    _file: StudyFile | None = PrivateAttr(default=None)
    _goals: list[Goal] = PrivateAttr(default_factory=list)

    @field_validator("objectives")
    @classmethod
    def _one_each(cls, choices: tuple[BaseModel, ...]) -> tuple[BaseModel, ...]:
        for choice in choices:
            if sum(value is not None for _, value in choice) != 1:
                raise ValueError("an objective is a name, or one name with its settings")
        labels = [goal.label for goal in goals(choices)]
        for label in labels:
            if labels.count(label) > 1:
                raise ValueError(f"{label.partition('@')[0]} stands twice")
        return choices

    @model_validator(mode="after")
    def _proxies_exist(self) -> Study:
        self._goals = goals(self.objectives)
        for goal in self._goals:
            named: list[str] = []
            if isinstance(goal.settings, ScoreSettings):
                named = [goal.settings.proxy]
            elif isinstance(goal.settings, QualitySettings):
                named = list(goal.settings.weights)
                weights = [goal.settings.weights.get(p, 1.0) for p in self.proxies]
                if min(weights) < 0 or sum(weights) <= 0:
                    raise ValueError("objectives: weights are at least 0, and one is above 0")
            for proxy in named:
                if proxy not in self.proxies:
                    raise ValueError(
                        f"objectives: no proxy is named {proxy!r}; "
                        f"there are {', '.join(self.proxies)}"
                    )
        names = [b.name for b in self.baselines]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"baselines: {name} stands twice")
        return self

    @property
    def goals(self) -> list[Goal]:
        """The objectives, in order, each with its label, settings and direction."""
        return self._goals

    @property
    def text(self) -> str:
        """The study as YAML: as the user wrote it where no option changed it."""
        return self._text or yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    @property
    def folder(self) -> Path:
        """The folder of the run."""
        return self.runs / self.name

    def moved(self, runs: Path) -> Study:
        """The same study with its runs in another folder, which its file then does not name."""
        moved = self.model_copy(update={"runs": runs})
        moved._file = None
        return moved

    def error(self, key: Key, sentence: str) -> StudyError:
        """The error at a key, with its place where the study was read from a file."""
        if self._file is not None:
            return self._file.error(key, sentence)
        return StudyError(f"{'.'.join(map(str, key))}: {' '.join(sentence.split())}")

    def _equal_rungs(self) -> str | None:
        """Which rungs end at the same step of a proxy."""
        ends = [self.steps(rung) for rung in range(len(self.search.rungs))]
        for rung, (before, end) in enumerate(pairwise(ends)):
            for proxy, step in end.items():
                if step == before[proxy]:
                    low, high = self.search.rungs[rung : rung + 2]
                    return (
                        f"{low:g} and {high:g} of the {self.proxies[proxy].steps} steps of "
                        f"{proxy} both end at step {step}; each rung ends at a step of its own"
                    )
        return None

    def problem(self) -> tuple[Key, str] | None:
        """The first key that cannot be served, on this machine or at all, and why; nothing is
        created."""
        checks: list[tuple[Key, str | None]] = [
            (("search", "rungs"), self._equal_rungs()),
            (("evaluate",), unloadable(self.evaluate)),
            (("storage",), None if self.storage is None else unopenable(self.storage)),
            (("workers", "device"), missing_device(self.workers.device)),
            (("runs",), unwritable(self.folder)),
        ]
        return next(((key, why) for key, why in checks if why is not None), None)

    def steps(self, rung: int) -> dict[str, int]:
        """Steps that each proxy has trained at the end of a rung, at least one."""
        share = self.search.rungs[rung]
        return {k: max(1, round(share * p.steps)) for k, p in self.proxies.items()}

    def baseline_genomes(self) -> list[tuple[str, Genome]]:
        """Name and genome of each baseline, at the study's width and depth where a preset scales.

        Raises GeneError with a sentence."""
        return [(b.name, baseline_genome(b, self.space)) for b in self.baselines]


def baseline_genome(baseline: Baseline, space: Space) -> Genome:
    """A baseline's genome: its notation, or its preset in the largest size that the study allows.

    Presets keep the published order of operators; the study gives width and depth.
    """
    width, depth = max(space.width), space.depth[1]
    if baseline.genome is not None:
        return parse(baseline.genome, width=width)
    return presets.load(baseline.name, width=width, depth=depth)


def load_study(
    path: Path | str, overrides: Mapping[str, Any] | None = None, *, check: bool = True
) -> Study:
    """Read and check a study. `overrides` maps dotted keys to values: {"search.trials": 8}.

    With `check` it also draws genomes, makes the baselines, reads the proxies' text and looks
    whether the runs folder can be written; nothing is created. Raises StudyError with one line:
    file, line, column, key, what is allowed.
    """
    file = StudyFile.read(path, overrides or {})
    try:
        study = Study.model_validate(file.data)
    except ValidationError as error:
        raise file.explain(error, Study, lambda key: _task_keys(key, file.data)) from None
    study._text, study._file = file.text, file
    if check:
        _check(study, file)
    return study


def _task_keys(key: tuple[str | int, ...], data: dict[str, Any]) -> list[str] | None:
    """The keys of a proxy: its own and those of its task, which stand flat beside them."""
    if len(key) != 2 or key[0] != "proxies":
        return None
    task = data["proxies"][key[1]].get("task")
    settings = TASKS[task].settings.model_fields if task in TASKS else {}
    return ["task", "steps", "batch", *settings]


def _leak(study: Study) -> tuple[Key, str] | None:
    """The first design that the study allows though it reads later tokens where a proxy predicts
    them or an objective decodes: its key, and why that cannot be."""
    ends = [
        LEAKS.format(task=f"{proxy.task} (proxies.{name})")
        for name, proxy in study.proxies.items()
        if not TASKS[proxy.task].bidirectional
    ]
    decoded = any(goal.objective.name == "latency_decode" for goal in study.goals)
    ends += ["it decodes nothing, so it has no latency_decode"] if decoded else []
    if not ends:
        return None
    for place, words in study.space.readers_ahead():
        return ("space", *place), f"{words}; {ends[0]}"
    for index, baseline in enumerate(study.baselines):
        reader = acausal(baseline_genome(baseline, study.space))
        if reader is not None:
            return ("baselines", index), f"{reader}; {ends[0]}"
    return None


def _check(study: Study, file: StudyFile) -> None:
    """What only a look at the machine or a draw from the space can tell."""
    for index, baseline in enumerate(study.baselines):
        try:
            require_valid(baseline_genome(baseline, study.space))
        except (GeneError, ValueError) as error:
            chosen = "baselines" in study.model_fields_set
            hint = "" if chosen else f" ({baseline.name} runs unless baselines: names others or [])"
            raise file.error(("baselines", index), f"{error}{hint}") from None
    if (leak := _leak(study)) is not None:
        raise file.error(*leak)
    try:
        check_space(study.space, seed=study.search.seed)
    except SpaceError as error:
        key, _, sentence = str(error).partition(": ")
        raise file.error(tuple(key.split(".")), sentence) from None
    for name, proxy in study.proxies.items():
        try:
            make_task(proxy, study.search.seed)
        except ProxyError as error:
            names_text = getattr(proxy.settings, "text", None) is not None
            place = ("proxies", name, "text") if names_text else ("proxies", name)
            raise file.error(place, str(error)) from None
    if (found := study.problem()) is not None:
        raise file.error(*found)


__all__ = ["Study", "StudyError", "load_study"]
