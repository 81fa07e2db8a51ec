"""The pattern of a genome's slots: a motif that repeats, or blocks that are stretched.

Both make a genome of any number of slots: `Repeated` repeats the motif between the slots before and
after it, `Stretched` gives every block its share of the new depth, in the same order. Labels stay
meaningful: what a repeat or a copy shares inside itself it shares with nothing else, and a label
that spans repeats stays one label.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from .blueprint import Place
from .genome import Genome, Op, Slot
from .header import MAX_SLOTS
from .resolve import Kind, groups, primitive_of, relabel, replace_ops
from .sharing import prune

LEAST_SHARE = 0.75
"""A motif covers at least so much of the slots; where less repeats, repeating it further would
change the proportions of what stands around it."""

WHOLE = 16
"""A genome of at most so many slots without a motif is one itself: the largest that is published,
Jamba's of eight layers (arXiv 2403.19887), has as many."""

_Renaming = Mapping[tuple[Kind, str], str]


@dataclass(frozen=True)
class Motif:
    """`period` slots from `start` on, which stand `repeats` times in a row."""

    start: int
    period: int
    repeats: int

    @property
    def end(self) -> int:
        """The first slot after the repeats."""
        return self.start + self.period * self.repeats


def find_motif(genome: Genome) -> Motif | None:
    """The smallest motif among those whose repeats cover most slots; None where none will do.

    It repeats at least twice, covers `LEAST_SHARE` of the slots, begins at a mixer where it can,
    and has every mixer that stands after its repeats; those before, where first layers are often
    special, may have other genes. Labels are compared by what they share, not by their names.
    """
    bare = [_bare(slot) for slot in genome.slots]
    found = sorted(_runs(genome, bare), key=lambda m: (-m.period * m.repeats, m.period))
    return next((motif for motif in found if _is_motif(genome, motif)), None)


def _bare(slot: Slot) -> Hashable:
    """The slot with the names of its labels left out."""
    ops = [(op.name, op.genes, op.weights is None, op.features is None) for op in slot.branches]
    types = [tuple(type(value) for _, value in op.genes) for op in slot.branches]
    return replace(slot, branches=()), tuple(ops), tuple(types)


def _names(slot: Slot) -> Hashable:
    """The operators of a slot without their genes."""
    return replace(slot, branches=()), tuple(op.name for op in slot.branches)


def _runs(genome: Genome, bare: Sequence[Hashable]) -> Iterator[Motif]:
    """Every longest stretch in which slots recur after some period."""
    count = len(bare)
    for period in range(1, count // 2 + 1):
        start = 0
        while start + 2 * period <= count:
            end = start
            while end + period < count and bare[end] == bare[end + period]:
                end += 1
            length = end - start + period
            if length >= 2 * period:
                spare = range(start, start + length % period + 1)
                first = next((i for i in spare if _mixes(genome.slots[i])), start)
                yield Motif(first, period, length // period)
            start = end + 1


def _mixes(slot: Slot) -> bool:
    return any(primitive_of(op).kind == "mixer" for op in slot.branches)


def _is_motif(genome: Genome, motif: Motif) -> bool:
    slots = genome.slots
    if motif.period * motif.repeats < LEAST_SHARE * len(slots):
        return False
    body = slots[motif.start : motif.start + motif.period]
    mixers, names = {_bare(slot) for slot in body if _mixes(slot)}, set(map(_names, body))
    before, after = slots[: motif.start], slots[motif.end :]
    if any(_mixes(slot) and _names(slot) not in names for slot in before):
        return False
    if any(_mixes(slot) and _bare(slot) not in mixers for slot in after):
        return False
    local = _local_labels(genome, motif)
    starts = range(motif.start, motif.end, motif.period)
    turns = [_shape(slots[i : i + motif.period], local) for i in starts]
    return all(turn == turns[0] for turn in turns)


def _local_labels(genome: Genome, motif: Motif) -> set[tuple[Kind, str]]:
    """The labels whose members all stand in one repeat."""

    def turn(place: Place) -> int | None:
        inside = motif.start <= place[0] < motif.end
        return (place[0] - motif.start) // motif.period if inside else None

    found: set[tuple[Kind, str]] = set()
    for kind in ("weights", "features"):
        for label, members in groups(genome, kind).items():
            turns = {turn(place) for place in members}
            if len(turns) == 1 and None not in turns:
                found.add((kind, label))
    return found


def _shape(slots: Sequence[Slot], local: set[tuple[Kind, str]]) -> tuple[Slot, ...]:
    """The slots with local labels by the order of their first member."""
    names: dict[tuple[Kind, str], str] = {}
    for slot in slots:
        for op in slot.branches:
            for key in _labels(op):
                if key in local:
                    names.setdefault(key, f"#{len(names)}")
    return tuple(_renamed(slot, names) for slot in slots)


def _labels(op: Op) -> list[tuple[Kind, str]]:
    pairs: tuple[tuple[Kind, str | None], ...] = (
        ("weights", op.weights),
        ("features", op.features),
    )
    return [(kind, label) for kind, label in pairs if label is not None]


def _renamed(slot: Slot, names: _Renaming) -> Slot:
    """The slot with the labels of `names` by their new names."""
    if not any(key in names for op in slot.branches for key in _labels(op)):
        return slot
    ops = [
        replace(
            op,
            weights=op.weights and names.get(("weights", op.weights), op.weights),
            features=op.features and names.get(("features", op.features), op.features),
        )
        for op in slot.branches
    ]
    return replace_ops(slot, ops)


def _finished(genome: Genome, slots: Sequence[Slot]) -> Genome:
    """The genome with other slots, without labels that nothing shares any more."""
    made = replace(genome, slots=tuple(slots))
    labelled = any(_labels(op) for *_, op in made.ops())
    # The labels of copies are none before they are renamed.
    return relabel(prune(relabel(made))) if labelled else made


@dataclass(frozen=True)
class Repeated:
    """Genomes of a motif's repeats, by the number of blocks in them.

    A block is a slot with a mixer and the channel mixers that follow it. Where the number is not
    one of whole motifs, the last repeat is cut, as presets are cut to a depth.
    """

    motif: Motif
    ends: tuple[int, ...]
    """The slots of the motif up to the end of each block."""
    slots: int
    """Of the genome that the motif was found in."""

    @property
    def own(self) -> int:
        """The number that gives back the genome itself."""
        return self.motif.repeats * len(self.ends)

    @property
    def sample(self) -> int:
        """The number whose slots stand for those of every other number: two repeats."""
        return 2 * len(self.ends)

    def counts(self) -> list[int]:
        """All numbers from one motif on, by depth."""
        every = itertools.count(len(self.ends))
        return list(itertools.takewhile(lambda n: self.depth(n) <= MAX_SLOTS, every))

    def whole(self, count: int) -> bool:
        """No repeat is cut."""
        return count % len(self.ends) == 0

    def _body(self, count: int) -> int:
        """The slots of the repeats."""
        turns, more = divmod(count, len(self.ends))
        return turns * self.motif.period + (self.ends[more - 1] if more else 0)

    def depth(self, count: int) -> int:
        """Slots of the genome of that number."""
        return self.slots - self.motif.period * self.motif.repeats + self._body(count)

    def sources(self, count: int) -> list[int]:
        """For every slot of the genome of that number the slot of the sample that it is like."""
        start, period = self.motif.start, self.motif.period
        body = self._body(count)
        later = [start + period + i % period for i in range(body - period)]
        rest = range(start + 2 * period, self.depth(self.sample))
        return [*range(start + min(period, body)), *later, *rest]

    def make(self, genome: Genome, count: int) -> Genome:
        """The genome of that number, of a genome with this motif."""
        motif, slots = self.motif, genome.slots
        local = _local_labels(genome, motif)
        body = []
        for i in range(self._body(count)):
            turn, at = divmod(i, motif.period)
            # A colon stands in no label of a genome.
            names = {(kind, label): f"{turn}:{label}" for kind, label in local}
            body.append(_renamed(slots[motif.start + at], names))
        return _finished(genome, (*slots[: motif.start], *body, *slots[motif.end :]))

    def said(self, count: int, fresh: bool = False) -> str:
        """What was done, in words; with `fresh` there was no other number before."""
        motif = self.motif
        turns, more = divmod(count, len(self.ends))
        what = "whole genome" if motif.repeats == 1 else "motif"
        stands = f"the {what} of {_slots(motif.period)} stands {_times(turns)}"
        if more:
            stands += f" and its first {_slots(self.ends[more - 1])} once more"
        around = self.slots - motif.period * motif.repeats
        rest = f", the {_slots(around)} around it once" if around else ""
        if count == self.own and not fresh:
            return f"{stands}, as before{rest}"
        before = "" if fresh or motif.repeats == 1 else f", before {_times(motif.repeats)}"
        return f"{stands}{before}{rest}: {_slots(self.depth(count))}"


@dataclass(frozen=True)
class Stretched:
    """Genomes of blocks that take their share of a new depth, by the number of blocks.

    `starts` are the first slots of the blocks, `kinds` tell equal blocks.
    """

    starts: tuple[int, ...]
    kinds: tuple[Hashable, ...]
    slots: int

    @property
    def own(self) -> int:
        """The number that gives back the genome itself."""
        return len(self.starts)

    @property
    def sample(self) -> int:
        """The number whose slots stand for those of every other number."""
        return self.own

    def counts(self) -> list[int]:
        """All numbers in which every kind of block stands, by depth."""
        # Small numbers, because the kinds themselves are slow to compare.
        numbers = {kind: i for i, kind in enumerate(dict.fromkeys(self.kinds))}
        kinds = [numbers[kind] for kind in self.kinds]
        found: list[tuple[int, int]] = []
        for count in range(len(numbers), MAX_SLOTS + 1):
            blocks = self._blocks(count)
            depth = sum(self._lengths[b] for b in blocks)
            if depth > MAX_SLOTS:
                break
            if len({kinds[b] for b in blocks}) == len(numbers):
                found.append((depth, count))
        return [count for _, count in sorted(found)]

    def whole(self, count: int) -> bool:
        """Stretching cuts nothing."""
        return True

    def _blocks(self, count: int) -> list[int]:
        """The block that stands at each of `count` places: that at the same share of the depth."""
        return [(2 * i + 1) * self.own // (2 * count) for i in range(count)]

    def _block(self, number: int) -> range:
        start = self.starts[number]
        return range(start, start + self._lengths[number])

    @cached_property
    def _lengths(self) -> list[int]:
        """Slots of each block."""
        return [end - start for start, end in itertools.pairwise((*self.starts, self.slots))]

    def depth(self, count: int) -> int:
        """Slots of the genome of that number."""
        return sum(self._lengths[b] for b in self._blocks(count))

    def sources(self, count: int) -> list[int]:
        """For every slot of the genome of that number the slot of the sample that it is like."""
        return [slot for b in self._blocks(count) for slot in self._block(b)]

    def make(self, genome: Genome, count: int) -> Genome:
        """The genome of that number, of a genome with these blocks."""
        blocks = self._blocks(count)
        copies = {b: blocks.count(b) for b in blocks}
        of_slot = {slot: b for b in copies for slot in self._block(b)}
        shared: dict[tuple[Kind, str], int] = {}
        for kind in ("weights", "features"):
            for label, members in groups(genome, kind).items():
                counts = [copies[of_slot[i]] for i, _ in members if i in of_slot]
                shared[kind, label] = min(counts, default=1)
        slots: list[Slot] = []
        for at, b in enumerate(blocks):
            copy = at - blocks.index(b)
            # The copies of all members fall into as many groups as the rarest member has copies.
            names = {
                (kind, label): f"{copy * sets // copies[b]}:{label}"
                for (kind, label), sets in shared.items()
            }
            slots += [_renamed(genome.slots[i], names) for i in self._block(b)]
        return _finished(genome, slots)

    def said(self, count: int, fresh: bool = False) -> str:
        """What was done, in words; with `fresh` there was no other number before."""
        slots = _slots(self.depth(count))
        if self.own == 1:
            stands = f"the one block stands {_times(count)}"
            return f"{stands}, as before" if count == 1 else f"{stands}: {slots}"
        if count == self.own:
            return f"the {self.own} blocks without a motif stand as before"
        return (
            f"no motif repeats, so the {self.own} blocks are stretched to {count} in the same "
            f"order and proportion: {slots}"
        )


Pattern = Repeated | Stretched


def pattern_of(genome: Genome, repeat: bool | None = None) -> Pattern:
    """How a genome's slots become more or fewer.

    Where no motif repeats in it, the genome is repeated whole (`repeat`) or stretched; None: the
    first with at most `WHOLE` slots.
    """
    motif = find_motif(genome)
    if motif is None and (len(genome.slots) <= WHOLE if repeat is None else repeat):
        motif = Motif(0, len(genome.slots), 1)
    if motif is not None:
        body = genome.slots[motif.start : motif.start + motif.period]
        ends = (*_starts(body)[1:], motif.period)
        return Repeated(motif, ends, len(genome.slots))
    starts = _starts(genome.slots)
    made = Stretched(tuple(starts), (), len(genome.slots))
    bare = [_bare(slot) for slot in genome.slots]
    kinds = tuple(tuple(bare[i] for i in made._block(b)) for b in range(len(starts)))
    return replace(made, kinds=kinds)


def _starts(slots: Sequence[Slot]) -> list[int]:
    """The first slots of the blocks; channel mixers before the first mixer belong to the first."""
    found = [i for i, slot in enumerate(slots) if _mixes(slot)]
    return [0, *found[1:]]


def _slots(count: int) -> str:
    return f"{count} slot{'s' if count > 1 else ''}"


def _times(count: int) -> str:
    return "once" if count == 1 else "twice" if count == 2 else f"{count} times"
