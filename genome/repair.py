"""From any genome to a valid one, inside a space where one is given. A pure function."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace

from ..primitives.base import Axis, Gene, GeneError, Site
from ..primitives.catalogue import CATALOGUE, find
from .genome import Genome, Op, Slot
from .header import HEADER, JOIN, MAX_SLOTS, SLOT, TOKENS, header_of, slot_of, with_header
from .resolve import fits, genes_of, own_genes, primitive_of
from .rules import cannot_reverse, space_violations, violations
from .sharing import prune
from .space import Ranges, SlotSpace, Space, first_buildable, make_op

NEIGHBOURS = 1024
"""Settings near an operator that are tried before the genes that do not go together are dropped."""


def repair(genome: Genome, space: Space | None = None) -> Genome:
    """The genome without violations; one that has none is returned as it is.

    With a space the result is inside its form too; constraints are not looked at. What is kept:
    the order of the operators, then their genes, then what they share. Values outside a range
    become the nearest inside, operators out of place become a copy of the nearest that may stand
    there, combinations that cannot be built change in as few axes as possible.
    """
    if not violations(genome) and (space is None or not space_violations(genome, space)):
        return genome
    genome = _header(genome, space)
    slots = _in_space(genome, space) if space is not None else _anywhere(genome)
    return prune(replace(genome, slots=tuple(slots)))


def _header(genome: Genome, space: Space | None) -> Genome:
    values = {}
    for axis, value in zip(HEADER, header_of(genome).values(), strict=True):
        value = _valid(axis, value)
        values[axis.name] = _closest(value, getattr(space, axis.name)) if space else value
    return _reversible(with_header(values, genome.slots), space)


def _reversible(genome: Genome, space: Space | None) -> Genome:
    """The genome with another placement, residual form or norm where it could not be reversed."""
    if not cannot_reverse(genome):
        return genome
    for axis in (a for name in ("placement", "residual", "norm") for a in HEADER if a.name == name):
        for value in getattr(space, axis.name) if space else axis.options:
            other = with_header({**header_of(genome), axis.name: value}, genome.slots)
            if not cannot_reverse(other):
                return other
    raise GeneError("nothing in the space goes with residual=reversible and placement=post")


def _valid(axis: Axis, value: Gene) -> Gene:
    """The value, the nearest bound for a number outside them, or the default."""
    try:
        return axis.check(value)
    except GeneError:
        pass
    if axis.options or isinstance(value, bool) or not isinstance(value, int | float):
        return axis.default
    low = axis.low if axis.low is not None else value
    high = axis.high if axis.high is not None else value
    bounded = min(max(value, low), high)
    try:
        return axis.check(int(bounded) if axis.type is int else bounded)
    except (GeneError, ValueError, OverflowError):
        return axis.default


def _closest(value: Gene, options: Sequence[Gene]) -> Gene:
    """The value itself if it is an option, else the nearest number, else the first option."""
    if value in options:
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        numbers = [o for o in options if isinstance(o, int | float) and not isinstance(o, bool)]
        if numbers:
            return min(numbers, key=lambda option: abs(option - value))
    return options[0]


def _clean(op: Op) -> Op:
    """The operator with valid genes one by one; its name must be known."""
    primitive = primitive_of(op)
    axes = {axis.name: axis for axis in primitive.axes}
    genes = tuple((name, _valid(axes[name], value)) for name, value in op.genes if name in axes)
    return replace(op, genes=genes)


def _known(op: Op) -> bool:
    try:
        find(op.name)
    except GeneError:
        return False
    return True


def _build(op: Op, site: Site, ranges: Ranges) -> Op | None:
    """The operator, or one near it in the ranges that can be built there; None if none can.

    The nearest where few axes are at odds; else the first that can be built, with as many of the
    operator's own genes as it bears: of twenty axes no list of neighbours holds every five.
    """
    if fits(op, site):
        return op
    for candidate in itertools.islice(_neighbours(op, ranges), NEIGHBOURS):
        if fits(candidate, site):
            return candidate
    base = first_buildable((op.name,), {op.name: ranges}, site)
    if base is None:
        return None
    genes = genes_of(base)
    for axis, value in genes_of(op).items():
        if value in ranges.get(axis, ()) and value != genes[axis]:
            trial = make_op(op.name, {**genes, axis: value})
            if fits(trial, site):
                genes = genes_of(trial)
    return replace(make_op(op.name, genes), weights=op.weights, features=op.features)


def _neighbours(op: Op, ranges: Ranges) -> Iterator[Op]:
    """Operators of that name in the ranges, those with the fewest changed axes first."""
    own = genes_of(op)
    others = {
        axis: [value for value in values if value != own[axis]] for axis, values in ranges.items()
    }
    axes = [axis for axis, values in others.items() if values]
    for count in range(1, len(axes) + 1):
        for chosen in itertools.combinations(axes, count):
            for values in itertools.product(*(others[axis] for axis in chosen)):
                genes = {**own, **dict(zip(chosen, values, strict=True))}
                yield replace(make_op(op.name, genes), weights=op.weights, features=op.features)


def _in_space(genome: Genome, space: Space) -> list[Slot]:
    least, most = space.depth
    slots = [slot for slot in genome.slots if slot.branches][:most]
    filler = slots or [Slot((Op(next(iter(space.operators))),))]
    while len(slots) < least:
        slots.append(filler[len(slots) % len(filler)])
    depth = len(slots)
    allowed = space.slots_at(depth)
    result = []
    for i, slot in enumerate(slots):
        site = genome.site_at(i, depth)
        result.append(_slot_in_space(slots, i, slot, allowed[i], space, site))
    if not any(find(op.name)[0].kind == "mixer" for slot in result for op in slot.branches):
        for i, slot_space in enumerate(allowed):
            site = genome.site_at(i, depth)
            op = first_buildable(slot_space.mixers, slot_space.operators, site)
            if op is not None:
                result[i] = replace(result[i], branches=(op,))
                break
    return result


def _slot_in_space(
    slots: Sequence[Slot], i: int, slot: Slot, allowed: SlotSpace, space: Space, site: Site
) -> Slot:
    names = allowed.names
    if len(slot.branches) > 1 and space.parallel.branches > 1:
        mixers = [op for op in slot.branches if op.name in allowed.mixers]
        if len(mixers) > 1:
            names = allowed.mixers
    ops: list[Op] = []
    for op in slot.branches:
        if op.name in names and len(ops) < space.parallel.branches:
            built = _build(
                _into(op, allowed.operators[op.name], space), site, allowed.operators[op.name]
            )
            if built is not None:
                ops.append(built)
    if names is allowed.names:
        ops = ops[:1]
    if not ops:
        ops = [_stand_in(slots, i, allowed, space, site)]
    # A join without an effect is not written, or it would look as if it had one.
    join = _closest(slot.join, space.join) if len(ops) > 1 else JOIN.default
    tokens = _closest(_valid(TOKENS, slot.tokens), space.tokens)
    return slot_of(ops, {"join": join, "tokens": tokens})


def _into(op: Op, ranges: Ranges, space: Space) -> Op:
    """The operator with every gene in its range, and labels where the space shares."""
    own = own_genes(op.name)
    genes = {
        axis: _closest(value, ranges[axis]) if axis in ranges else own[axis]
        for axis, value in genes_of(_clean(op)).items()
    }
    return replace(
        make_op(op.name, genes),
        weights=op.weights if space.sharing.weights else None,
        features=op.features if space.sharing.features else None,
    )


def _stand_in(slots: Sequence[Slot], i: int, allowed: SlotSpace, space: Space, site: Site) -> Op:
    """A copy of the nearest operator that may stand there, else the first one that can be built."""
    for k in sorted(range(len(slots)), key=lambda k: (abs(k - i), k)):
        for op in slots[k].branches:
            if op.name in allowed.names:
                ranges = allowed.operators[op.name]
                bare = replace(op, weights=None, features=None)
                built = _build(_into(bare, ranges, space), site, ranges)
                if built is not None:
                    return built
    first = first_buildable(allowed.names, allowed.operators, site)
    if first is None:
        raise GeneError(f"nothing that slot {i} may hold can be built at width {site.width}")
    return first


def _anywhere(genome: Genome) -> list[Slot]:
    known = [replace(s, branches=tuple(filter(_known, s.branches))) for s in genome.slots]
    kept = [slot for slot in known if slot.branches][:MAX_SLOTS]
    depth = max(1, len(kept))
    slots = []
    for i, slot in enumerate(kept):
        site = genome.site_at(i, depth)
        ops = tuple(_anywhere_op(_clean(op), site) for op in slot.branches)
        slots.append(slot_of(ops, {a.name: _valid(a, getattr(slot, a.name)) for a in SLOT}))
    if not any(primitive_of(op).kind == "mixer" for slot in slots for op in slot.branches):
        mixer = _substitute("mixer", genome.site_at(0, depth))
        slots[:1] = [Slot((mixer,))]
    return slots


def _anywhere_op(op: Op, site: Site) -> Op:
    built = _build(op, site, _searched(op.name))
    return _substitute(primitive_of(op).kind, site) if built is None else built


def _searched(name: str) -> Ranges:
    """Without a space: every value that the axes search by themselves."""
    return {axis.name: axis.search or axis.options for axis in find(name)[0].axes}


def _substitute(kind: str, site: Site) -> Op:
    """The first of the catalogue's rows of that kind that can be built there."""
    for primitive in CATALOGUE:
        if primitive.kind == kind:
            built = _build(Op(primitive.name), site, _searched(primitive.name))
            if built is not None:
                return built
    raise GeneError(f"no {kind} of the catalogue can be built at width {site.width}")
