"""Published designs as genomes of any size: a motif of slots, repeated and cut to a depth."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from ...primitives.base import Gene
from ...primitives.nearest import nearest
from ..genome import Genome, Slot
from ..header import MAX_SLOTS, with_header
from ..notation import parse
from ..resolve import Kind, groups, relabel, replace_ops

_FOLDER = Path(__file__).parent


class PresetError(ValueError):
    """An unknown preset or a size that it cannot have: one line."""


@dataclass(frozen=True)
class Preset:
    """A published design. `depth` and `header["width"]` are its size where none is asked for."""

    name: str
    summary: str
    source: str
    motif: str
    """The notation of the slots that repeat."""
    depth: int
    header: dict[str, Gene]
    small: dict[str, Any] | None = None
    """`motif` replaces the preset's at widths under `below`, where the published states and numbers
    of experts would outweigh everything else."""

    def motif_at(self, width: int) -> str:
        if self.small is not None and width < self.small["below"]:
            return str(self.small["motif"])
        return self.motif


def names() -> list[str]:
    """The names of all presets, sorted."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def describe(name: str) -> Preset:
    """What a preset is and where it comes from. Raises PresetError for an unknown name."""
    if name not in names():
        raise PresetError(
            f"no preset is named {name!r}; there are {', '.join(names())}{nearest(name, names())}"
        )
    text = (_FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
    data: dict[str, Any] = yaml.safe_load(text)
    return Preset(name=name, **data)


def load(name: str, width: int | None = None, depth: int | None = None) -> Genome:
    """The preset at a width and a number of slots; its own where none is given.

    Raises PresetError for an unknown name or an impossible depth, GeneError for a width that no
    genome has. Whether its operators can be built at the width, `rules.violations` says.
    """
    preset = describe(name)
    width = int(preset.header["width"] or 0) if width is None else width
    depth = preset.depth if depth is None else depth
    if not 1 <= depth <= MAX_SLOTS:
        raise PresetError(f"depth is a number of slots from 1 to {MAX_SLOTS}, not {depth}")
    slots = parse(preset.motif_at(width)).slots
    return repeated(slots, {**preset.header, "width": width}, depth)


def repeated(slots: tuple[Slot, ...], header: dict[str, Gene], depth: int) -> Genome:
    """A motif, repeated and cut to a number of slots, with the genes of a header."""
    repeats = -(-depth // len(slots))
    turns = (_renamed(slot, turn) for turn in range(repeats) for slot in slots)
    return _without_lone_labels(with_header(header, tuple(turns)[:depth]))


def _renamed(slot: Slot, turn: int) -> Slot:
    """The slot in that repetition of the motif: each shares features among its own, and weights
    with the others."""
    ops = [
        replace(op, features=f"{op.features}_{turn}") if op.features is not None else op
        for op in slot.branches
    ]
    return replace_ops(slot, ops)


def _without_lone_labels(genome: Genome) -> Genome:
    """The genome with labels a, b, ...; the cut to a depth can leave one that nothing shares."""
    features, weights = _lone(genome, "features"), _lone(genome, "weights")
    slots = tuple(
        replace_ops(
            slot,
            [
                replace(
                    op,
                    features=None if op.features in features else op.features,
                    weights=None if op.weights in weights else op.weights,
                )
                for op in slot.branches
            ],
        )
        for slot in genome.slots
    )
    return relabel(replace(genome, slots=slots))


def _lone(genome: Genome, kind: Kind) -> set[str]:
    """The labels that one operator alone has."""
    return {label for label, members in groups(genome, kind).items() if len(members) == 1}
