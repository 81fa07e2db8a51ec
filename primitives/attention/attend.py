"""The queries of a call over the keys and values that their pattern shows them."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels.backend import choose
from .flex import attend_flex, form
from .keyvalues import HeadedKeyValues, KeyValues
from .patterns import Chunk, HeadPattern, Pattern, Summaries, Window
from .tables import BANDS, attend_ends, attend_tabled, table_of, unflatten
from .weigh import CAUSAL, Biases, Score, weigh

PIECES = 64
"""A call is computed in at most so many pieces, one after the other."""


def attend(
    q: Tensor,
    kv: KeyValues | HeadedKeyValues,
    pattern: Pattern,
    score: Score,
    position: Biases | None,
) -> Tensor:
    """softmax(q k^T / sqrt(K) + bias) v, each query over the keys that its pattern shows it.

    q is (B, H, T, K), the queries of the last T positions of `kv`; head h reads the key-value head
    h // (H / G). `position` adds its biases. Returns (B, H, T, V) in q's dtype.
    """
    held = kv.parts if isinstance(kv, HeadedKeyValues) else (kv,)
    groups = sum(one.keys.shape[1] for one in held)
    parts = pattern.parts(groups)
    if len(parts) == 1:
        return _attend(q, held[0], parts[0][1], score, position)
    queries = q.shape[1] // groups
    out, start = [], 0
    for index, (heads, part) in enumerate(parts):
        own = held[0].heads(start, start + heads) if len(held) == 1 else held[index]
        first, last = start * queries, (start + heads) * queries
        biases = None if position is None else _of_heads(position, first, last)
        out.append(_attend(q[:, first:last], own, part, score.heads(first, last), biases))
        start += heads
    return torch.cat(out, 1)


def _of_heads(position: Biases, first: int, last: int) -> Biases:
    """The biases of some heads; of a kind that does not depend on the queries."""
    return lambda distance, q: position(distance, q)[:, first:last]


def _attend(
    q: Tensor, kv: KeyValues, pattern: HeadPattern, score: Score, position: Biases | None
) -> Tensor:
    """`attend` with one pattern for all heads."""
    tokens, end = q.shape[2], kv.end
    if tokens == 1 and pattern.causal:
        # Exactly what the query sees, in the cache's order unless scores are kept for others.
        kv = kv.take((*pattern.past(end - 1, end), range(end - 1, end)))
        if score.tape is not None:
            kv = kv.ordered()
        bias = None
        if position is not None:
            bias = position((end - 1) - kv.positions()[None], q)
        return weigh(q, kv.keys.to(q.dtype), kv.values.to(q.dtype), bias, score)
    if end != tokens or kv.tokens != tokens:
        return _in_pieces(q, kv, pattern, score, position)
    keys, values = kv.keys.to(q.dtype), kv.values.to(q.dtype)
    case = form(pattern, score, position is not None, q, values)
    backend = choose("attention", q.device, case)
    if backend == "definition":
        return weigh(q, keys, values, _bias(q, kv, pattern, position), score)
    if backend == "flex":
        return attend_flex(q, keys, values, pattern)
    return _attend_whole(q, keys, values, pattern, score, position)


def _attend_whole(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    pattern: HeadPattern,
    score: Score,
    position: Biases | None,
) -> Tensor:
    """A sequence from its start, in the form whose cost is the pattern's."""
    tokens = q.shape[2]
    everything = (
        isinstance(pattern, Window)
        and pattern.dilation == 1
        and (pattern.window is None or pattern.window >= tokens)
    )
    if everything and position is None:
        return weigh(q, keys, values, CAUSAL if pattern.causal else None, score)
    if not everything:
        if isinstance(pattern, Window) and pattern.dilation > 1:
            if tokens >= 2 * pattern.dilation:
                return _by_class(q, keys, values, pattern, score, position)
        elif isinstance(pattern, Chunk):
            if tokens >= 2 * pattern.chunk:
                return _by_chunk(q, keys, values, pattern, score, position)
        elif isinstance(pattern, Summaries):
            if tokens >= 2 * pattern.stride and position is None:
                return _by_summary(q, keys, values, pattern, score)
        elif _is_plain(pattern):
            assert isinstance(pattern, Window)
            assert pattern.window is not None
            if tokens >= BANDS * pattern.window:
                return _banded(q, keys, values, pattern, score, position)
        elif position is None:
            table = table_of(pattern, tokens)
            if table is not None:
                out = attend_tabled(q, keys, values, pattern, table, score)
                return attend_ends(out, q, keys, values, table, score)
    return _in_pieces(q, KeyValues(keys, values), pattern, score, position)


def _is_plain(pattern: HeadPattern) -> bool:
    return isinstance(pattern, Window) and pattern.causal and pattern.sinks == 0


def _in_pieces(
    q: Tensor, kv: KeyValues, pattern: HeadPattern, score: Score, position: Biases | None
) -> Tensor:
    """Any call: pieces of queries, each over the keys that one of them sees, masked."""
    tokens, end = q.shape[2], kv.end
    piece = pattern.block() if pattern.causal else None
    piece = tokens if piece is None else max(piece, -(-tokens // PIECES))
    if tokens < 2 * piece:
        piece = tokens
    out = []
    for index, queries in enumerate(torch.split(q, piece, 2)):
        start = end - tokens + index * piece
        stop = start + queries.shape[2]
        near = kv
        if pattern.causal:
            near = replace(kv.take((*pattern.past(start, stop), range(start, stop))), stop=stop)
        keys, values = near.keys.to(q.dtype), near.values.to(q.dtype)
        bias = _bias(queries, near, pattern, position)
        out.append(weigh(queries, keys, values, bias, score))
    return out[0] if len(out) == 1 else torch.cat(out, 2)


def _banded(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    pattern: Window,
    score: Score,
    position: Biases | None,
) -> Tensor:
    """A window in O(T * window).

    A block of `window` queries sees no key outside its own block and the one before it, so all
    blocks but the first see the same distances.
    """
    batch, heads, tokens, _ = q.shape
    window = pattern.window
    assert window is not None
    start = KeyValues(keys[:, :, :window], values[:, :, :window])
    first = _in_pieces(q[:, :, :window], start, pattern, score, position)
    blocks = -(-tokens // window)
    pad = blocks * window - tokens
    if pad:
        # Keys after the last query: no query sees them.
        q, keys, values = (F.pad(t, (0, 0, 0, pad)) for t in (q, keys, values))

    def by_block(t: Tensor) -> Tensor:
        """(B, heads, tokens, K) to (B, blocks, heads, window, K)."""
        return t.reshape(batch, t.shape[1], -1, window, t.shape[3]).transpose(1, 2)

    def with_previous(t: Tensor) -> Tensor:
        own = by_block(t)
        return torch.cat((own[:, :-1], own[:, 1:]), 3).flatten(0, 1)

    pair = KeyValues(keys[:1, :1, : 2 * window], values[:1, :1, : 2 * window])
    queries = by_block(q)[:, 1:].flatten(0, 1)
    bias = _bias(queries, pair, pattern, position)
    rest = weigh(queries, with_previous(keys), with_previous(values), bias, score)
    rest = rest.reshape(batch, blocks - 1, heads, window, -1).transpose(1, 2)
    rest = rest.reshape(batch, heads, -1, rest.shape[-1])[:, :, : tokens - window]
    return torch.cat((first, rest), 2)


def _by_class(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    pattern: Window,
    score: Score,
    position: Biases | None,
) -> Tensor:
    """Dilation d: the tokens whose positions agree mod d are a sequence with a plain window."""
    dilation, tokens, batch = pattern.dilation, q.shape[2], q.shape[0]
    pad = -tokens % dilation

    def by_class(t: Tensor) -> Tensor:
        # Keys after the last query: no query sees them.
        classes = unflatten(F.pad(t, (0, 0, 0, pad)), 2, (-1, dilation))
        return classes.movedim(3, 1).flatten(0, 1)

    def spread(distance: Tensor, queries: Tensor) -> Tensor:
        assert position is not None
        return position(distance * dilation, queries)

    biases = None if position is None else spread
    out = _attend_whole(
        by_class(q), by_class(keys), by_class(values), Window(pattern.window), score, biases
    )
    return unflatten(out, 0, (batch, dilation)).movedim(1, 3).flatten(2, 3)[:, :, :tokens]


def _by_chunk(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    pattern: Chunk,
    score: Score,
    position: Biases | None,
) -> Tensor:
    """Every chunk is a sequence of its own."""
    tokens, batch = q.shape[2], q.shape[0]
    pad = -tokens % pattern.chunk

    def by_chunk(t: Tensor) -> Tensor:
        chunks = unflatten(F.pad(t, (0, 0, 0, pad)), 2, (-1, pattern.chunk))
        return chunks.transpose(1, 2).flatten(0, 1)

    out = _attend_whole(by_chunk(q), by_chunk(keys), by_chunk(values), Window(), score, position)
    return unflatten(out, 0, (batch, -1)).transpose(1, 2).flatten(2, 3)[:, :, :tokens]


def _by_summary(
    q: Tensor, keys: Tensor, values: Tensor, pattern: Summaries, score: Score
) -> Tensor:
    """Pieces of whole blocks over the summaries before them and their own tokens."""
    stride, width, tokens = pattern.stride, pattern.width, q.shape[2]
    blocks = max(1, -(-tokens // (stride * PIECES)))
    piece = blocks * stride
    whole = tokens // stride * stride

    def summaries(t: Tensor) -> Tensor:
        by_block = unflatten(t[:, :, :whole], 2, (-1, stride))
        return by_block[:, :, :, stride - width :].flatten(2, 3)

    far_keys, far_values = summaries(keys), summaries(values)
    own = torch.arange(min(piece, tokens), device=q.device)
    hidden = ~pattern.sees(own, own)
    bias = torch.zeros((), dtype=q.dtype, device=q.device).expand(hidden.shape)
    bias = bias.masked_fill(hidden, -torch.inf)[None, None]
    out = []
    split = zip(*(torch.split(t, piece, 2) for t in (q, keys, values)), strict=True)
    for index, (queries, near_keys, near_values) in enumerate(split):
        far, size = index * blocks * width, queries.shape[2]
        out.append(
            weigh(
                queries,
                torch.cat((far_keys[:, :, :far], near_keys), 2),
                torch.cat((far_values[:, :, :far], near_values), 2),
                F.pad(bias[:, :, :size, :size], (far, 0)),
                score,
            )
        )
    return torch.cat(out, 2)


def _bias(q: Tensor, kv: KeyValues, pattern: HeadPattern, position: Biases | None) -> Tensor:
    """What is added to the scores, (1 or B, H or 1, T, S): -inf where a query sees no key, and the
    position's biases."""
    device = kv.keys.device
    queries = torch.arange(kv.end - q.shape[2], kv.end, device=device)
    at = kv.positions()
    hidden = ~pattern.sees(queries, at, kv.end)
    if position is None:
        bias = torch.zeros((), device=device).expand(1, 1, *hidden.shape)
    else:
        bias = position(queries[:, None] - at, q)
    return bias.masked_fill(hidden, -torch.inf)
