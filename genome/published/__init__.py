"""Published language models as genomes at their true size; no tensor is made to count them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from ...primitives.nearest import nearest
from ..genome import Genome
from ..notation import parse
from ..presets import PresetError
from ..resolve import primitive_of

_FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Published:
    """A published model. Its genome has the model's parameters, active parameters and cache."""

    name: str
    summary: str
    source: str
    differs: str
    """What of the model the genome does not have: nothing that has parameters or is cached. Empty
    where there is no difference."""
    notation: str

    def genome(self) -> Genome:
        """The model as a genome, its vocabulary and tying included."""
        return parse(self.notation)


@cache
def _models() -> dict[str, Published]:
    """All models by name, in the order of their files' names and within a family of its file."""
    found = {}
    for path in sorted(_FOLDER.glob("*.yaml")):
        family: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
        models: dict[str, str] = family.pop("models")
        for name, notation in models.items():
            differs = family.get("differs", "")
            found[name] = Published(name, family["summary"], family["source"], differs, notation)
    return found


def names() -> list[str]:
    """The names of all models, families together."""
    return list(_models())


def describe(name: str) -> Published:
    """What a model is and where it comes from. Raises PresetError for an unknown name."""
    if name not in _models():
        raise PresetError(f"no published model is named {name!r}{nearest(name, names())}")
    return _models()[name]


def load(name: str) -> Genome:
    """The model's genome. Raises PresetError for an unknown name."""
    return describe(name).genome()


def attention_count(genome: Genome) -> tuple[int, int]:
    """How many of a genome's mixers are attention, and how many mixers there are."""
    rows = [primitive_of(op) for *_, op in genome.ops()]
    mixers = [row for row in rows if row.kind == "mixer"]
    return sum(row.attends for row in mixers), len(mixers)
