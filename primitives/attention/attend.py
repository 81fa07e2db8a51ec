"""The queries of a call over the keys and values that their pattern shows them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .distance import DistanceBias
from .keyvalues import KeyValues
from .patterns import Pattern
from .weigh import CAUSAL, Score, weigh

BANDS = 4
"""A sequence of so many windows is computed block by block; a shorter one in one piece, masked."""


def attend(
    q: Tensor, kv: KeyValues, pattern: Pattern, score: Score, position: DistanceBias | None
) -> Tensor:
    """softmax(q k^T / sqrt(K) + bias) v, each query over its own position and those before it.

    q is (B, H, T, K), the queries of the last T positions of `kv`; head h reads the key-value head
    h // (H / G). With a window w a query sees itself and the w - 1 tokens before it. `position`
    adds its biases. Returns (B, H, T, V) in q's dtype.
    """
    tokens, window = q.shape[2], pattern.window
    if window is not None and kv.tokens > window + tokens - 1:
        kv = kv.last(window + tokens - 1)
    keys, values = kv.keys.to(q.dtype), kv.values.to(q.dtype)
    if tokens == 1:
        # One query sees every key that it is given.
        bias = None if position is None else _bias(kv, q, None, position)
        return weigh(q, keys, values, bias, score)
    if kv.tokens == tokens and window is not None and tokens >= BANDS * window:
        return _attend_banded(q, keys, values, pattern, score, position)
    if position is None and kv.tokens == tokens and (window is None or window >= tokens):
        return weigh(q, keys, values, CAUSAL, score)
    return weigh(q, keys, values, _bias(kv, q, window, position), score)


def _attend_banded(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    pattern: Pattern,
    score: Score,
    position: DistanceBias | None,
) -> Tensor:
    """A whole sequence from its start in O(T * window).

    A block of `window` queries sees no key outside its own block and the one before it, so all
    blocks but the first see the same distances.
    """
    batch, heads, tokens, width = q.shape
    window = pattern.window
    assert window is not None
    start = KeyValues(keys[:, :, :window], values[:, :, :window])
    first = attend(q[:, :, :window], start, pattern, score, position)
    blocks = -(-tokens // window)
    pad = blocks * window - tokens
    if pad:
        # Keys after the last query: no query sees them.
        q, keys, values = (F.pad(t, (0, 0, 0, pad)) for t in (q, keys, values))

    def by_block(t: Tensor) -> Tensor:
        """(B, heads, tokens, K) to (B, blocks, heads, window, K)."""
        return t.reshape(batch, t.shape[1], -1, window, width).transpose(1, 2)

    def with_previous(t: Tensor) -> Tensor:
        own = by_block(t)
        return torch.cat((own[:, :-1], own[:, 1:]), 3).flatten(0, 1)

    pair = KeyValues(keys[:1, :1, : 2 * window], values[:1, :1, : 2 * window])
    queries = by_block(q)[:, 1:].flatten(0, 1)
    bias = _bias(pair, queries, window, position)
    rest = weigh(queries, with_previous(keys), with_previous(values), bias, score)
    rest = rest.reshape(batch, blocks - 1, heads, window, width).transpose(1, 2)
    rest = rest.reshape(batch, heads, -1, width)[:, :, : tokens - window]
    return torch.cat((first, rest), 2)


def _bias(kv: KeyValues, q: Tensor, window: int | None, position: DistanceBias | None) -> Tensor:
    """What is added to the scores, (1 or B, H or 1, T, S): -inf where a query sees no key, and the
    position's biases."""
    device = kv.keys.device
    queries = torch.arange(kv.end - q.shape[2], kv.end, device=device)
    distance = queries[:, None] - kv.positions()
    if position is None:
        bias = torch.zeros((), device=device).expand(1, 1, *distance.shape)
    else:
        bias = position(distance, q)
    hidden = distance < 0
    if window is not None:
        hidden = hidden | (distance >= window)
    return bias.masked_fill(hidden, -torch.inf)
