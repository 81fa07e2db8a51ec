"""A genome at another width: heads of a sane size, ranks in proportion, everything else as it was.

Which axes change, and how, the axes say themselves (`Axis.grows`). Ratios (expansions), numbers of
experts, windows and taps do not depend on the width and stay. What a genome does not set itself
stays what the operator's name says, at every width; only a number of heads that the name fixes is
set anew.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

from ..primitives.base import Gene, Growth, Primitive, Site
from .genome import Genome, Op
from .resolve import config_of, fits, genes_of, own_genes, primitive_of, replace_ops

SMALLEST_HEAD, LARGEST_HEAD = 64, 256
"""Channels of a head. Published models have heads of 64 (GPT-2, Llama 3.2 1B, Mamba-2) to 256
(Gemma, arXiv 2403.08295); those of a small search have less and grow to 64 before they become
more."""

HEAD_STEP = 16
"""Heads grow in steps of so many channels, which tensor cores like."""

SPREAD = 1.6
"""A head may be so much larger or smaller than wanted where the width divides no better."""


class _Numbers:
    """The genes of an operator by what they do with the width."""

    def __init__(self, op: Op) -> None:
        self.primitive: Primitive = primitive_of(op)
        self.genes: Mapping[str, Gene] = genes_of(op)
        self.own: Mapping[str, Gene] = own_genes(op.name)
        self.given = dict(op.genes)

    def of(self, kind: Growth) -> Iterator[tuple[str, int]]:
        """The axes of that kind whose number is not 0, with it."""
        for axis in self.primitive.axes:
            value = self.genes[axis.name]
            if axis.grows == kind and isinstance(value, int) and value:
                yield axis.name, value

    def number(self, name: str) -> int:
        value = self.own[name]
        assert isinstance(value, int)
        return value


def widen(genome: Genome, width: int) -> Genome | None:
    """The genome at a width; None where the heads of an operator cannot divide it."""
    if width == genome.width:
        return genome
    wide = replace(genome, width=width)
    known: dict[tuple[Op, bool], Op | None] = {}
    seen: set[str] = set()
    slots = []
    for slot in genome.slots:
        ops = []
        for op in slot.branches:
            borrows = op.features in seen
            bare = replace(op, weights=None, features=None)
            if (bare, borrows) not in known:
                site = wide.site_at(0, len(genome.slots), borrows)
                known[bare, borrows] = _widen(bare, genome.width, site)
            found = known[bare, borrows]
            if found is None:
                return None
            ops.append(replace(found, weights=op.weights, features=op.features))
        seen |= {op.features for op in slot.branches if op.features is not None}
        slots.append(replace_ops(slot, ops))
    return replace(wide, slots=tuple(slots))


def changed_genes(before: Op, after: Op) -> dict[str, tuple[Gene, Gene]]:
    """The axes in which two operators of one name differ, with both values."""
    old, new = genes_of(before), genes_of(after)
    return {name: (old[name], new[name]) for name in old if old[name] != new[name]}


def _widen(op: Op, width: int, site: Site) -> Op | None:
    numbers = _Numbers(op)
    ratio = site.width / width
    ranks = _in_proportion(numbers, ratio)
    if "head_dim" in numbers.genes:
        choices = list(_attention(numbers, width, site.width))
    else:
        choices = list(_heads(numbers, ratio, site.width))
    for keys in (_key_sizes(numbers, ratio), {}, _same_keys(op, numbers, width, site)):
        for genes in choices:
            wide = _with(op, numbers, ranks | keys | genes)
            if fits(wide, site):
                return wide
    return None


def _with(op: Op, numbers: _Numbers, genes: Mapping[str, Gene]) -> Op:
    """The operator with other genes; those that the name has anyway are not written."""
    values = {**numbers.given, **genes}
    kept = {
        name: value
        for name, value in values.items()
        if name not in genes or value != numbers.own[name]
    }
    return replace(op, genes=tuple(kept.items()))


def _step(value: float, step: int = 8) -> int:
    return max(step, round(value / step) * step)


def _toward(value: int, ratio: float, limit: int) -> int:
    """The value times the ratio but no further than the limit; one at the limit or beyond stays."""
    if value >= limit or ratio <= 1:
        return value
    return min(limit, max(value, _step(value * ratio)))


def _in_proportion(numbers: _Numbers, ratio: float) -> dict[str, Gene]:
    """Ranks and the like that the genome sets: with the width, or toward the name's own value."""
    made: dict[str, Gene] = {}
    for name, value in numbers.of("width"):
        if name in numbers.given:
            own = numbers.number(name)
            made[name] = _toward(value, ratio, own) if own else _step(value * ratio)
    return made


def _key_sizes(numbers: _Numbers, ratio: float) -> dict[str, Gene]:
    """The key width of a recurrence's heads: toward the name's own, or 64."""
    made: dict[str, Gene] = {}
    if "head_dim" in numbers.genes:
        return made
    for name, value in numbers.of("head"):
        if name in numbers.given:
            made[name] = _toward(value, ratio, numbers.number(name) or SMALLEST_HEAD)
    return made


def _same_keys(op: Op, numbers: _Numbers, width: int, site: Site) -> dict[str, Gene]:
    """The key width that the operator has now, for features that bear no larger one (Based's)."""
    before = replace(site, width=width)
    if "key_dim" not in numbers.genes or not fits(op, before):
        return {}
    size = getattr(config_of(op, before), "key_dim", None)
    return {} if size is None else {"key_dim": size}


def _attention(numbers: _Numbers, width: int, wide: int) -> Iterator[dict[str, Gene]]:
    """Heads and their sizes where a head has a size of its own: the nearest to what is wanted."""
    heads = dict(numbers.of("heads"))["heads"]
    given = dict(numbers.of("head")).get("head_dim", 0)
    size = given or width / heads
    wanted = _head_size(size, wide / width)
    if given:
        share = heads * given / width
        count = _whole(share * wide / wanted, _group(numbers, heads))
        yield _sized(numbers, heads, count, size, int(wanted))
        return
    sizes = [
        wide // count
        for count in range(1, wide + 1)
        if wide % count == 0
        and count % _group(numbers, heads) == 0
        and 1 / SPREAD <= wide / count / wanted <= SPREAD
        and (wide // count % HEAD_STEP == 0 or wide // count == size)
    ]
    for found in sorted(sizes, key=lambda s: (abs(math.log(s / wanted)), s)):
        yield _sized(numbers, heads, wide // found, size, found) | {"head_dim": 0}


def _head_size(size: float, ratio: float) -> float:
    """The channels that a head should have where it had `size`."""
    if size < SMALLEST_HEAD:
        return min(SMALLEST_HEAD, _step(size * max(ratio, 1)) if ratio > 1 else size)
    return min(size, LARGEST_HEAD // 2) if size > LARGEST_HEAD else size


def _group(numbers: _Numbers, heads: int) -> int:
    """Query heads of one key-value head; 1 where one head serves all, which it goes on to do."""
    kv_heads = dict(numbers.of("shares")).get("kv_heads", heads)
    return 1 if kv_heads == 1 else heads // kv_heads


def _whole(heads: float, group: int = 1) -> int:
    """A number of heads: whole groups, and from sixteen on fours, which devices can share."""
    step = math.lcm(group, 4) if heads >= 16 else group
    return max(step, round(heads / step) * step)


def _sized(numbers: _Numbers, heads: int, count: int, size: float, new: int) -> dict[str, Gene]:
    """Genes for `count` heads of `new` channels instead of `heads` of `size`."""
    made: dict[str, Gene] = {"heads": count}
    for name, value in numbers.of("head"):
        made[name] = new if name == "head_dim" else max(2, round(value * new / size / 2) * 2)
    for name, value in numbers.of("shares"):
        made[name] = value if value == 1 else max(1, round(value * count / heads))
    return made


def _heads(numbers: _Numbers, ratio: float, wide: int) -> Iterator[dict[str, Gene]]:
    """Heads that divide the channels of a layer: as many more as it has more channels.

    One head that the name itself fixes is the published form and stays. Where heads would be too
    small, the layer's own rule (0) takes over where it has one; large ones are large states, which
    are a choice.
    """
    made: dict[str, Gene] = {}
    for name, value in numbers.of("heads"):
        own = numbers.number(name)
        if name not in numbers.given and own == 1:
            continue
        count = max(1, round(value * ratio))
        made[name] = count if own or wide / count >= SMALLEST_HEAD // 2 else 0
    groups = dict(numbers.of("shares"))
    yield made
    expand = numbers.genes.get("expand")
    for name, value in numbers.of("heads"):
        if made.get(name) and isinstance(expand, float):
            # The same channels of a head, where the ratio is not whole with so many heads.
            size = round(expand * wide / ratio / value)
            count = _whole(value * ratio)
            yield made | {name: count, "expand": count * size / wide}
    for name, most in groups.items():
        for fewer in range(most, 0, -1):
            yield made | {name: fewer}
