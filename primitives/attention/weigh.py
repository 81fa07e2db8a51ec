"""Queries over keys and values that lie ready: scores, their normalisation, weighted sums."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels.letters import H

CAUSAL: Final = "causal"
"""In place of a bias: the queries are all positions of the keys, and each sees those up to it."""

Bias = Tensor | Literal["causal"] | None

Biases = Callable[[Tensor, Tensor], Tensor]
"""`DistanceBias`: from distances (T, S) and queries (B, H, T, K) to biases (1 or B, H, T, S)."""


class Tape:
    """The raw scores of one operator's call, to which it adds those of an earlier operator.

    Operators with equal heads and patterns weigh the same blocks in the same order, so the scores
    meet block by block.
    """

    def __init__(self, earlier: list[Tensor] | None) -> None:
        self.earlier = earlier
        self.scores: list[Tensor] = []

    def add(self, scores: Tensor) -> Tensor:
        if self.earlier is not None:
            scores = scores + self.earlier[len(self.scores)]
        self.scores.append(scores)
        return scores


@dataclass(frozen=True, eq=False)
class Score:
    """How scores become weights in one call; all defaults: by their softmax.

    In this order: earlier scores (`tape`), the cap, mixing over heads (`before`), the bias, the
    softmax or sigmoid, mixing over heads (`after`), the difference of pairs of heads.
    """

    form: Literal["softmax", "sigmoid"] = "softmax"
    cap: float = 0.0
    """Scores are cap * tanh(score / cap); 0 for none."""
    sinks: H | None = None
    """Per head the score of one more key whose value is zero."""
    before: Tensor | None = None
    """(H, H): new head, old head."""
    after: Tensor | None = None
    """(H, H), the same for the weights."""
    difference: Tensor | None = None
    """Of the weights of heads h and h + H/2: first - difference * second; a scalar."""
    tape: Tape | None = None

    def heads(self, first: int, last: int) -> Score:
        """That of the heads first..last-1, where heads are weighed apart from each other.

        Mixed and paired heads cannot be.
        """
        return self if self.sinks is None else replace(self, sinks=self.sinks[first:last])

    @property
    def fused(self) -> bool:
        """One or two softmaxes over scores and bias: what torch's kernels do."""
        others = (self.sinks, self.before, self.after, self.tape)
        return self.form == "softmax" and not self.cap and all(o is None for o in others)


def weigh(q: Tensor, keys: Tensor, values: Tensor, bias: Bias, score: Score) -> Tensor:
    """softmax(q k^T / sqrt(K) + bias) v; head h reads the key-value head h // (H / G).

    q (B, H, T, K), keys and values (B, G, S, K). `bias` (1 or B, H or 1, T, S) holds -inf where a
    query does not see a key; None where it sees them all. Returns (B, H, T, V) in q's dtype. With
    a difference the pair of heads i and i + H/2 makes 2V channels, which are heads 2i and 2i + 1 of
    the result.
    """
    # One query is quicker as two products than by the kernels for many.
    if not score.fused or (q.shape[2] == 1 and not isinstance(bias, str)):
        return _explicit(q, keys, values, bias, score)
    if score.difference is None:
        return _fused(q, keys, values, bias)
    # Two calls, because torch's flash kernels want values as wide as keys.
    halves = [half.repeat(1, 2, 1, 1) for half in values.chunk(2, 1)]
    both = torch.stack([_fused(q, keys, half, bias) for half in halves], 2)
    first, second = both.chunk(2, 1)
    return (first - score.difference.to(q.dtype) * second).flatten(1, 2)


def _fused(q: Tensor, keys: Tensor, values: Tensor, bias: Bias) -> Tensor:
    grouped = keys.shape[1] != q.shape[1]
    if isinstance(bias, str):
        return F.scaled_dot_product_attention(q, keys, values, is_causal=True, enable_gqa=grouped)
    mask = None if bias is None else bias.to(q.dtype)
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, enable_gqa=grouped)


def _explicit(q: Tensor, keys: Tensor, values: Tensor, bias: Bias, score: Score) -> Tensor:
    """As `weigh`, with the scores in memory, in float32 at least."""
    batch, heads, tokens, width = q.shape
    groups, seen = keys.shape[1:3]
    scores = (q * width**-0.5).reshape(batch, groups, -1, width) @ keys.mT
    scores = scores.reshape(batch, heads, tokens, seen)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if score.tape is not None:
        scores = score.tape.add(scores)
    if score.cap:
        scores = score.cap * torch.tanh(scores / score.cap)
    if score.before is not None:
        scores = _mix(score.before, scores)
    if isinstance(bias, str):
        hidden = torch.ones(tokens, seen, dtype=torch.bool, device=q.device).triu(1)
        bias = torch.zeros((), device=q.device).expand(1, 1, tokens, seen)
        bias = bias.masked_fill(hidden, -torch.inf)
    if bias is not None:
        scores = scores + bias
    weights = _sigmoid(scores, bias) if score.form == "sigmoid" else _softmax(scores, score.sinks)
    if score.after is not None:
        weights = _mix(score.after, weights)
    weights = weights.to(q.dtype)
    if score.difference is None:
        return (weights.reshape(batch, groups, -1, seen) @ values).reshape(batch, heads, tokens, -1)
    first, second = weights.chunk(2, 1)
    weights = first - score.difference.to(q.dtype) * second
    halves = values.reshape(batch, 2, groups // 2, seen, -1)
    out = weights.reshape(batch, 1, groups // 2, -1, seen) @ halves
    return out.reshape(batch, 2, heads // 2, tokens, -1).transpose(1, 2).flatten(1, 2)


def _softmax(scores: Tensor, sinks: H | None) -> Tensor:
    if sinks is None:
        return scores.softmax(-1)
    batch, heads, tokens, _ = scores.shape
    column = sinks.to(scores.dtype).view(1, heads, 1, 1).expand(batch, -1, tokens, -1)
    return torch.cat((scores, column), -1).softmax(-1)[..., :-1]


def _sigmoid(scores: Tensor, bias: Tensor | None) -> Tensor:
    """sigmoid(score - log n), n being the number of keys that the query sees."""
    if bias is None:
        return torch.sigmoid(scores - math.log(scores.shape[-1]))
    seen = (bias > -torch.inf).sum(-1, keepdim=True).clamp_min(1)
    return torch.sigmoid(scores - seen.to(scores.dtype).log())


def _mix(matrix: Tensor, scores: Tensor) -> Tensor:
    """matrix (H, H) over the heads of (B, H, T, S)."""
    return (matrix.to(scores.dtype) @ scores.flatten(2)).view_as(scores)
