"""Softmax attention within buckets of tokens, in order of time, in O(T * reach).

A query sees, of its own bucket, itself and the `reach` tokens before it. Both forms here compute
that: over a whole sequence, sorted by bucket and cut into blocks, and for one query over a cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

ALONE = -1e5
"""The score of a token with itself where it attends to itself only if it sees no other, as in
Reformer (arXiv 2001.04451, 2)."""


def attend_in_buckets(
    q: Tensor, k: Tensor, v: Tensor, bucket: Tensor, buckets: int, reach: int, alone: bool
) -> tuple[Tensor, Tensor]:
    """Every token's attention over its bucket; with `alone` it sees itself only if there is none.

    q, k and v are (N, T, K), `bucket` (N, T) of int64 below `buckets`. Returns the outputs
    (N, T, K) and the logarithm of each softmax' denominator (N, T), in float32 at least.
    """
    rows, tokens = bucket.shape
    size = max(1, min(reach, tokens))
    order = torch.argsort(bucket, dim=-1, stable=True)
    counts = torch.zeros(rows, buckets, dtype=torch.int64, device=q.device)
    counts.scatter_add_(1, bucket, torch.ones_like(bucket))
    # Every bucket begins a new block, so the padding is at most a block per bucket.
    padded = -(-counts // size) * size
    shift = (padded.cumsum(1) - padded) - (counts.cumsum(1) - counts)
    index = torch.arange(tokens, device=q.device).expand(rows, -1)
    slot_of_sorted = index + shift.gather(1, bucket.gather(1, order))
    blocks = min(tokens, tokens // size + buckets)
    token = torch.full((rows, blocks * size), -1, dtype=torch.int64, device=q.device)
    token.scatter_(1, slot_of_sorted, order)
    own = torch.where(token >= 0, bucket.gather(1, token.clamp_min(0)), -1)
    own = own.view(rows, blocks, size)
    place = token.clamp_min(0)

    def by_block(t: Tensor) -> Tensor:
        return take(t, place).view(rows, blocks, size, -1)

    scores = by_block(q) @ _with_previous(by_block(k)).mT
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    behind = torch.arange(size, 2 * size, device=q.device)[:, None] - torch.arange(
        2 * size, device=q.device
    )
    near = (behind >= 0) & (behind <= reach)
    # Padding is a bucket of its own, so its rows are finite too.
    seen = near & (own[..., None] == _with_previous(own[..., None], -2).mT)
    if alone:
        scores = torch.where(behind == 0, ALONE, scores)
    scores = scores.masked_fill(~seen, -torch.inf)
    total = scores.logsumexp(-1, keepdim=True)
    out = (scores - total).exp().to(v.dtype) @ _with_previous(by_block(v))
    slot = torch.empty_like(order).scatter_(1, order, slot_of_sorted)
    return take(out.flatten(1, 2), slot), total.flatten(1).gather(1, slot)


def attend_latest(
    q: Tensor, k: Tensor, v: Tensor, held: Tensor, bucket: Tensor, reach: int, alone: bool
) -> tuple[Tensor, Tensor]:
    """The same for the last token alone: q (N, 1, K) over k and v (N, S, K), itself included.

    `held` (N, S) are the buckets of all tokens, `bucket` (N, 1) the last token's.
    """
    tokens = k.shape[1]
    index = torch.arange(tokens, device=k.device)
    found = torch.where(held == bucket, index, -1).topk(min(reach + 1, tokens), -1).values
    place = found.clamp_min(0)
    scores = q @ take(k, place).mT
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    found = found[:, None]
    if alone:
        scores = torch.where(found == tokens - 1, ALONE, scores)
    scores = scores.masked_fill(found < 0, -torch.inf)
    total = scores.logsumexp(-1, keepdim=True)
    return (scores - total).exp().to(v.dtype) @ take(v, place), total.flatten(1)


def seen(context: int, reach: int) -> float:
    """The keys that decoding reads per query, on average over the positions 1..context: it reads
    as many as the bucket could hold, and masks the rest."""
    near = min(context, reach + 1)
    return (near * (near + 1) / 2 + (context - near) * near) / context


def take(rows: Tensor, index: Tensor) -> Tensor:
    """(N, T, K) at (N, S) to (N, S, K)."""
    return rows.gather(1, index[..., None].expand(-1, -1, rows.shape[-1]))


def _with_previous(blocks: Tensor, padding: int = 0) -> Tensor:
    """Blocks (N, C, m, K), each behind the one before it, (N, C, 2m, K)."""
    before = torch.cat((torch.full_like(blocks[:, :1], padding), blocks[:, :-1]), 1)
    return torch.cat((before, blocks), 2)
