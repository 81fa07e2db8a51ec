"""Blueprints as JSON and back, for a reader that has no catalogue.

Every dataclass becomes {"class": name, "fields": {...}}, a tuple a list, a float that is not finite
{"float": "inf"}; the rest is itself. A class has the name of its module in the project and its own:
`primitives.channel.mlp.MlpConfig`. A reader is given the classes that it may make, by these names.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from .blueprint import Blueprint, Part
from .genome import Genome, Op, Slot

OWN: Mapping[str, type] = {
    "genome.blueprint.Blueprint": Blueprint,
    "genome.blueprint.Part": Part,
    "genome.genome.Genome": Genome,
    "genome.genome.Slot": Slot,
    "genome.genome.Op": Op,
}
"""The classes of a blueprint beside its operators' configs, by their names in JSON."""


class EncodedError(ValueError):
    """JSON that is no blueprint. The message is one line."""


def name_of(kind: type) -> str:
    """A class's name in JSON."""
    return f"{kind.__module__.partition('.')[2]}.{kind.__qualname__}"


def encode(value: Any) -> Any:
    """A blueprint, or any value inside one, as JSON. Raises TypeError where it has no form."""
    if is_dataclass(value) and not isinstance(value, type):
        if not all(f.init for f in fields(value)):
            raise TypeError(f"{name_of(type(value))} has fields that its constructor does not take")
        inside = {f.name: encode(getattr(value, f.name)) for f in fields(value)}
        return {"class": name_of(type(value)), "fields": inside}
    if isinstance(value, tuple):
        return [encode(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": repr(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{type(value).__name__} has no form as JSON in a blueprint")


def classes_of(blueprint: Blueprint) -> dict[str, type]:
    """The dataclasses inside the operators' configs, by their names in JSON."""
    found = (kind for row in blueprint.parts for part in row for kind in _dataclasses(part.config))
    return {name_of(kind): kind for kind in found}


def _dataclasses(value: Any) -> Iterator[type]:
    if is_dataclass(value):
        yield type(value)
        for f in fields(value):
            yield from _dataclasses(getattr(value, f.name))
    elif isinstance(value, tuple):
        for v in value:
            yield from _dataclasses(v)


def decode(data: Any, classes: Mapping[str, type]) -> Blueprint:
    """The blueprint in JSON; `classes` are those of its configs. Raises EncodedError."""
    found = _decoded(data, {**OWN, **classes})
    if not isinstance(found, Blueprint):
        raise EncodedError(f"the blueprint is a {type(found).__name__}")
    return found


def _decoded(data: Any, classes: Mapping[str, type]) -> Any:
    if isinstance(data, list):
        return tuple(_decoded(v, classes) for v in data)
    if not isinstance(data, dict):
        return data
    if set(data) == {"float"}:
        return float(data["float"])
    if set(data) != {"class", "fields"}:
        raise EncodedError(f"the blueprint holds a mapping of {', '.join(map(str, data))}")
    kind = classes.get(data["class"])
    if kind is None:
        raise EncodedError(f"the blueprint names {data['class']}, which is no class of this model")
    try:
        return kind(**{k: _decoded(v, classes) for k, v in data["fields"].items()})
    except TypeError as error:
        raise EncodedError(f"the blueprint's {data['class']} cannot be made: {error}") from None
