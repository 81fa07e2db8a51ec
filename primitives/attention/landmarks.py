"""Nystrom's landmarks: their pseudo-inverse, and their values over growing prefixes.

Xiong et al., arXiv 2102.03902, equations 11 and 13: softmax(Q K^T) V is nearly softmax(Q K~^T) u
with u = pinv(softmax(Q~ K~^T)) softmax(Q~ K^T) V, one value per landmark. All scores are over
sqrt(K), and all numbers here are at least float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

STEPS = 6
"""Of the iteration for the pseudo-inverse; the paper's number."""


def pseudo_inverse(a: Tensor) -> Tensor:
    """pinv of matrices (..., n, n) whose rows are softmaxes, by the paper's iteration.

    Z <- Z (13 I - A Z (15 I - A Z (7 I - A Z))) / 4, from A^T / (|A|_1 |A|_inf); |A|_inf is 1.
    """
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    z = a.mT / a.sum(-2).amax(-1)[..., None, None]
    for _ in range(STEPS):
        az = a @ z
        z = 0.25 * z @ (13 * eye - az @ (15 * eye - az @ (7 * eye - az)))
    return z


def scores_of(q: Tensor, k: Tensor) -> Tensor:
    """Q K^T / sqrt(K) in float32 at least."""
    scores: Tensor = (q * q.shape[-1] ** -0.5) @ k.mT
    return scores.to(torch.promote_types(scores.dtype, torch.float32))


@dataclass
class Landmarks:
    """Of n segments of a sequence: everything that the next segment adds to, all heads apart."""

    queries: Tensor
    """Q~ (B, H, n, K)."""
    keys: Tensor
    """K~ (B, H, n, K)."""
    rows: Tensor
    """softmax(Q~ K^T) V over the n segments, (B, H, n, K)."""
    logs: Tensor
    """The logarithms of these softmaxes' denominators, (B, H, n)."""
    values: Tensor
    """u (B, H, n, K)."""


def prefixes(queries: Tensor, keys: Tensor, k: Tensor, v: Tensor) -> tuple[Landmarks, Tensor]:
    """The landmarks of n segments, and u of the first N of them for every N = 1..n.

    queries and keys (B, H, n, K) are Q~ and K~, k and v (B, H, n s, K) the segments' tokens. The
    second result is (B, H, N, n, K); its rows from N on are zeros. Linear in the tokens: segments
    are summed one by one, and their sums joined for every N.
    """
    count = queries.shape[2]
    index = torch.arange(count, device=k.device)
    # [N, i]: segment i is among the first N + 1.
    inside = index <= index[:, None]
    scores = torch.unflatten(scores_of(queries, k.to(queries.dtype)), 3, (count, -1))
    logs = scores.logsumexp(-1)
    segments = torch.unflatten(v.to(queries.dtype), 2, (count, -1))
    parts = (scores.softmax(-1).transpose(2, 3) @ segments).transpose(2, 3)
    # (B, H, j, N, i)
    shares = logs[:, :, :, None].masked_fill(~inside, -torch.inf)
    rows = (shares.softmax(-1) @ parts).transpose(2, 3) * inside[:, :, None]
    square = scores_of(queries, keys)[:, :, None].masked_fill(~inside[:, None], -torch.inf)
    # Rows from N on are those of the identity, which changes nothing in the others' inverse.
    eye = torch.eye(count, dtype=square.dtype, device=k.device)
    square = torch.where(inside[:, :, None], square.softmax(-1), eye)
    values = pseudo_inverse(square) @ rows
    last = Landmarks(queries, keys, rows[:, :, -1], logs.logsumexp(-1), values[:, :, -1])
    return last, values


def advance(held: Landmarks, query: Tensor, k: Tensor, v: Tensor, size: int) -> Landmarks:
    """The landmarks after one more segment of `size` tokens.

    query (B, H, 1, K) is the mean of its queries, k and v (B, H, S, K) all tokens to its end.
    """
    dtype = query.dtype
    k, v = k.to(dtype), v.to(dtype)
    queries = torch.cat((held.queries, query), 2)
    keys = torch.cat((held.keys, k[:, :, -size:].mean(2, keepdim=True)), 2)
    scores = scores_of(query, k)
    rows, logs = scores.softmax(-1) @ v, scores.logsumexp(-1)
    if held.queries.shape[2]:
        scores = scores_of(held.queries, k[:, :, -size:])
        own = scores.logsumexp(-1)
        both = torch.logaddexp(held.logs, own)
        old = held.rows * (held.logs - both).exp().unsqueeze(-1)
        new = (scores.softmax(-1) @ v[:, :, -size:]) * (own - both).exp().unsqueeze(-1)
        rows, logs = torch.cat((old + new, rows), 2), torch.cat((both, logs), 2)
    values = pseudo_inverse(scores_of(queries, keys).softmax(-1)) @ rows
    return Landmarks(queries, keys, rows, logs, values)
