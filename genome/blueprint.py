"""All that a model is built from: a genome with the config of each of its operators.

Nothing here or in `model.py` looks anything up in the catalogue, so a model can be built where only
its own primitives are (an export takes along those and no others).
"""

from __future__ import annotations

from dataclasses import dataclass

from ..primitives.base import BidirectionalError, Config, is_causal
from .genome import Genome, Op

Place = tuple[int, int]
"""Slot and branch, both from 0."""


@dataclass(frozen=True)
class Part:
    """An operator at its place: its genes and labels, and the final numbers that follow."""

    op: Op
    config: Config
    mixes: bool
    """It mixes tokens; a channel mixer does not."""


@dataclass(frozen=True)
class Blueprint:
    """A genome and its operators' configs, per slot and branch."""

    genome: Genome
    parts: tuple[tuple[Part, ...], ...]

    def readers_ahead(self) -> list[Place]:
        """The operators that read later tokens."""
        return [
            (i, j)
            for i, row in enumerate(self.parts)
            for j, part in enumerate(row)
            if not is_causal(part.config)
        ]

    def acausal(self) -> str | None:
        """Which operator reads later tokens, in words that a sentence begins with; None if none."""
        found = self.readers_ahead()
        if not found:
            return None
        op = self.parts[found[0][0]][found[0][1]].op
        given = " with causal=false" if dict(op.genes).get("causal") is False else ""
        return f"{place_name(self.genome, found[0])}: {op.name}{given} reads later tokens"

    def require_causal(self) -> None:
        """Raises BidirectionalError, with a sentence, where an operator reads later tokens."""
        words = self.acausal()
        if words is not None:
            raise BidirectionalError(f"{words}, so the model has no state and decodes nothing")


def place_name(genome: Genome, place: Place) -> str:
    """`slot 3`, or `slot 3, branch 1` where the slot is parallel."""
    slot, branch = place
    many = len(genome.slots[slot].branches) > 1
    return f"slot {slot}, branch {branch}" if many else f"slot {slot}"
