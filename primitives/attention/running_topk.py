"""SPARSEK, and the k best so far with their gates, for every prefix of a sequence of scores.

SPARSEK(z, k) = argmin |p - z|^2 over 0 <= p <= 1 with sum p = k (Lou et al., arXiv 2406.16747),
which is clamp(z - tau, 0, 1) for the tau that makes the sum k: the k best of z, with gates that
have a gradient.

When scores are added, tau does not fall, so a score at or below it has no gate ever again: each
step needs only those above.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

TIE = 2.0**-14
"""Scores that round to the same multiple of this are ranked by age. Equal tokens have equal scores
but for a rounding, which is not the same in every form, and must not rank them."""


def sparsek(z: Tensor, k: int) -> Tensor:
    """SPARSEK over the last axis of z (..., C), where -inf stands for none; the same shape.

    Up to k scores all have the gate 1.
    """
    return gates(z, z, k)[0]


def gates(values: Tensor, z: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The gates in SPARSEK(z, k) of some of its entries, `values` (..., M), and tau (..., 1).

    -inf stands for none, with gate 0. tau is -inf where z has up to k scores.
    """
    tau = _threshold(z.detach().double(), k).to(z.dtype)
    # Where tau is -inf all gates are 1, and none lies between.
    between = (z > tau) & (z < tau + 1)
    count = between.sum(-1, keepdim=True)
    above = (z >= tau + 1).sum(-1, keepdim=True)
    # tau again, as what it is a function of: the scores whose gates lie between 0 and 1.
    smooth = (z.masked_fill(~between, 0.0).sum(-1, keepdim=True) + above - k) / count.clamp_min(1)
    smooth = smooth.masked_fill(count == 0, 0.0)
    inside = (values > tau) & (values < tau + 1)
    whole = ((values >= tau + 1) & (values > -torch.inf)).to(z.dtype)
    return torch.where(inside, values.masked_fill(~inside, 0.0) - smooth, whole), tau


def _threshold(z: Tensor, k: int) -> Tensor:
    """tau (..., 1). The sum of gates is piecewise linear in tau, with corners at z and z - 1."""
    ordered = z.sort(-1, descending=True).values
    present = (z > -torch.inf).sum(-1, keepdim=True)
    rising = -ordered
    sums = F.pad(ordered.masked_fill(ordered == -torch.inf, 0.0).cumsum(-1), (1, 0))

    def above(tau: Tensor) -> tuple[Tensor, Tensor]:
        """How many scores lie above tau, and their sum."""
        number = torch.searchsorted(rising, (-tau).contiguous())
        return number, sums.gather(-1, number)

    low = ordered.masked_fill(ordered == -torch.inf, 0.0)
    corners = torch.cat((low, low - 1), -1)
    (n2, s2), (n1, s1) = above(corners), above(corners + 1)
    total = (s2 - n2 * corners) - (s1 - n1 * (corners + 1))
    below = corners.masked_fill(total < k, -torch.inf).amax(-1, keepdim=True)
    beyond = corners.masked_fill(total >= k, torch.inf).amin(-1, keepdim=True)
    below = below.masked_fill(below == -torch.inf, 0.0)
    # Between the two corners around tau, because at one a rounding decides who is above it.
    inside = (below + beyond) / 2
    (n2, s2), (n1, s1) = above(inside), above(inside + 1)
    tau = ((s2 - s1 + n1 - k) / (n2 - n1).clamp_min(1)).clamp(below, beyond)
    return tau.masked_fill(present <= k, -torch.inf)


class Held(NamedTuple):
    """What a prefix leaves to the rest, for N rows; -inf stands for none."""

    support: Tensor
    """Scores above tau, (N, A)."""
    scores: Tensor
    """Those of the best, best first and earlier first among ties, (N, M)."""
    name: Tensor
    """What the caller calls the best, (N, M); -1 for none."""


class Best(NamedTuple):
    """The best of every prefix."""

    name: Tensor
    """(N, T, M), -1 for none."""
    gate: Tensor
    """(N, T, M), 0 for none."""


def running_best(scores: Tensor, index: Tensor, held: Held, k: int) -> tuple[Best, Held]:
    """For t in 0..T-1 the best min(k, M) of what is held and scores[:, :t + 1], with their gates in
    SPARSEK of all scores so far.

    `scores` (N, T) are called `index` (N, T). Computed in pieces, in O(T * (pieces + support)).
    """
    tokens = scores.shape[1]
    piece = max(k, 32)
    rows, gate = [], []
    for start in range(0, tokens, piece):
        new, names = scores[:, start : start + piece], index[:, start : start + piece]
        size = new.shape[1]
        later = torch.ones(size, size, dtype=torch.bool, device=new.device).triu(1)
        so_far = new[:, None].masked_fill(later, -torch.inf)

        def behind(old: Tensor, own: Tensor, size: int = size) -> Tensor:
            """Row by row what is held, then what the row adds, (N, size, .)."""
            return torch.cat((old[:, None].expand(-1, size, -1), own), 2)

        candidates = behind(held.scores, so_far)
        ranks = (candidates.detach() / TIE).round()
        most = held.scores.shape[1]
        best = torch.sort(ranks, dim=2, descending=True, stable=True).indices[:, :, :most]
        chosen = candidates.gather(2, best)
        called = behind(held.name, names[:, None].expand(-1, size, -1)).gather(2, best)
        called = called.masked_fill(chosen == -torch.inf, -1)
        everything = behind(held.support, so_far)
        gated, tau = gates(chosen, everything, k)
        rows.append(called)
        gate.append(gated)
        kept = everything[:, -1].masked_fill(everything[:, -1] <= tau[:, -1], -torch.inf)
        kept = kept.sort(-1, descending=True).values
        alive = int((kept > -torch.inf).sum(-1).max())
        held = Held(kept[:, :alive], chosen[:, -1], called[:, -1])
    return Best(torch.cat(rows, 1), torch.cat(gate, 1)), held
