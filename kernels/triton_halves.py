"""Products with a decay per channel, by halves of a chunk: what two families of kernels share.

See `triton_vector_decay` for the method.
"""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl

from .triton_common import DOT, rows


@triton.jit
@no_type_check
def sums_since(earlier, B: tl.constexpr, C: tl.constexpr, TILE: tl.constexpr):
    """Sums of g from the start of each block of B tokens to the token, itself left out.

    `earlier` (C, TILE) holds, in each row, g of the token before.
    """
    first = (tl.arange(0, C) % B == 0)[:, None]
    blocks = tl.reshape(tl.where(first, 0.0, earlier), (C // B, B, TILE))
    return tl.reshape(tl.cumsum(blocks, axis=1), (C, TILE))


@triton.jit
@no_type_check
def sums_until(later, B: tl.constexpr, C: tl.constexpr, TILE: tl.constexpr):
    """Sums of g from the token, itself left out, to the end of its block of B tokens."""
    last = (tl.arange(0, C) % B == B - 1)[:, None]
    blocks = tl.reshape(tl.where(last, 0.0, later), (C // B, B, TILE))
    return tl.reshape(tl.cumsum(blocks, axis=1, reverse=True), (C, TILE))


@triton.jit
@no_type_check
def level_pairs(HALF: tl.constexpr, C: tl.constexpr):
    """The pairs (i, j) of i in the second half and j in the first of one block of 2 HALF tokens."""
    place = tl.arange(0, C)
    same = place[:, None] // (2 * HALF) == place[None, :] // (2 * HALF)
    return same & (place[:, None] // HALF > place[None, :] // HALF)


@triton.jit
@no_type_check
def pair_scores(
    x_ptr, y_ptr, g_ptr, bonus_ptr, token, t, T, H, h,
    K: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr, TILE_K: tl.constexpr,
    PRE: tl.constexpr, DIAGONAL: tl.constexpr,
):  # fmt: skip
    """sum_k x_ik exp(G_ik - G_jk) y_jk for j < i, and on the diagonal x_i . y_i.

    With PRE x sees G_{i-1}, and the diagonal, if a bonus is given, is weighed by it.
    """
    place = tl.arange(0, C)
    scores = tl.zeros((C, C), dtype=tl.float32)
    itself = tl.zeros((C,), dtype=tl.float32)
    for first in range(0, K, TILE_K):
        row = first + tl.arange(0, TILE_K)
        x = rows(x_ptr, token, t, T, row, K)
        y = rows(y_ptr, token, t, T, row, K)
        g = rows(g_ptr, token, t, T, row, K).to(tl.float32)
        earlier = rows(g_ptr, token - H, t - 1, T, row, K).to(tl.float32)
        later = rows(g_ptr, token + H, t + 1, T, row, K).to(tl.float32)
        if DIAGONAL:
            product = x.to(tl.float32) * y.to(tl.float32)
            if bonus_ptr is not None:
                u = tl.load(bonus_ptr + h * K + row, mask=row < K, other=0.0)
                product *= u.to(tl.float32)[None, :]
            itself += tl.sum(product, axis=1)
        for level in tl.static_range(LEVELS):
            since = sums_since(earlier, 1 << level, C, TILE_K)
            if not PRE:
                since += g
            until = sums_until(later, 1 << level, C, TILE_K)
            left = (x * tl.exp(since)).to(x.dtype)
            right = (y * tl.exp(until)).to(x.dtype)
            product = tl.dot(left, tl.trans(right), input_precision=DOT)
            scores += tl.where(level_pairs(1 << level, C), product, 0.0)
    return scores + tl.where(place[:, None] == place[None, :], itself[:, None], 0.0)
