"""The formats of an export: a name, a line about it, and who writes its files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .card import write_card
from .flame import write_flame
from .genome import write_genome
from .order import Order


@dataclass(frozen=True)
class Format:
    """`write` puts the files into a folder that exists; `provenance.json` with the hashes of all of
    them is added afterwards. It raises Mistake where the order cannot be met."""

    name: str
    doc: str
    write: Callable[[Order, Path], None]


_ALL = (
    Format("genome", "the design: genome, costs, scores, card", write_genome),
    Format("flame", "the configuration that flash-linear-attention's trainer takes", write_flame),
    Format("card", "the card alone", write_card),
)

FORMATS: dict[str, Format] = {f.name: f for f in _ALL}

DEFAULT = "genome"
