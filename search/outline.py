"""What a drawing of a genome shows: rows of boxes, repeats folded, sharing as links.

The terminal drawing (`draw.py`) and the picture (`picture.py`) are two renderings of this.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..genome.cost import ModelCost
from ..genome.genome import Genome, Op
from ..genome.graph import graph
from ..primitives.base import Cost, show_gene
from ..primitives.catalogue import find


@dataclass(frozen=True)
class Box:
    """One operator."""

    name: str
    genes: str
    """The genes that differ from the name's own, as the notation writes them; empty for none."""
    kind: str
    """mixer or channel."""
    weights: str | None
    features: str | None
    borrows: bool

    @property
    def tags(self) -> tuple[str, ...]:
        """What it shares."""
        tags = [] if self.weights is None else [f"weights {self.weights}"]
        if self.features is not None:
            tags.append(f"{'takes' if self.borrows else 'lends'} kv {self.features}")
        return tuple(tags)

    @property
    def longest(self) -> int:
        """Characters of its longest word: narrower it would be cut. Names break at hyphens."""
        words = [*re.split("(?<=-)", self.name), *self.genes.split(), *" ".join(self.tags).split()]
        return max(map(len, words))


@dataclass(frozen=True)
class Row:
    """One slot."""

    index: int
    boxes: tuple[Box, ...]
    join: str
    cost: Cost
    tokens: float = 1.0
    """The share of the tokens that go through."""

    @property
    def pattern(self) -> tuple[object, ...]:
        """Equal where two slots look alike and cost the same."""
        return (self.boxes, self.join, self.cost, self.tokens)

    def parts(self) -> list[tuple[int, Row]]:
        """What is drawn side by side, one below the other, with the number of its first branch.

        The branches of a chain stand alone, all but the last with the join that leads to the next.
        """
        if self.join != "chain":
            return [(0, self)]
        last = len(self.boxes) - 1
        return [
            (
                j,
                replace(
                    self,
                    boxes=(box,),
                    join="" if j == last else "chain",
                    tokens=1.0 if j else self.tokens,
                ),
            )
            for j, box in enumerate(self.boxes)
        ]

    @property
    def stacked(self) -> str:
        """What stands above branches that do not fit side by side."""
        parts = (f"{len(self.boxes)} branches", self.join, self.entry)
        return ", ".join(filter(None, parts))

    @property
    def entry(self) -> str:
        """The share of the tokens that enter as the notation writes it; empty for all."""
        return "" if self.tokens == 1 else f"tokens={show_gene(self.tokens)}"


@dataclass(frozen=True)
class Block:
    """Slots that stand `count` times in a row; `rows` are those of the first time."""

    count: int
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Link:
    """Operators that share: `places` are (slot, branch) of those drawn, at least one."""

    kind: str
    """weights or features."""
    label: str
    places: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Outline:
    genome: Genome
    cost: ModelCost
    blocks: tuple[Block, ...]
    links: tuple[Link, ...]

    @property
    def rows(self) -> list[Row]:
        """The slots that are drawn, in order."""
        return [row for block in self.blocks for row in block.rows]


def outline(genome: Genome, cost: ModelCost) -> Outline:
    """The drawing's content, read from the genome's graph. `cost` is the genome's.

    Raises GeneError where an operator cannot be built."""
    made = graph(genome)
    boxes: dict[int, list[Box]] = {}
    joins: dict[int, str] = {}
    tokens: dict[int, float] = {}
    for name, node in made.nodes(data=True):
        if node["kind"] == "operator":
            sources = made.pred[name]
            borrows = any(edge["kind"] == "features" for edge in sources.values())
            boxes.setdefault(node["slot"], []).append(_box(node["op"], borrows))
        elif node["kind"] == "join":
            joins[node["slot"]] = node["join"]
        elif "tokens" in node:
            tokens[node["slot"]] = node["tokens"]
    rows = []
    for i, branches in sorted(boxes.items()):
        join = joins.get(i, "")
        ordered = branches if join == "chain" else sorted(branches, key=_shares)
        rows.append(Row(i, tuple(ordered), join, cost.slots[i], tokens[i]))
    blocks = fold(rows)
    drawn = [row for block in blocks for row in block.rows]
    return Outline(genome, cost, blocks, _links(drawn))


def fold(rows: Sequence[Row]) -> tuple[Block, ...]:
    """Fold what stands several times in a row, from the left, the longest stretch first."""
    patterns = [row.pattern for row in rows]
    blocks: list[Block] = []
    alone: list[Row] = []
    i = 0
    while i < len(rows):
        period, count = _longest_repeat(patterns, i)
        if count == 1 or _better_later(rows, patterns, i):
            alone.append(rows[i])
            i += 1
            continue
        if alone:
            blocks.append(Block(1, tuple(alone)))
            alone = []
        blocks.append(Block(count, tuple(rows[i : i + period])))
        i += period * count
    if alone:
        blocks.append(Block(1, tuple(alone)))
    return tuple(blocks)


def _longest_repeat(patterns: Sequence[object], start: int) -> tuple[int, int]:
    """(period, count) of the repeat at `start` that saves the most rows; (1, 1) where none does."""
    best = (1, 1)
    left = len(patterns) - start
    for period in range(1, left // 2 + 1):
        unit = patterns[start : start + period]
        count = 1
        while patterns[start + count * period : start + (count + 1) * period] == unit:
            count += 1
        # On a tie the shorter period, which comes first, stays.
        if (count - 1) * period > (best[1] - 1) * best[0]:
            best = (period, count)
    return best


def _better_later(rows: Sequence[Row], patterns: Sequence[object], start: int) -> bool:
    """Whether the same repeat, begun at a mixer instead of here, saves as many rows."""
    if rows[start].boxes[0].kind == "mixer":
        return False
    period, count = _longest_repeat(patterns, start)
    later = range(start + 1, start + period)
    return any(
        rows[i].boxes[0].kind == "mixer" and _longest_repeat(patterns, i) == (period, count)
        for i in later
    )


def _shares(box: Box) -> bool:
    """Branches that share stand last, beside the rails, where their order means nothing."""
    return box.weights is not None or box.features is not None


def _box(op: Op, borrows: bool) -> Box:
    primitive, _ = find(op.name)
    genes = ", ".join(f"{name}={show_gene(value)}" for name, value in op.genes)
    return Box(op.name, genes, primitive.kind, op.weights, op.features, borrows)


def _links(rows: Sequence[Row]) -> tuple[Link, ...]:
    found: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for row in rows:
        for j, box in enumerate(row.boxes):
            if box.weights is not None:
                found.setdefault(("weights", box.weights), []).append((row.index, j))
            if box.features is not None:
                found.setdefault(("features", box.features), []).append((row.index, j))
    return tuple(Link(kind, label, tuple(places)) for (kind, label), places in found.items())
