"""The formats of an export: a name, a line about it, and who writes its files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .card import write_card
from .flame import write_flame
from .genome import write_genome
from .hf import write_hf
from .order import Order


@dataclass(frozen=True)
class Format:
    """`write` puts the files into a folder that exists and gives what provenance.json says beside
    the facts of every export, or {}. It raises Mistake where the order cannot be met."""

    name: str
    doc: str
    write: Callable[[Order, Path], Mapping[str, Any]]
    weights: bool = False
    """Weights go along where there are any."""


_ALL = (
    Format("genome", "the design: genome, costs, scores, card", write_genome),
    Format("hf", "a model for transformers: code, weights, card", write_hf, weights=True),
    Format("flame", "the configuration that flash-linear-attention's trainer takes", write_flame),
    Format("card", "the card alone", write_card),
)

FORMATS: dict[str, Format] = {f.name: f for f in _ALL}

DEFAULT = "genome"
