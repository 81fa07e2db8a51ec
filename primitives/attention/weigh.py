"""Queries over keys and values that lie ready: scores, their normalisation, weighted sums."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

CAUSAL: Final = "causal"
"""In place of a bias: the queries are all positions of the keys, and each sees those up to it."""


@dataclass(frozen=True)
class Score:
    """How scores become weights: their softmax."""


def weigh(
    q: Tensor, keys: Tensor, values: Tensor, bias: Tensor | Literal["causal"] | None, score: Score
) -> Tensor:
    """softmax(q k^T / sqrt(K) + bias) v; head h reads the key-value head h // (H / G).

    q (B, H, T, K), keys and values (B, G, S, K). `bias` (1 or B, H or 1, T, S) holds -inf where a
    query does not see a key; None where it sees them all. Returns (B, H, T, V) in q's dtype.
    """
    if q.shape[2] == 1 and not isinstance(bias, str):
        return _one(q, keys, values, bias)
    grouped = keys.shape[1] != q.shape[1]
    if isinstance(bias, str):
        return F.scaled_dot_product_attention(q, keys, values, is_causal=True, enable_gqa=grouped)
    mask = None if bias is None else bias.to(q.dtype)
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, enable_gqa=grouped)


def _one(q: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
    """One query per head against the whole cache, as two products; q (B, H, 1, K)."""
    batch, heads, _, width = q.shape
    groups = keys.shape[1]
    scores = (q.reshape(batch, groups, heads // groups, width) * width**-0.5) @ keys.mT
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if bias is not None:
        per_head = bias.expand(-1, heads, -1, -1)
        scores = scores + per_head.reshape(-1, groups, heads // groups, bias.shape[-1])
    weights: Tensor = scores.softmax(-1).to(q.dtype)
    return (weights @ values).reshape(batch, heads, 1, -1)
