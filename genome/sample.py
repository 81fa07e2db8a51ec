"""Drawing genomes from a space, by a seeded generator or by any other chooser."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

import numpy as np

from ..primitives.base import Gene
from .constraints import satisfied
from .genome import Genome, Op, Slot
from .repair import repair
from .resolve import primitive_of, relabel
from .sharing import rows_of, share_features, share_weights, with_rows
from .space import Ranges, SlotSpace, Space, make_op

SHARE_CHANCE = 0.15
"""The chance that an operator which could share weights or features does."""

PART_CHANCE = 0.25
"""The chance that a slot takes a part of the tokens, where the space has that and all of them."""

Option = TypeVar("Option", bound=Gene)


class Choose(Protocol):
    """Picks one of the options. The same name always comes with the same options in one space."""

    def __call__(self, name: str, options: Sequence[Option]) -> Option: ...


class Weighted(tuple[Any, ...]):
    """Options that are not equally likely to a generator; other choosers see a plain sequence."""

    chances: tuple[float, ...]

    def __new__(cls, options: Sequence[Gene], chances: Sequence[float]) -> Weighted:
        self = super().__new__(cls, options)
        self.chances = tuple(chances)
        return self


def chooser(rng: np.random.Generator) -> Choose:
    """Independent draws from a seeded generator."""

    def choose(name: str, options: Sequence[Option]) -> Option:
        if len(options) == 1:
            return options[0]
        point = rng.random()
        if isinstance(options, Weighted):
            for option, chance in zip(options, options.chances, strict=True):
                point -= chance
                if point < 0:
                    return option  # type: ignore[no-any-return]
            return options[-1]  # type: ignore[no-any-return]
        return options[int(point * len(options))]

    return choose


def sample(space: Space, choose: Choose) -> Genome:
    """A genome of the space's form, every choice made by `choose`.

    It may break a rule or a constraint; `sample_valid` repairs and rejects.
    """
    width = choose("width", space.width)
    position = choose("position", space.position)
    norm = choose("norm", space.norm)
    placement = choose("placement", space.placement)
    residual = choose("residual", space.residual)
    embedding_norm = choose("embedding_norm", space.embedding_norm)
    tied = choose("tied", space.tied)
    vocab = choose("vocab", space.vocab)
    depth = choose("depth", range(space.depth[0], space.depth[1] + 1))
    slots = tuple(sample_slot(space, slot, choose) for slot in space.slots_at(depth))
    genome = Genome(width, slots, position, norm, placement, residual, tied, vocab, embedding_norm)
    if space.sharing.weights or space.sharing.features:
        genome = _share(genome, space, choose)
    return genome


def sample_slot(space: Space, slot: SlotSpace, choose: Choose) -> Slot:
    """One slot, without sharing."""
    ops = [sample_op(slot, slot.names, slot.label, choose)]
    join = "mean"
    if space.parallel.branches > 1 and ops[0].name in slot.mixers:
        count = choose(f"{slot.label}.branches", _branch_counts(space))
        ops += [sample_op(slot, slot.mixers, f"{slot.label}.{j}", choose) for j in range(1, count)]
        if count > 1:
            join = choose(f"{slot.label}.join", space.join)
    tokens = space.tokens[0]
    if len(space.tokens) > 1:
        tokens = choose(f"{slot.label}.tokens", _token_shares(space))
    return Slot(tuple(ops), join, tokens)


def sample_op(slot: SlotSpace, names: Sequence[str], label: str, choose: Choose) -> Op:
    """One operator of those names, without sharing."""
    name = choose(f"{label}.op", names)
    return sample_genes(name, slot.operators[name], label, choose)


def sample_genes(name: str, ranges: Ranges, label: str, choose: Choose) -> Op:
    """The operator of that name with every axis of the ranges chosen."""
    return make_op(
        name,
        {axis: choose(f"{label}.{name}.{axis}", values) for axis, values in ranges.items()},
    )


def sample_valid(space: Space, rng: np.random.Generator, tries: int = 1000) -> Genome:
    """A genome inside the space, constraints kept. A pure function of the generator's state.

    Raises ValueError where none of so many tries keeps the constraints.
    """
    choose = chooser(rng)
    for _ in range(tries):
        genome = repair(sample(space, choose), space)
        if satisfied(genome, space.constraints):
            return genome
    raise ValueError(f"none of {tries} sampled genomes keeps the constraints of the space")


def _branch_counts(space: Space) -> Weighted:
    more = space.parallel.branches - 1
    share = space.parallel.share
    return Weighted(range(1, more + 2), [1 - share, *[share / more] * more])


def _token_shares(space: Space) -> Sequence[float]:
    if 1.0 not in space.tokens:
        return space.tokens
    part = PART_CHANCE / (len(space.tokens) - 1)
    return Weighted(space.tokens, [1 - PART_CHANCE if t == 1 else part for t in space.tokens])


_MAYBE = Weighted((False, True), (1 - SHARE_CHANCE, SHARE_CHANCE))


def _share(genome: Genome, space: Space, choose: Choose) -> Genome:
    """Let operators share with the nearest earlier one that they can share with."""
    rows = rows_of(genome)
    site = genome.site_at(0, len(rows))
    for i, (row, slot) in enumerate(zip(rows, space.slots_at(len(rows)), strict=True)):
        for j in range(len(row)):
            label = slot.label if j == 0 else f"{slot.label}.{j}"
            if space.sharing.weights and choose(f"{label}.weights", _MAYBE):
                share_weights(rows, (i, j), slot)
            lends = space.sharing.features and primitive_of(row[j]).lends
            if lends and choose(f"{label}.features", _MAYBE):
                share_features(rows, (i, j), slot, site)
    return relabel(with_rows(genome, rows))
