"""Reading a space with errors of one line, and looking whether its constraints leave anything."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
from pydantic import BaseModel, ValidationError

from ..primitives.nearest import nearest
from .constraints import exceeded, limits, measured
from .repair import repair
from .sample import chooser, sample
from .space import Space

TRIES = 200
"""Genomes that are sampled before constraints are called impossible."""


class SpaceError(ValueError):
    """A space that is refused: one line that names the key path and what is allowed."""


def read_space(data: Any) -> Space:
    """The space that a mapping describes. Raises SpaceError for the first thing that is wrong."""
    try:
        return Space.model_validate(data)
    except ValidationError as error:
        raise SpaceError(_first_line(error)) from None


def check_space(space: Space, tries: int = TRIES, seed: int = 0) -> None:
    """Raises SpaceError where none of so many sampled genomes keeps the constraints."""
    choose = chooser(np.random.default_rng(seed))
    closest: tuple[float, str] | None = None
    for _ in range(tries):
        genome = repair(sample(space, choose), space)
        excess = exceeded(genome, space.constraints)
        if all(value <= 0 for value in excess.values()):
            return
        found = measured(genome, space.constraints)
        total, worst, sentence = 0.0, 0.0, ""
        for name, bounds in space.constraints.given():
            low, high = limits(bounds)
            for sign, limit, end in ((">=", low, "min"), ("<=", high, "max")):
                if limit is None or excess[f"{name}.{end}"] <= 0:
                    continue
                relative = excess[f"{name}.{end}"] / max(abs(limit), abs(found[name]), 1e-12)
                total += relative
                if relative > worst:
                    worst = relative
                    sentence = (
                        f"space.constraints.{name}: none of {tries} sampled genomes satisfies "
                        f"{name} {sign} {_number(limit)}; the closest has {_number(found[name])}"
                    )
        if closest is None or total < closest[0]:
            closest = total, sentence
    if closest is not None:
        raise SpaceError(closest[1])


def _number(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) else f"{value:.4g}"


def _first_line(error: ValidationError) -> str:
    details = error.errors(include_url=False)
    # A misspelt key gives two errors, unknown and missing; the unknown one tells more.
    detail = next((d for d in details if d["type"] == "extra_forbidden"), details[0])
    path = ".".join(("space", *map(str, detail["loc"])))
    if detail["type"] == "missing":
        return f"{path} is missing"
    if detail["type"] == "extra_forbidden":
        return f"{path}: there is no such key{_near(str(detail['loc'][-1]), detail['loc'])}"
    sentence = detail["msg"].removeprefix("Value error, ").replace("Input should be", "should be")
    value = detail["input"]
    if detail["type"] not in ("space", "value_error") and isinstance(value, str | int | float):
        sentence += f", not {value!r}"
    return f"{path}: {sentence}"


def _near(key: str, location: tuple[int | str, ...]) -> str:
    """The allowed keys beside a misspelt one."""
    model: type[BaseModel] = Space
    for part in location[:-1]:
        if isinstance(part, str):
            model = _model_in(model.model_fields[part].annotation) or model
    fields = list(model.model_fields)
    return f"; allowed are {', '.join(fields)}{nearest(key, fields)}"


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The model that a field's type holds, alone, in a tuple or beside None."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    found = (_model_in(inner) for inner in get_args(annotation))
    return next((model for model in found if model is not None), None)
