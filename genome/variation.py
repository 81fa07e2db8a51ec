"""Mutation and crossover: pure functions of genomes, a space and a generator's state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np

from ..primitives.base import Gene, show_gene
from .blueprint import Place
from .constraints import satisfied
from .genome import Genome, Slot
from .header import HEADER, JOIN, header_of, slot_of, with_header
from .repair import repair
from .resolve import genes_of, primitive_of, relabel
from .sample import chooser, sample_op, sample_slot
from .sharing import rows_of, share_features, share_weights, with_rows
from .space import SlotSpace, Space, make_op

TRIES = 64
"""Attempts at a child that differs from its parents and keeps the constraints."""

CUTS = 8
"""Places for the cuts of one crossover that are drawn; those where most slots fit are taken."""

RUN = 4
"""Slots that are inserted or deleted together at most."""

Child = tuple[Genome, str]
Mutation = Callable[[Genome, Space, np.random.Generator], Child | None]
Item = TypeVar("Item")


def mutate(
    genome: Genome, space: Space, rng: np.random.Generator, kinds: Sequence[str] | None = None
) -> Child:
    """A genome one change away, inside the space and its constraints, and the change in words.

    `kinds` are names of `MUTATIONS`; all by default. Where no attempt succeeds the genome comes
    back (repaired, if it was outside the space), and the words say so.
    """
    parent = repair(genome, space)
    names = list(MUTATIONS) if kinds is None else list(kinds)
    for _ in range(TRIES):
        made = MUTATIONS[_pick(rng, names)](parent, space, rng)
        if made is None:
            continue
        child = repair(relabel(made[0]), space)
        if child not in (parent, genome) and satisfied(child, space.constraints):
            return child, f"mutation: {made[1]}"
    return parent, f"unchanged: none of {TRIES} mutations stayed inside the space"


def cross(a: Genome, b: Genome, space: Space, rng: np.random.Generator, points: int = 2) -> Child:
    """A child of slots of `a` and `b` in turn, with `points` cuts in each, and the cuts in words.

    The parents may differ in depth. Header genes come from either parent. Sharing goes on among the
    slots of one parent. Where no attempt succeeds `a` comes back, and the words say so.
    """
    if points < 1:
        raise ValueError(f"points is at least 1, not {points}")
    first, second = repair(a, space), _apart(repair(b, space))
    for _ in range(TRIES):
        cuts = _cuts(first, second, space, rng, points)
        if cuts is None:
            continue
        header = {
            axis.name: _pick(rng, (getattr(first, axis.name), getattr(second, axis.name)))
            for axis in HEADER
        }
        child = repair(relabel(with_header(header, _spliced(first, second, *cuts))), space)
        if child not in (a, b, first) and satisfied(child, space.constraints):
            where = " | ".join(", ".join(map(str, ends)) for ends in cuts)
            return child, f"crossover: slots cut at {where}"
    return first, f"unchanged: none of {TRIES} crossovers stayed inside the space"


def _pick(rng: np.random.Generator, items: Sequence[Item]) -> Item:
    return items[int(rng.integers(len(items)))]


def _misfits(slots: Sequence[Slot], space: Space) -> int:
    """How many slots hold something that may not stand where they are."""
    return sum(
        any(op.name not in allowed.names for op in slot.branches)
        for slot, allowed in zip(slots, space.slots_at(len(slots)), strict=True)
    )


def _spliced(
    a: Genome, b: Genome, ends_a: Sequence[int], ends_b: Sequence[int]
) -> tuple[Slot, ...]:
    slots: list[Slot] = []
    parents = ((a, (0, *ends_a, len(a.slots))), (b, (0, *ends_b, len(b.slots))))
    for turn in range(len(ends_a) + 1):
        parent, ends = parents[turn % 2]
        slots += parent.slots[ends[turn] : ends[turn + 1]]
    return tuple(slots)


def _cuts(
    a: Genome, b: Genome, space: Space, rng: np.random.Generator, points: int
) -> tuple[list[int], list[int]] | None:
    """Of some random cuts those that put the fewest slots out of place; None if no depth fits."""
    best: tuple[int, tuple[list[int], list[int]]] | None = None
    for _ in range(CUTS):
        cuts = (_ends(a, rng, points), _ends(b, rng, points))
        slots = _spliced(a, b, *cuts)
        if space.depth[0] <= len(slots) <= space.depth[1]:
            misfits = _misfits(slots, space)
            if best is None or misfits < best[0]:
                best = misfits, cuts
            if misfits == 0:
                break
    return None if best is None else best[1]


def _ends(genome: Genome, rng: np.random.Generator, points: int) -> list[int]:
    inside = len(genome.slots) - 1
    if points <= inside:
        return sorted(int(i) + 1 for i in rng.choice(inside, size=points, replace=False))
    return sorted(int(i) for i in rng.integers(0, len(genome.slots) + 1, size=points))


def _apart(genome: Genome) -> Genome:
    """The genome with labels that no relabelled genome has."""
    rows = [
        [
            replace(
                op,
                weights=op.weights and op.weights.upper(),
                features=op.features and op.features.upper(),
            )
            for op in row
        ]
        for row in rows_of(relabel(genome))
    ]
    return with_rows(genome, rows)


def _place(genome: Genome, rng: np.random.Generator) -> Place:
    slot = int(rng.integers(len(genome.slots)))
    return slot, int(rng.integers(len(genome.slots[slot].branches)))


def _slot_space(genome: Genome, space: Space, slot: int) -> SlotSpace:
    return space.slots_at(len(genome.slots))[slot]


def _with_slot(genome: Genome, index: int, slot: Slot) -> Genome:
    return replace(genome, slots=(*genome.slots[:index], slot, *genome.slots[index + 1 :]))


def _class(genome: Genome, space: Space, rng: np.random.Generator) -> Child | None:
    """Another primitive or point in place of an operator."""
    i, j = _place(genome, rng)
    slot, allowed = genome.slots[i], _slot_space(genome, space, i)
    old = slot.branches[j].name
    names = allowed.names if len(slot.branches) == 1 else allowed.mixers
    others = [name for name in names if name != old]
    if not others:
        return None
    rows = rows_of(genome)
    rows[i][j] = sample_op(allowed, others, allowed.label, chooser(rng))
    return with_rows(genome, rows), f"class of slot {i} from {old} to {rows[i][j].name}"


def _axis(genome: Genome, space: Space, rng: np.random.Generator) -> Child | None:
    """Another value for one axis of an operator, and of those that share its weights."""
    i, j = _place(genome, rng)
    op = genome.slots[i].branches[j]
    ranges = _slot_space(genome, space, i).operators[op.name]
    genes = genes_of(op)
    others = {a: [v for v in values if v != genes[a]] for a, values in ranges.items()}
    open_axes = [axis for axis, values in others.items() if values]
    if not open_axes:
        return None
    axis = _pick(rng, open_axes)
    value: Gene = _pick(rng, others[axis])
    changed = make_op(op.name, {**genes, axis: value}).genes
    rows = rows_of(genome)
    for row in rows:
        for k, other in enumerate(row):
            if other.weights is not None and other.weights == op.weights:
                row[k] = replace(other, genes=changed)
    rows[i][j] = replace(op, genes=changed)
    words = f"{axis} of {op.name} in slot {i} from {show_gene(genes[axis])} to {show_gene(value)}"
    return with_rows(genome, rows), words


def _insert(genome: Genome, space: Space, rng: np.random.Generator) -> Child | None:
    """One new slot, or as many as it takes that the later slots may stand where they then are."""
    at = int(rng.integers(len(genome.slots) + 1))
    for count in range(1, RUN + 1):
        depth = len(genome.slots) + count
        if depth > space.depth[1]:
            break
        allowed = space.slots_at(depth)[at : at + count]
        new = tuple(sample_slot(space, slot, chooser(rng)) for slot in allowed)
        slots = (*genome.slots[:at], *new, *genome.slots[at:])
        if _misfits(slots, space) == 0:
            return replace(genome, slots=slots), f"insert {_names(new)} at slot {at}"
    return None


def _delete(genome: Genome, space: Space, rng: np.random.Generator) -> Child | None:
    """One slot less, or as many as it takes that the later slots may stand where they then are."""
    at = int(rng.integers(len(genome.slots)))
    for count in range(1, min(RUN, len(genome.slots) - at) + 1):
        if len(genome.slots) - count < space.depth[0]:
            break
        slots = (*genome.slots[:at], *genome.slots[at + count :])
        if _misfits(slots, space) == 0:
            words = f"delete {_names(genome.slots[at : at + count])} at slot {at}"
            return replace(genome, slots=slots), words
    return None


def _names(slots: Sequence[Slot]) -> str:
    return " > ".join(" | ".join(op.name for op in slot.branches) for slot in slots)


def _swap(genome: Genome, space: Space, rng: np.random.Generator) -> Child | None:
    """Two slots change places, where both may stand there."""
    if len(genome.slots) < 2:
        return None
    i, j = sorted(int(k) for k in rng.choice(len(genome.slots), size=2, replace=False))
    slots = list(genome.slots)
    slots[i], slots[j] = slots[j], slots[i]
    if _misfits(slots, space):
        return None
    return replace(genome, slots=tuple(slots)), f"swap slots {i} and {j}"


def _share(genome: Genome, space: Space, rng: np.random.Generator) -> Child | None:
    """An operator begins or stops to share weights or features."""
    kinds = [kind for kind in ("weights", "features") if getattr(space.sharing, kind)]
    if not kinds:
        return None
    kind = _pick(rng, kinds)
    i, j = _place(genome, rng)
    rows = rows_of(genome)
    op = rows[i][j]
    if getattr(op, kind) is not None:
        ended = replace(op, weights=None) if kind == "weights" else replace(op, features=None)
        rows[i][j] = ended
        return with_rows(genome, rows), f"{op.name} in slot {i} stops to share {kind}"
    allowed = _slot_space(genome, space, i)
    if kind == "weights":
        shared = share_weights(rows, (i, j), allowed)
    else:
        site = genome.site_at(0, len(rows))
        shared = primitive_of(op).lends and share_features(rows, (i, j), allowed, site)
    return (with_rows(genome, rows), f"{op.name} in slot {i} shares {kind}") if shared else None


def _parallel(genome: Genome, space: Space, rng: np.random.Generator) -> Child | None:
    """A mixer beside the mixers of a slot, or one of several less."""
    i = int(rng.integers(len(genome.slots)))
    slot, allowed = genome.slots[i], _slot_space(genome, space, i)
    grows = len(slot.branches) < space.parallel.branches
    if len(slot.branches) > 1 and (not grows or rng.random() < 0.5):
        gone = int(rng.integers(len(slot.branches)))
        branches = (*slot.branches[:gone], *slot.branches[gone + 1 :])
        words = f"serial: slot {i} without its {slot.branches[gone].name}"
        join = slot.join if len(branches) > 1 else JOIN.default
        left = slot_of(branches, {"join": join, "tokens": slot.tokens})
        return _with_slot(genome, i, left), words
    if not grows or not all(op.name in allowed.mixers for op in slot.branches):
        return None
    choose = chooser(rng)
    new = sample_op(allowed, allowed.mixers, allowed.label, choose)
    join = slot.join if len(slot.branches) > 1 else choose("join", space.join)
    words = f"parallel: {new.name} beside {slot.branches[0].name} in slot {i}"
    count = len(slot.branches)
    # In a chain alone it matters where.
    at = int(rng.integers(count + 1)) if join == "chain" else count
    grown = replace(slot, branches=(*slot.branches[:at], new, *slot.branches[at:]), join=join)
    return _with_slot(genome, i, grown), words


def _header(genome: Genome, space: Space, rng: np.random.Generator) -> Child | None:
    """Another value of a header gene, or another join or share of tokens of a slot."""
    header = header_of(genome)
    choices: dict[str, list[Gene]] = {
        name: [o for o in getattr(space, name) if o != value] for name, value in header.items()
    }
    parallel = [i for i, slot in enumerate(genome.slots) if len(slot.branches) > 1]
    names = [name for name, options in choices.items() if options]
    if parallel and len(space.join) > 1:
        names.append("join")
    if len(space.tokens) > 1:
        names.append("tokens")
    if not names:
        return None
    name = _pick(rng, names)
    if name == "join":
        i = _pick(rng, parallel)
        slot = genome.slots[i]
        join = _pick(rng, [o for o in space.join if o != slot.join])
        words = f"join of slot {i} from {slot.join} to {join}"
        return _with_slot(genome, i, replace(slot, join=join)), words
    if name == "tokens":
        i = int(rng.integers(len(genome.slots)))
        slot = genome.slots[i]
        tokens = _pick(rng, [o for o in space.tokens if o != slot.tokens])
        words = f"tokens of slot {i} from {show_gene(slot.tokens)} to {show_gene(tokens)}"
        return _with_slot(genome, i, replace(slot, tokens=tokens)), words
    value = _pick(rng, choices[name])
    words = f"{name} from {show_gene(header[name])} to {show_gene(value)}"
    return with_header({**header, name: value}, genome.slots), words


MUTATIONS: dict[str, Mutation] = {
    "class": _class,
    "axis": _axis,
    "insert": _insert,
    "delete": _delete,
    "swap": _swap,
    "share": _share,
    "parallel": _parallel,
    "header": _header,
}
"""The kinds of mutation by name, drawn with equal chance."""
