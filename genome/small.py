"""A genome in small: the same kinds of slots and the same choices, at the size of proxy tasks.

`scale` keeps heads and states as wide as large models have them. Here they shrink: a few layers of
a narrow width stand for the model, one of each kind that it has, so that a search can train many
like it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping
from dataclasses import replace

from ..primitives.base import Gene
from .genome import BYTE_VOCAB, Genome, Op, Slot
from .resolve import genes_of, own_genes, primitive_of
from .rules import violations
from .sharing import prune, rows_of, with_rows

WIDTH = 64
LAYERS = 4
HEADS = 4

LEFT_OUT = frozenset(
    (
        *("head_dim", "latent", "rope_dim", "q_rank", "value_dim"),
        *("computed", "rank", "gate_rank", "value_rank", "decay_rank", "blocks", "key_expand"),
        *("rope_theta", "rope_scaling", "rope_factor", "rope_original", "rope_rounded"),
    )
)
"""Sizes that follow from the width where a gene does not say, and what long contexts need."""

AT_MOST: dict[str, int] = {
    "window": 32,
    "key_dim": 16,
    "state": 16,
    "experts": 8,
    "top_k": 2,
    "shared": 1,
    "zero": 1,
    "copy": 1,
    "constant": 1,
    "sinks": 4,
    "block": 16,
    "segment": 16,
    "memory": 16,
}

OF_GROUPS = ("device_weight", "sent_weight")
"""Losses between groups of experts, which are left out."""

RATIOS = ("expansion", "expand")
"""Rounded to quarters, so that the narrow width has whole channels."""

EXPERT_EXPANSION = 0.5
"""Inner width over width of an expert: two of them are as wide as the model."""


class SmallError(ValueError):
    """A genome that has no form at this size: one line."""


def small(genome: Genome) -> Genome:
    """The genome in small, with bytes as its alphabet; the slots that stay share what they shared.

    Raises SmallError where it is not valid.
    """
    left = replace(genome, width=WIDTH, vocab=BYTE_VOCAB, tied=True, slots=tuple(_layers(genome)))
    made = with_rows(left, [[_op(op) for op in row] for row in rows_of(left)])
    alone = [[Op(op.name, op.genes) for op in row] for row in rows_of(made)]
    broken = violations(with_rows(made, alone))
    if broken:
        raise SmallError(f"in small, at width {WIDTH}: {broken[0]}")
    return prune(made)


def _op(op: Op) -> Op:
    """The operator with the genes that are no sizes, and sizes for the small width."""
    genes, own = genes_of(op), own_genes(op.name)
    written: dict[str, Gene] = {}
    for name, value in genes.items():
        found = own[name] if _keeps(name, genes, own) else _gene(name, value, genes)
        if found != own[name]:
            written[name] = found
    return replace(op, genes=tuple(written.items()))


def _gene(name: str, value: Gene, genes: Mapping[str, Gene]) -> Gene:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    experts = _mixture(genes)
    if name == "heads":
        return min(value, HEADS)
    if name == "kv_heads":
        return _heads(value, genes["heads"])
    if name in ("groups", "top_groups"):
        # Of experts, or of queries and keys.
        return 1 if experts else _heads(value, genes["heads"])
    if name in OF_GROUPS:
        return 0.0
    if name in RATIOS:
        return EXPERT_EXPANSION if experts else max(0.25, round(4 * value) / 4)
    return min(value, AT_MOST.get(name, value))


def _keeps(name: str, genes: Mapping[str, Gene], own: Mapping[str, Gene]) -> bool:
    """The point's own value stays, whatever the gene says: it is a size, or has no effect."""
    if name == "window" and genes.get("pattern") == "full":
        return True
    ratio = name in RATIOS and genes[name] == own[name] and not _mixture(genes)
    return ratio or name in LEFT_OUT


def _mixture(genes: Mapping[str, Gene]) -> bool:
    return "experts" in genes


def _heads(count: int | float, of: Gene) -> int:
    """As large a share of the small number of heads: 1, 2, or 0 for as many."""
    assert isinstance(of, int)
    if count in (0, of):
        return 0
    # Heads of 0 are as many as the width has room for.
    share = count / of if of else 0.25
    return 1 if share < 0.5 else 2


def _layers(genome: Genome) -> list[Slot]:
    """Slots of a few layers, of every kind at least one, in the order in which the kinds stand."""
    paired = alternates(genome)
    step = 2 if paired else 1
    # Without pairs a layer is one operator.
    most = LAYERS if paired or all(map(_mixes, genome.slots)) else 2 * LAYERS
    layers = [genome.slots[i : i + step] for i in range(0, len(genome.slots), step)]
    kinds = [tuple(_kind(slot) for slot in layer) for layer in layers]
    counts = Counter(kinds)
    quota = dict.fromkeys(counts, 1)
    while sum(quota.values()) < min(most, len(layers)):
        # The kind that is furthest behind its share.
        behind = max(quota, key=lambda kind: counts[kind] / (quota[kind] + 0.5))
        quota[behind] += 1
    chosen: list[int] = []
    for kind, wanted in quota.items():
        places = [i for i, other in enumerate(kinds) if other == kind]
        chosen += [places[int((k + 0.5) * len(places) / wanted)] for k in range(wanted)]
    return [slot for i in sorted(chosen) for slot in layers[i]]


def alternates(genome: Genome) -> bool:
    """Mixers and channel mixers take turns, mixers first."""
    return len(genome.slots) % 2 == 0 and all(
        _mixes(slot) == (i % 2 == 0) for i, slot in enumerate(genome.slots)
    )


def _mixes(slot: Slot) -> bool:
    return any(primitive_of(op).kind == "mixer" for op in slot.branches)


def _kind(slot: Slot) -> Hashable:
    """What tells layers apart: the operators with their genes that are no numbers."""
    words = [
        (op.name, tuple((k, v) for k, v in op.genes if isinstance(v, bool | str)))
        for op in slot.branches
    ]
    return tuple(words), slot.join
