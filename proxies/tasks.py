"""The table of proxy tasks. Adding a task is one file and one row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializeAsAny,
    field_validator,
    model_serializer,
    model_validator,
)

from . import copying, masked, recall, text
from .task import ProxyError, Task


@dataclass(frozen=True)
class TaskRow:
    """A task: its settings, how to make it, what its score means, where it comes from."""

    name: str
    summary: str
    source: str
    score: str
    settings: type[BaseModel]
    make: Callable[[Any, int], Task]
    """From an instance of `settings` and a seed."""
    bidirectional: bool = False
    """The task's own `bidirectional`, known before it is made."""


_MAD = "MAD, arXiv 2403.17844"

_ROWS = (
    TaskRow(
        recall.NAME,
        "pairs of key and value; the value of a key that was seen before is asked",
        _MAD,
        "accuracy per asked value",
        recall.RecallSettings,
        recall.make_recall,
    ),
    TaskRow(
        copying.NAME,
        "tokens scattered among blanks are repeated in order at the end",
        _MAD,
        "accuracy per copied token",
        copying.CopyingSettings,
        copying.make_copying,
        bidirectional=True,
    ),
    TaskRow(
        text.NAME,
        "the next byte of real text; by default the source of Python's standard library",
        "byte-level language modelling, bits per byte on held-out text",
        "1 - bits per byte / 8, at least 0",
        text.TextSettings,
        text.make_text,
    ),
    TaskRow(
        masked.NAME,
        "hidden bytes of the same text, from both sides; for designs that read later tokens too",
        "masked language modelling (BERT, arXiv 1810.04805) on bytes",
        "1 - bits per hidden byte / 8, at least 0",
        masked.MaskedSettings,
        masked.make_masked,
        bidirectional=True,
    ),
)

TASKS: dict[str, TaskRow] = {row.name: row for row in _ROWS}


class ProxyConfig(BaseModel):
    """A proxy as a study writes it, flat: `task`, `steps`, `batch` and the task's own settings.

    The task's settings are checked by its own model and kept in `settings`; errors and dumps are
    flat, as the study is.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    task: str = Field(description="a name in `mendel tasks`")
    steps: int = Field(ge=1, description="training steps of a whole training")
    batch: int = Field(default=32, ge=1, description="sequences per step")
    settings: SerializeAsAny[BaseModel]

    @model_validator(mode="before")
    @classmethod
    def _split(cls, data: object) -> object:
        """Move what is not a proxy's own key into the settings of its task."""
        if not isinstance(data, dict) or isinstance(data.get("settings"), BaseModel):
            return data
        name = data.get("task")
        row = TASKS.get(name) if isinstance(name, str) else None
        if row is None:
            return {**data, "settings": _Unknown()}
        own = {key: data[key] for key in ("task", "steps", "batch") if key in data}
        rest = {key: value for key, value in data.items() if key not in own}
        return {**own, "settings": row.settings.model_validate(rest)}

    @field_validator("task")
    @classmethod
    def _known(cls, task: str) -> str:
        if task not in TASKS:
            raise ValueError(f"no task is named {task!r}; there are {', '.join(TASKS)}")
        return task

    @model_serializer
    def _flat(self) -> dict[str, Any]:
        head = {"task": self.task, "steps": self.steps, "batch": self.batch}
        return {**head, **self.settings.model_dump()}


class _Unknown(BaseModel):
    """Stands for the settings of a task that does not exist, whose name is the error."""


def find_task(name: str) -> TaskRow:
    """The row of that name, or ProxyError with the names that there are."""
    try:
        return TASKS[name]
    except KeyError:
        raise ProxyError(f"no task is named {name!r}; there are {', '.join(TASKS)}") from None


def make_task(config: ProxyConfig, seed: int) -> Task:
    """The task with its data, which is fixed by the settings and the seed.

    Reads the text of a text task. Raises ProxyError with one line.
    """
    return TASKS[config.task].make(config.settings, seed)
