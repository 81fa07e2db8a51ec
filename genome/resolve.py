"""From genes to configs, once per operator, and who shares what with whom.

The hot path of a search: repair, rules, hash and costs of one genome ask for the same configs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache, lru_cache
from typing import Literal

from ..primitives.base import Config, Gene, GeneError, Primitive, Site
from ..primitives.catalogue import find, resolve
from .blueprint import Blueprint, Part, Place
from .genome import Genome, Op, Slot

Kind = Literal["weights", "features"]


def groups(genome: Genome, kind: Kind) -> dict[str, list[Place]]:
    """The members of every sharing group by label, in order of the slots."""
    found: dict[str, list[Place]] = {}
    for i, slot in enumerate(genome.slots):
        for j, op in enumerate(slot.branches):
            label = op.weights if kind == "weights" else op.features
            if label is not None:
                found.setdefault(label, []).append((i, j))
    return found


def sites(genome: Genome) -> list[list[Site]]:
    """`Genome.site` of every operator, in one pass."""
    depth = len(genome.slots)
    seen: set[str] = set()
    rows = []
    for i, slot in enumerate(genome.slots):
        row = []
        for op in slot.branches:
            borrows = op.features in seen
            if op.features is not None:
                seen.add(op.features)
            row.append(genome.site_at(i, depth, borrows))
        rows.append(row)
    return rows


def primitive_of(op: Op) -> Primitive:
    """The row of the catalogue that an operator asks for. Raises GeneError."""
    return find(op.name)[0]


def genes_of(op: Op) -> Mapping[str, Gene]:
    """Every axis' value: default, point, the operator's own. Raises GeneError. Do not change it."""
    found = _genes(op.name, op.genes, tuple(type(value) for _, value in op.genes))
    if isinstance(found, GeneError):
        raise GeneError(str(found))
    return found


@cache
def own_genes(name: str) -> Mapping[str, Gene]:
    """Every axis' value where a genome gives only the name. Raises GeneError. Do not change it."""
    return resolve(name, {})[1]


def config_of(op: Op, site: Site) -> Config:
    """The config of an operator at a site. Raises GeneError."""
    found = _config(op.name, op.genes, tuple(type(value) for _, value in op.genes), site)
    if isinstance(found, GeneError):
        raise GeneError(str(found))
    return found


def fits(op: Op, site: Site) -> bool:
    """Whether the operator can be built there."""
    types = tuple(type(value) for _, value in op.genes)
    return not isinstance(_config(op.name, op.genes, types, site), GeneError)


def configs(genome: Genome) -> list[list[Config]]:
    """The config of every operator, per slot and branch. Raises GeneError."""
    return [
        [config_of(op, site) for op, site in zip(slot.branches, row, strict=True)]
        for slot, row in zip(genome.slots, sites(genome), strict=True)
    ]


def blueprint(genome: Genome) -> Blueprint:
    """The genome with its operators' configs. Raises GeneError where one cannot be built."""
    rows = [
        tuple(
            Part(op, config, primitive_of(op).kind == "mixer")
            for op, config in zip(slot.branches, row, strict=True)
        )
        for slot, row in zip(genome.slots, configs(genome), strict=True)
    ]
    return Blueprint(genome, tuple(rows))


def readers_ahead(genome: Genome) -> list[Place]:
    """The operators that read later tokens. Raises GeneError where one cannot be built."""
    return blueprint(genome).readers_ahead()


def is_causal(genome: Genome) -> bool:
    """No output depends on a later token: every operator is causal. Raises GeneError."""
    return not readers_ahead(genome)


def acausal(genome: Genome) -> str | None:
    """`Blueprint.acausal` of a genome. Raises GeneError where an operator cannot be built."""
    return blueprint(genome).acausal()


# The caches' keys hold the types beside the values, because 1, 1.0 and True are equal as keys and
# not as genes.
@lru_cache(maxsize=16384)
def _genes(
    name: str, genes: tuple[tuple[str, Gene], ...], types: tuple[type, ...]
) -> dict[str, Gene] | GeneError:
    try:
        return resolve(name, dict(genes))[1]
    except GeneError as error:
        return error


@lru_cache(maxsize=65536)
def _config(
    name: str, genes: tuple[tuple[str, Gene], ...], types: tuple[type, ...], site: Site
) -> Config | GeneError:
    values = _genes(name, genes, types)
    if isinstance(values, GeneError):
        return values
    try:
        return find(name)[0].configure(site, values)
    except GeneError as error:
        return error


def relabel(genome: Genome) -> Genome:
    """The same genome with sharing labels a, b, c, ... in order of their first member."""
    labels: dict[tuple[Kind, str], str] = {}
    count = {"weights": 0, "features": 0}

    def rename(kind: Kind, label: str | None) -> str | None:
        if label is None:
            return None
        if (kind, label) not in labels:
            labels[kind, label] = letters(count[kind])
            count[kind] += 1
        return labels[kind, label]

    slots = [
        replace_ops(
            slot,
            [
                replace(
                    op,
                    weights=rename("weights", op.weights),
                    features=rename("features", op.features),
                )
                if op.weights or op.features
                else op
                for op in slot.branches
            ],
        )
        for slot in genome.slots
    ]
    return replace(genome, slots=tuple(slots))


def replace_ops(slot: Slot, ops: list[Op]) -> Slot:
    """The slot with other operators, and the same genes of its own."""
    return slot if tuple(ops) == slot.branches else replace(slot, branches=tuple(ops))


def letters(number: int) -> str:
    """a, b, ..., z, a1, b1, ...: the label of that number."""
    turn, letter = divmod(number, 26)
    return chr(ord("a") + letter) + (str(turn) if turn else "")
