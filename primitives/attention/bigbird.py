"""BigBird's pattern: blocks of a window, of the first tokens, and drawn at random."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from heapq import heappop, heappush

import torch
from torch import Tensor

from .patterns import HeadPattern, Mask, Ranges


@dataclass(frozen=True)
class Blocks(HeadPattern):
    """Blocks that a block of queries sees (Zaheer et al., arXiv 2007.14062, 2 and appendix D).

    The first `first` blocks, the own one and the `near - 1` before it, and `drawn` more of those
    before, drawn once for ever by `seed`; within them the tokens up to the query. The same for all
    heads, so that one set of blocks is cached; the authors draw for every head anew.

    Not causal: `near - 1` blocks after the own one too, the drawn ones from anywhere, and, as in
    the authors' internal construction, the first and the last `first` blocks are global: they see
    every token and every token sees them.
    """

    size: int
    near: int
    first: int
    drawn: int
    seed: int = 0
    causal: bool = True

    def row(self, block: int, blocks: int) -> tuple[int, ...]:
        """The blocks that the queries of one see, ascending; of `blocks` if not causal."""
        free: Sequence[int]
        if self.causal:
            fixed = {
                *range(min(self.first, block)),
                *range(max(0, block - self.near + 1), block + 1),
            }
            free = range(self.first, max(self.first, block - self.near + 1))
        else:
            near = range(max(0, block - self.near + 1), min(blocks, block + self.near))
            ends = {*range(min(self.first, blocks)), *range(max(0, blocks - self.first), blocks)}
            if block in ends:
                return tuple(range(blocks))
            fixed = ends | set(near)
            free = [other for other in range(blocks) if other not in fixed]
        # Strings seed alike on every platform and version.
        draw = random.Random(f"{self.seed} {block}" + ("" if self.causal else f" {blocks}"))
        return tuple(sorted(fixed | set(draw.sample(free, min(self.drawn, len(free))))))

    def visible(self, query: Tensor, key: Tensor, tokens: int = 0) -> Tensor:
        tokens = tokens or int(torch.maximum(query.max(), key.max())) + 1
        return self.mask(tokens, query.device)(query, key)

    def mask(self, tokens: int, device: torch.device) -> Mask:
        allowed = self.allowed(-(-tokens // self.size)).to(device)

        def visible(query: Tensor, key: Tensor) -> Tensor:
            seen = allowed[query // self.size, key // self.size]
            return seen & (key <= query) if self.causal else seen

        return visible

    def allowed(self, blocks: int) -> Tensor:
        """The mask of blocks, (blocks, blocks)."""
        return _allowed(self, blocks)

    def past(self, start: int, end: int) -> Ranges:
        seen: set[int] = set()
        for block in range(start // self.size, (end - 1) // self.size + 1):
            seen.update(_row(self, block))
        return self._ranges(seen, start)

    def _ranges(self, blocks: set[int], end: int) -> Ranges:
        """The positions of blocks before `end`."""
        size = self.size
        return tuple(
            range(b * size, min(end, (b + 1) * size)) for b in sorted(blocks) if b * size < end
        )

    def live(self, end: int, size: int) -> Ranges:
        room = self.room(size)
        own = end // self.size
        # Later blocks see the blocks whose last reader is still to come, and the own one is begun.
        last = _layout(self, room).last
        kept = {b for b in range(own) if last[b] >= own} | {own}
        return self._ranges(kept, end)

    def kept(self, context: int) -> int:
        return min(context, _layout(self, context).used * self.size)

    def slots(self, at: Tensor, size: int) -> Tensor:
        table = _layout(self, self.room(size)).slots.to(at.device)
        return table[at // self.size] * self.size + at % self.size

    def linear(self, end: int, size: int) -> bool:
        return end <= min(size, _layout(self, self.room(size)).straight * self.size)

    def held(self, end: int, size: int) -> int:
        return end if self.linear(end, size) else size

    def room(self, size: int) -> int:
        return _room(self, size)

    def seen(self, context: int) -> float:
        total = 0
        for block in range(-(-context // self.size)):
            queries = min(self.size, context - block * self.size)
            total += (len(_row(self, block)) - 1) * self.size * queries
            total += queries * (queries + 1) // 2
        return total / context

    def block(self) -> int | None:
        return self.size


@lru_cache(1 << 16)
def _row(pattern: Blocks, block: int) -> tuple[int, ...]:
    """The row of the causal form, which does not depend on the sequence's length."""
    return pattern.row(block, 0)


@lru_cache(16)
def _allowed(pattern: Blocks, blocks: int) -> Tensor:
    with torch.inference_mode(False):
        allowed = torch.zeros(blocks, blocks, dtype=torch.bool)
        for block in range(blocks):
            allowed[block, list(pattern.row(block, blocks))] = True
    return allowed


@dataclass(frozen=True, eq=False)
class _Layout:
    """Where a cache for some number of blocks puts them."""

    slots: Tensor
    """The slot of every block."""
    last: list[int]
    """The last block that sees each one."""
    used: int
    """The number of slots."""
    straight: int
    """The first so many blocks stand in the slot of their own number."""


@lru_cache(64)
def _layout(pattern: Blocks, context: int) -> _Layout:
    """The layout for sequences of at most `context` tokens.

    Blocks take the lowest slot that is free; one is free again when no later block sees what it
    holds. So the number of slots is the largest number of blocks that are needed at one time.
    """
    blocks = -(-context // pattern.size)
    last = list(range(blocks))
    for block in range(blocks):
        for other in _row(pattern, block):
            last[other] = block
    ends: list[list[int]] = [[] for _ in range(blocks + 1)]
    for block, end in enumerate(last):
        ends[end + 1].append(block)
    slots: list[int] = []
    free: list[int] = []
    used = 0
    for block in range(blocks):
        for other in ends[block]:
            heappush(free, slots[other])
        if free:
            slots.append(heappop(free))
        else:
            slots.append(used)
            used += 1
    straight = next((b for b, slot in enumerate(slots) if b != slot), blocks)
    # A tensor made in inference mode could not be used in training later.
    with torch.inference_mode(False):
        return _Layout(torch.tensor(slots), last, used, straight)


@lru_cache(64)
def _room(pattern: Blocks, size: int) -> int:
    """The longest context whose layout has at most `size` slots of tokens.

    Slots grow with the context, so the cache's size says for which context it was made, or for a
    longer one that it serves as well.
    """
    if size % pattern.size:
        return size
    slots = size // pattern.size
    low = high = slots
    while _layout(pattern, high * pattern.size).used <= slots and high < FARTHEST * slots:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        fits = _layout(pattern, middle * pattern.size).used <= slots
        low, high = (middle, high) if fits else (low, middle)
    return low * pattern.size


FARTHEST = 1024
"""A cache that serves so many times its own size serves enough: without drawn blocks any length."""
