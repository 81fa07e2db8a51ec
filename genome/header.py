"""The genes of a genome outside its slots, and the shape of labels, in one table."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from ..primitives.base import Axis, Gene
from .genome import (
    BYTE_VOCAB,
    JOINS,
    NORMS,
    PLACEMENTS,
    POSITIONS,
    RESIDUALS,
    Genome,
    Op,
    Slot,
)

DEFAULT_WIDTH = 64
MAX_SLOTS = 512
"""More slots than any published language model; a limit so that a typing mistake ends."""

HEADER: tuple[Axis, ...] = (
    Axis("width", DEFAULT_WIDTH, "width of the residual stream", low=1, high=65536),
    Axis("position", "rope", "the backbone's position encoding", options=POSITIONS),
    Axis("norm", "rmsnorm", "kind of every norm of the backbone", options=NORMS),
    Axis("placement", "pre", "where the norms of a slot stand", options=PLACEMENTS),
    Axis("residual", "plain", "how a slot's output joins the stream", options=RESIDUALS),
    Axis(
        "embedding_norm",
        False,
        "a norm after the embedding too, as in BLOOM (arXiv 2211.05100) and RWKV",
        options=(False, True),
    ),
    Axis("tied", True, "the head uses the embedding's weights", options=(False, True)),
    Axis("vocab", BYTE_VOCAB, "size of the alphabet", low=2, high=1 << 24),
)
"""The header genes, in the order in which they are written."""

JOIN = Axis("join", "mean", "how parallel branches become one", options=JOINS)
TOKENS = Axis("tokens", 1.0, "share of the tokens that go through a slot", low=0.001, high=1.0)
SLOT: tuple[Axis, ...] = (JOIN, TOKENS)
"""The genes of a slot beside its operators, in the order in which they are written."""

LABEL = re.compile(r"[A-Za-z0-9_]{1,32}")
"""A sharing label: letters, digits and underscores."""


def slot_of(ops: Iterable[Op], genes: Mapping[str, Gene]) -> Slot:
    """A slot from its operators and its genes (absent ones take their defaults).

    Raises GeneError for a value that a slot's gene does not take.
    """
    values: dict[str, Any] = {
        axis.name: axis.check(genes[axis.name]) for axis in SLOT if axis.name in genes
    }
    return Slot(tuple(ops), **values)


def header_of(genome: Genome) -> dict[str, Gene]:
    """The header genes of a genome by name, in the order of `HEADER`."""
    return {axis.name: getattr(genome, axis.name) for axis in HEADER}


def with_header(header: Mapping[str, Gene], slots: Iterable[Slot]) -> Genome:
    """A genome from header genes (absent ones take their defaults) and slots.

    Raises GeneError for a value that a header gene does not take.
    """
    values: dict[str, Any] = {
        axis.name: axis.check(header[axis.name]) if axis.name in header else axis.default
        for axis in HEADER
    }
    return Genome(slots=tuple(slots), **values)
