"""The triangular systems of diagonal plus low rank's chunks, and the gradient through them.

L is what a chunk's tokens read of each other's writes. The inverse of I - L grows by halves: where
the blocks of h tokens are inverted, those of 2 h are X + X L' X, L' what joins the two halves. That
is the exact inverse of a block, where the shorter product of I + L^(2^m) would cancel powers of L
that grow with keys that resemble each other.
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_common import DOT, LENGTHS, rows
from .triton_halves import level_pairs, pair_scores, sums_since, sums_until


def precision(x: Tensor) -> str:
    """How float32 tiles made of x are multiplied: TF32 has more digits than half precision has."""
    return str(DOT.value) if x.dtype == torch.float32 else "tf32"


@triton.jit
@no_type_check
def unit_inverse(lower, C: tl.constexpr, LEVELS: tl.constexpr, PRECISION: tl.constexpr):
    """(I - L)^-1, L strictly lower triangular, (C, C), C = 2^LEVELS."""
    place = tl.arange(0, C)
    X = tl.where(place[:, None] == place[None, :], 1.0, 0.0)
    for level in tl.static_range(LEVELS):
        part = tl.where(level_pairs(1 << level, C), lower, 0.0)
        if level == 0:
            X += part
        else:
            part = tl.dot(part, X, input_precision=PRECISION)
            X += tl.dot(X, part, input_precision=PRECISION)
    return X


@triton.jit(do_not_specialize=LENGTHS)
@no_type_check
def _solve(
    a_ptr, b_ptr, k_ptr, v_ptr, g_ptr, inverse_ptr, through_ptr, alone_ptr, T, N, H,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr,
    TILE_K: tl.constexpr, TILE_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """X = (I - L)^-1, W = X (exp(G_{i-1}) a_i), U = X v or, with k, X (L' v), of one chunk.

    L_ij = a_i . exp(G_{i-1} - G_j) b_j and L'_ij, the same with k, for j < i.
    """
    bh = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1)
    b, h = bh // H, bh % H
    place = tl.arange(0, C)
    t = n * C + place
    token = (b * T + t) * H + h
    dtype = a_ptr.dtype.element_ty
    lower = pair_scores(
        a_ptr, b_ptr, g_ptr, None, token, t, T, H, h, K, C, LEVELS, TILE_K, True, False
    )
    X = unit_inverse(lower, C, LEVELS, PRECISION)
    tl.store(inverse_ptr + ((bh * N + n) * C + place)[:, None] * C + place[None, :], X)
    X = X.to(dtype)
    for first in range(0, K, TILE_K):
        row = first + tl.arange(0, TILE_K)
        earlier = rows(g_ptr, token - H, t - 1, T, row, K).to(tl.float32)
        a = rows(a_ptr, token, t, T, row, K)
        a = (a * tl.exp(sums_since(earlier, C, C, TILE_K))).to(dtype)
        tl.store(
            through_ptr + token[:, None] * K + row[None, :],
            tl.dot(X, a, input_precision=DOT).to(dtype),
            mask=(t[:, None] < T) & (row[None, :] < K),
        )
    if k_ptr is not None:
        from_k = pair_scores(
            a_ptr, k_ptr, g_ptr, None, token, t, T, H, h, K, C, LEVELS, TILE_K, True, False
        ).to(dtype)
    for first in range(0, V, TILE_V):
        column = first + tl.arange(0, TILE_V)
        side = rows(v_ptr, token, t, T, column, V)
        if k_ptr is not None:
            side = tl.dot(from_k, side, input_precision=DOT).to(dtype)
        tl.store(
            alone_ptr + token[:, None] * V + column[None, :],
            tl.dot(X, side, input_precision=DOT).to(dtype),
            mask=(t[:, None] < T) & (column[None, :] < V),
        )


@triton.jit(do_not_specialize=LENGTHS)
@no_type_check
def _solve_gradients(
    a_ptr, b_ptr, k_ptr, v_ptr, u_ptr, g_ptr, inverse_ptr, before_ptr, du_ptr,
    da_ptr, db_ptr, dk_ptr, dx_ptr, dg_ptr, T, N, H,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr,
    TILE_K: tl.constexpr, TILE_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient through u = x + L u + L' v + (exp(G_{i-1}) a) S, added to db, dk, dx, dg.

    `dx` is the gradient of x or, with k, of v. With y = X^T du: dx = y, dL = y u^T, dL' = y v^T,
    and exp(G_{i-1}) a has the gradient y S^T.
    """
    bh = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1)
    b, h = bh // H, bh % H
    place = tl.arange(0, C)
    t = n * C + place
    token = (b * T + t) * H + h
    dtype = a_ptr.dtype.element_ty
    X = tl.load(inverse_ptr + ((bh * N + n) * C + place)[:, None] * C + place[None, :])
    X = tl.trans(X.to(dtype))
    if k_ptr is not None:
        from_k = pair_scores(
            a_ptr, k_ptr, g_ptr, None, token, t, T, H, h, K, C, LEVELS, TILE_K, True, False
        )
        from_k = tl.trans(from_k.to(dtype))
        dfrom_k = tl.zeros((C, C), dtype=tl.float32)
    dlower = tl.zeros((C, C), dtype=tl.float32)
    for first in range(0, V, TILE_V):
        column = first + tl.arange(0, TILE_V)
        spot = token[:, None] * V + column[None, :]
        inside = (t[:, None] < T) & (column[None, :] < V)
        y = tl.dot(X, rows(du_ptr, token, t, T, column, V), input_precision=DOT)
        dx = y
        y = y.to(dtype)
        u = rows(u_ptr, token, t, T, column, V)
        dlower += tl.dot(y, tl.trans(u), input_precision=DOT)
        if k_ptr is not None:
            v = rows(v_ptr, token, t, T, column, V)
            dfrom_k += tl.dot(y, tl.trans(v), input_precision=DOT)
            dx = tl.load(dx_ptr + spot, mask=inside, other=0.0)
            dx += tl.dot(from_k, y, input_precision=DOT)
        tl.store(dx_ptr + spot, dx, mask=inside)
    for first in range(0, K, TILE_K):
        row = first + tl.arange(0, TILE_K)
        spot = token[:, None] * K + row[None, :]
        inside = (t[:, None] < T) & (row[None, :] < K)
        da = tl.zeros((C, TILE_K), dtype=tl.float32)
        for first_v in range(0, V, TILE_V):
            column = first_v + tl.arange(0, TILE_V)
            y = tl.dot(X, rows(du_ptr, token, t, T, column, V), input_precision=DOT).to(dtype)
            S = tl.load(
                before_ptr + (bh * N + n) * K * V + row[:, None] * V + column[None, :],
                mask=(row[:, None] < K) & (column[None, :] < V),
                other=0.0,
            )
            da += tl.dot(y, tl.trans(S), input_precision=DOT)
        earlier = rows(g_ptr, token - H, t - 1, T, row, K).to(tl.float32)
        later = rows(g_ptr, token + H, t + 1, T, row, K).to(tl.float32)
        a = rows(a_ptr, token, t, T, row, K)
        write = rows(b_ptr, token, t, T, row, K)
        da *= tl.exp(sums_since(earlier, C, C, TILE_K))
        db = tl.zeros((C, TILE_K), dtype=tl.float32)
        if k_ptr is not None:
            k = rows(k_ptr, token, t, T, row, K)
            dk = tl.zeros((C, TILE_K), dtype=tl.float32)
        for level in tl.static_range(LEVELS):
            pairs = level_pairs(1 << level, C)
            since = tl.exp(sums_since(earlier, 1 << level, C, TILE_K))
            until = tl.exp(sums_until(later, 1 << level, C, TILE_K))
            seen = (a * since).to(dtype)
            part = tl.where(pairs, dlower, 0.0).to(dtype)
            da += since * tl.dot(part, (write * until).to(dtype), input_precision=DOT)
            db += until * tl.dot(tl.trans(part), seen, input_precision=DOT)
            if k_ptr is not None:
                part = tl.where(pairs, dfrom_k, 0.0).to(dtype)
                da += since * tl.dot(part, (k * until).to(dtype), input_precision=DOT)
                dk += until * tl.dot(tl.trans(part), seen, input_precision=DOT)
        dbefore = a.to(tl.float32) * da
        dtotal = dbefore - write.to(tl.float32) * db
        if k_ptr is not None:
            dtotal -= k.to(tl.float32) * dk
            dk += tl.load(dk_ptr + spot, mask=inside, other=0.0)
            tl.store(dk_ptr + spot, dk, mask=inside)
        # a sees G_{i-1}, which the decay of its own token is not in.
        dg = tl.cumsum(dtotal, axis=0, reverse=True) - dbefore
        dg += tl.load(dg_ptr + spot, mask=inside, other=0.0)
        db += tl.load(db_ptr + spot, mask=inside, other=0.0)
        tl.store(dg_ptr + spot, dg, mask=inside)
        tl.store(db_ptr + spot, db, mask=inside)
        tl.store(da_ptr + spot, da.to(dtype), mask=inside)
