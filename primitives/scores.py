"""Causal softmax attention of queries over keys and values, with a window and ALiBi."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.letters import H
from .keyvalues import KeyValues
from .position import alibi_bias


def attend(q: Tensor, kv: KeyValues, window: int | None, slopes: H | None) -> Tensor:
    """softmax(q k^T / sqrt(K) + bias) v, each query over its own position and those before it.

    q is (B, H, T, K), the queries of the last T positions of `kv`; head h reads the key-value head
    h // (H / G). With a window w a query sees itself and the w - 1 tokens before it. `slopes` (H,)
    adds ALiBi. Returns (B, H, T, V) in q's dtype.
    """
    tokens = q.shape[2]
    if window is not None and kv.tokens > window + tokens - 1:
        kv = kv.last(window + tokens - 1)
    keys, values = kv.keys.to(q.dtype), kv.values.to(q.dtype)
    if tokens == 1:
        return _attend_one(q, keys, values, _bias(kv, 1, None, slopes))
    grouped = keys.shape[1] != q.shape[1]
    if slopes is None and kv.tokens == tokens and (window is None or window >= tokens):
        return F.scaled_dot_product_attention(q, keys, values, is_causal=True, enable_gqa=grouped)
    bias = _bias(kv, tokens, window, slopes)
    assert bias is not None
    return F.scaled_dot_product_attention(
        q, keys, values, attn_mask=bias.to(q.dtype), enable_gqa=grouped
    )


def _bias(kv: KeyValues, tokens: int, window: int | None, slopes: H | None) -> Tensor | None:
    """What is added to the scores, (1, H or 1, T, S): -inf where a query sees no key, ALiBi.

    None for one query without ALiBi: it sees every key that it is given.
    """
    if tokens == 1 and slopes is None:
        return None
    device = kv.keys.device
    queries = torch.arange(kv.end - tokens, kv.end, device=device)
    distance = queries[:, None] - kv.positions()
    bias = torch.zeros((), device=device).expand(1, *distance.shape)
    if slopes is not None:
        bias = alibi_bias(slopes, distance)
    hidden = distance < 0
    if window is not None:
        hidden = hidden | (distance >= window)
    return bias.masked_fill(hidden, -torch.inf)[None]


def _attend_one(q: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
    """One query per head against the whole cache, as two products; q (B, H, 1, K)."""
    batch, heads, _, width = q.shape
    groups = keys.shape[1]
    scores = (q.reshape(batch, groups, heads // groups, width) * width**-0.5) @ keys.mT
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if bias is not None:
        scores = scores + bias.reshape(groups, heads // groups, -1)
    weights: Tensor = scores.softmax(-1).to(q.dtype)
    return (weights @ values).reshape(batch, heads, 1, -1)
