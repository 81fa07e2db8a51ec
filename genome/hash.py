"""The canonical hash: equal for genomes that are one model, different where the models differ."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import lru_cache
from typing import Any

import networkx as nx

from ..primitives.base import Config
from .genome import Genome
from .graph import graph
from .residual import entry_norm, norms_of

VERSION = 1
"""Changes where the same genome gets another hash."""


def canonical_hash(genome: Genome) -> str:
    """16 hexadecimal digits. Raises GeneError where an operator cannot be built.

    What does not change the model does not change the hash: a point's name against the same axes,
    genes without effect, the order of parallel branches, the names of sharing labels, a label that
    one operator alone has, the join of a single branch, a position encoding that nothing uses, the
    placement of norms where there are none.
    """
    return _digest((VERSION, canonical_form(genome)))[:16]


def canonical_form(genome: Genome) -> tuple[Any, ...]:
    """The genome's graph as nested tuples that are equal for equal models only."""
    made = graph(genome)
    ends = made.nodes["embedding"]
    head = (ends["width"], ends["vocab"], ends["added"], genome.tied)
    norms: tuple[str, ...] = norms_of(genome)
    if genome.residual != "plain":
        norms = (*norms, genome.residual)
    if entry_norm(genome) != "none":
        norms = (*norms, "embedding")
    joins: dict[int, str] = {}
    parts: dict[int, float] = {}
    sharing = _Sharing(made)
    chained = {data["slot"] for _, data in made.nodes(data=True) if data.get("join") == "chain"}
    for node, data in made.nodes(data=True):
        if data["kind"] == "operator":
            colour = fingerprint(data["config"])
            # Branches have an order in a chain alone.
            at = node.rpartition(".")[2]
            sharing.colours[node] = f"{at} {colour}" if data["slot"] in chained else colour
            sharing.slots[node] = data["slot"]
        elif data["kind"] == "join":
            joins[data["slot"]] = data["join"]
        elif data.get("tokens", 1.0) != 1:
            parts[data["slot"]] = data["tokens"]
    form = (head, norms, tuple(sorted(joins.items())), _smallest(sharing))
    return (*form, tuple(sorted(parts.items()))) if parts else form


class _Sharing:
    """Operators by node with their colours, and the groups that they share in.

    A colour says all that is known of an operator beside its slot; operators of one slot with equal
    colours may change places. Who lends and who borrows, the configs say.
    """

    def __init__(self, made: nx.DiGraph[str]) -> None:
        self.colours: dict[str, str] = {}
        self.slots: dict[str, int] = {}
        self.groups: dict[tuple[str, str], list[str]] = {}
        self.of: dict[str, list[tuple[str, str]]] = {}
        for first, other, data in made.edges(data=True):
            if data["kind"] != "data":
                key = (data["kind"], first)
                if key not in self.groups:
                    self.groups[key] = [first]
                    self.of.setdefault(first, []).append(key)
                self.groups[key].append(other)
                self.of.setdefault(other, []).append(key)

    def refine(self) -> None:
        """Colour the operators by the colours of their groups until nothing new is told apart."""
        count = -1
        while self.groups and len(self.classes()) > count:
            count = len(self.classes())
            groups = {
                key: sorted((self.slots[n], self.colours[n]) for n in members)
                for key, members in self.groups.items()
            }
            for node, keys in self.of.items():
                shared = sorted((key[0], groups[key]) for key in keys)
                self.colours[node] = _digest((self.colours[node], shared))

    def classes(self) -> set[tuple[int, str]]:
        return {(self.slots[node], self.colours[node]) for node in self.of}

    def tie(self) -> list[str]:
        """The first operators with equal slot and colour that are in two groups each.

        Operators in one group each need no order: that group says all.
        """
        seen: dict[tuple[int, str], list[str]] = {}
        for node, keys in self.of.items():
            if len(keys) > 1:
                seen.setdefault((self.slots[node], self.colours[node]), []).append(node)
        return min(
            ((place, nodes) for place, nodes in seen.items() if len(nodes) > 1),
            default=(None, []),
        )[1]


def _smallest(sharing: _Sharing) -> tuple[Any, ...]:
    """The operators' slots and colours; of all ways to order what is tied, the smallest result."""
    sharing.refine()
    colours = dict(sharing.colours)
    tie = sharing.tie()
    if not tie:
        return tuple(sorted((sharing.slots[node], colour) for node, colour in colours.items()))
    results = []
    for node in tie:
        sharing.colours = {**colours, node: _digest((colours[node], "first"))}
        results.append(_smallest(sharing))
    return min(results)


def _digest(form: Any) -> str:
    return hashlib.sha256(repr(form).encode()).hexdigest()


@lru_cache(maxsize=16384)
def fingerprint(config: Config) -> str:
    """A config as text: equal for equal configs, in every process."""
    return _text(config)


def _text(value: Any) -> str:
    if is_dataclass(value):
        kind = type(value)
        inside = ", ".join(f"{f.name}={_text(getattr(value, f.name))}" for f in fields(value))
        return f"{kind.__module__.rpartition('.')[2]}.{kind.__qualname__}({inside})"
    if isinstance(value, tuple):
        return f"({', '.join(map(_text, value))})"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{_text(k)}: {_text(v)}' for k, v in sorted(value.items()))}}}"
    # 1, 1.0 and True are equal, so they need one text: the cache may hold either.
    if isinstance(value, bool | int | float) and value == value // 1:
        return str(int(value))
    return repr(value)
