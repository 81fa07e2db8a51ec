"""Whole sequences by blocks of queries, each over the blocks of keys that a table names for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from .bigbird import Blocks
from .patterns import HeadPattern, Window
from .weigh import Score, weigh

BANDS = 4
"""A sequence of so many windows is computed block by block; a shorter one in one piece, masked."""


@dataclass(frozen=True)
class Table:
    """For N blocks of `block` queries: which blocks of keys each reads."""

    block: int
    rows: Tensor
    """(N, m) of int64; -1 for none."""
    first: int
    """The first tokens of the sequence, which every block reads beside them."""
    ends: tuple[int, int]
    """The first and the last so many tokens, not causal, read every token."""

    def pairs(self, tokens: int) -> int:
        """Pairs of queries and keys that are multiplied."""
        blocks, wide = self.rows.shape
        inner = blocks * self.block * (self.first + wide * self.block)
        return inner + sum(self.ends) * tokens


def unflatten(t: Tensor, dim: int, sizes: Sequence[int]) -> Tensor:
    """`Tensor.unflatten`, which torch does not type."""
    split: Tensor = t.unflatten(dim, sizes)  # type: ignore[no-untyped-call]
    return split


def pairs(pattern: HeadPattern, tokens: int) -> int:
    """Pairs of queries and keys that a pass over a whole sequence multiplies, not causal."""
    table = table_of(pattern, tokens)
    return tokens * tokens if table is None else table.pairs(tokens)


@lru_cache(64)
def table_of(pattern: HeadPattern, tokens: int) -> Table | None:
    """None where a table would not save anything, or is not the pattern's form."""
    if isinstance(pattern, Blocks):
        blocks = -(-tokens // pattern.size)
        near, first = pattern.near, pattern.first
        wide = near + first if pattern.causal else 2 * (near + first) - 1
        wide += pattern.drawn
        # Of the causal form's blocks the own one and those that are absent are read in vain.
        if wide * (2 if pattern.causal else 1) >= blocks:
            return None
        ends = (0, 0)
        if not pattern.causal:
            tail = tokens - (blocks - first) * pattern.size
            ends = (first * pattern.size, tail) if first else (0, 0)
        # Blocks of queries that see all are computed apart (`ends`): a row for form's sake.
        lists = [list(pattern.row(block, blocks))[:wide] for block in range(blocks)]
        rows = torch.tensor([row + [-1] * (wide - len(row)) for row in lists])
        return Table(pattern.size, rows, 0, ends)
    if not isinstance(pattern, Window) or pattern.window is None or pattern.dilation > 1:
        return None
    if tokens < BANDS * max(pattern.window, pattern.sinks):
        return None
    offsets = torch.arange(-1, 1 if pattern.causal else 2)
    blocks = -(-tokens // pattern.window)
    rows = torch.arange(blocks)[:, None] + offsets
    rows = rows.masked_fill((rows < 0) | (rows >= blocks), -1)
    ends = (0, 0) if pattern.causal else (pattern.sinks, 0)
    return Table(pattern.window, rows, pattern.sinks, ends)


def attend_tabled(
    q: Tensor, keys: Tensor, values: Tensor, pattern: HeadPattern, table: Table, score: Score
) -> Tensor:
    """`attend` over a whole sequence without biases of positions, but for `table.ends`."""
    batch, tokens = q.shape[0], q.shape[2]
    block, rows = table.block, table.rows.to(q.device)
    blocks = rows.shape[0]
    pad = blocks * block - tokens
    bias = _bias(pattern, table, tokens, q.dtype, q.device)

    def gathered(t: Tensor) -> Tensor:
        """(B, G, T, K) to (B * N, G, first + m * block, K)."""
        by_block = unflatten(F.pad(t, (0, 0, 0, pad)), 2, (blocks, block))
        chosen = by_block.index_select(2, rows.clamp_min(0).flatten())
        chosen = unflatten(chosen, 2, rows.shape).flatten(3, 4).transpose(1, 2)
        if table.first:
            shared = t[:, None, :, : table.first].expand(-1, blocks, -1, -1, -1)
            chosen = torch.cat((shared, chosen), 3)
        return chosen.flatten(0, 1)

    queries = F.pad(q, (0, 0, 0, pad))
    queries = unflatten(queries, 2, (blocks, block)).transpose(1, 2).flatten(0, 1)
    bias = bias[None].expand(batch, -1, -1, -1, -1).flatten(0, 1)
    out = weigh(queries, gathered(keys), gathered(values), bias, score)
    return unflatten(out, 0, (batch, blocks)).transpose(1, 2).flatten(2, 3)[:, :, :tokens]


def _bias(
    pattern: HeadPattern, table: Table, tokens: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """(N, 1, block, first + m * block), -inf where a query does not see a key."""
    rows = table.rows.to(device)
    within = torch.arange(table.block, device=device)
    queries = torch.arange(rows.shape[0], device=device)[:, None] * table.block + within
    keys = rows.clamp_min(0)[..., None] * table.block + within
    absent = (rows < 0)[..., None].expand_as(keys).flatten(1)
    keys = keys.flatten(1)
    if not pattern.causal:
        absent = absent | (keys >= tokens)
    if table.first:
        shared = torch.arange(table.first, device=device)
        # A first token that stands in one of the blocks too is read there.
        twice = ((shared // table.block)[:, None] == rows[:, None]).any(-1)
        keys = torch.cat((shared.expand(len(rows), -1), keys), 1)
        absent = torch.cat((twice, absent), 1)
    padded = rows.shape[0] * table.block
    seen = pattern.sees(queries, keys, tokens if not pattern.causal else padded)
    hidden = ~seen | absent[:, None]
    return (
        torch.zeros((), dtype=dtype, device=device)
        .expand(hidden.shape)
        .masked_fill(hidden, -torch.inf)[:, None]
    )


def attend_ends(
    out: Tensor, q: Tensor, keys: Tensor, values: Tensor, table: Table, score: Score
) -> Tensor:
    """`out` with the rows of the tokens that see every token."""
    first, last = table.ends
    pieces = [out[:, :, first : out.shape[2] - last]]
    if first:
        pieces.insert(0, weigh(q[:, :, :first], keys, values, None, score))
    if last:
        pieces.append(weigh(q[:, :, -last:], keys, values, None, score))
    return torch.cat(pieces, 2)
