"""The triangular systems of the (gated) delta rule's chunks, solved in a Triton kernel.

U = X (beta v) and W = X (beta exp(G) k), X = (I - L)^-1, L_ij = -beta_i exp(G_i - G_j) k_i . k_j
for j < i: the WY form of `delta_rule._chunked`. X grows by halves, as in `triton_low_rank_solve`.
"""

from __future__ import annotations

from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .autotune import kinds, tuned
from .triton_common import (
    DOT,
    LENGTHS,
    batch_stride,
    decay_between,
    full_tile,
    half_stride,
    on_device_of,
    rows,
    split_prefix,
)
from .triton_low_rank_solve import precision, unit_inverse


class DeltaSolve(torch.autograd.Function):
    """From k, v, beta (float32) and the prefix sums (B, H, N * C) in float64 to U and W.

    U is (B, H, N, C, V) and W (B, H, N, C, K), in the dtype of k and v; padded tokens are zero.
    """

    @staticmethod
    def forward(
        ctx: Any, k: Tensor, v: Tensor, beta: Tensor, total: Tensor | None, size: int
    ) -> tuple[Tensor, Tensor]:
        batch, tokens, heads, key_width = k.shape
        cut = (batch, heads, -(-tokens // size), size)
        prefix = None if total is None else split_prefix(total)
        inverse = torch.empty((*cut, size), dtype=torch.float32, device=k.device)
        values = torch.empty((*cut, v.shape[-1]), dtype=k.dtype, device=k.device)
        erase = torch.empty((*cut, key_width), dtype=k.dtype, device=k.device)
        _launch("delta_solve.solve", _solve, k, v, size, k, v, beta, prefix, inverse, values, erase)
        ctx.save_for_backward(k, v, beta, prefix, inverse, values, erase)
        ctx.size = size
        return values, erase

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dvalues: Tensor, derase: Tensor) -> tuple[Tensor | None, ...]:
        k, v, beta, prefix, inverse, values, erase = ctx.saved_tensors
        dk, dv, dbeta = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (k, v, beta))
        batch, heads, chunks = inverse.shape[:3]
        shape = (0 if prefix is None else batch, heads, chunks * ctx.size)
        dtotal = torch.empty(shape, dtype=torch.float32, device=k.device)
        _launch(
            "delta_solve.gradients", _solve_gradients, k, v, ctx.size,
            k, v, beta, prefix, inverse, values, erase,
            dvalues.contiguous(), derase.contiguous(), dk, dv, dbeta, dtotal,
        )  # fmt: skip
        return dk, dv, dbeta, None if prefix is None else dtotal.double(), None


def _launch(name: str, kernel: Any, k: Tensor, v: Tensor, size: int, *arguments: Any) -> None:
    """One program per head and chunk."""
    batch, tokens, heads, key_width = k.shape
    chunks, value_width, prefix = -(-tokens // size), v.shape[-1], arguments[3]

    def run(config: dict[str, int]) -> None:
        kernel[(batch * heads, chunks)](
            *arguments, tokens, chunks, heads, batch_stride(prefix), half_stride(prefix),
            K=key_width, V=value_width, C=size, LEVELS=size.bit_length() - 1,
            DECAY=prefix is not None, PRECISION=precision(k), **config,
        )  # fmt: skip

    with on_device_of(k):
        tuned(
            name, kernel, k, run,
            limits=(full_tile(key_width), full_tile(value_width)), sizes=(batch * heads, tokens),
            exact=(key_width, value_width, size, *kinds(*arguments)),
        )  # fmt: skip


@triton.jit
@no_type_check
def overlaps(k_ptr, token, t, T, K: tl.constexpr, C: tl.constexpr, TILE_K: tl.constexpr):
    """k_i . k_j, (C, C)."""
    found = tl.zeros((C, C), dtype=tl.float32)
    for first in range(0, K, TILE_K):
        k = rows(k_ptr, token, t, T, first + tl.arange(0, TILE_K), K)
        found += tl.dot(k, tl.trans(k), input_precision=DOT)
    return found


@triton.jit
@no_type_check
def decays(prefix_ptr, at, half, C: tl.constexpr, DECAY: tl.constexpr):
    """exp(G_i) and, for j < i, exp(G_i - G_j), else 0."""
    place = tl.arange(0, C)
    since = tl.zeros((C,), dtype=tl.float32) + 1.0
    between = tl.where(place[:, None] > place[None, :], 1.0, 0.0)
    if DECAY:
        high = tl.load(prefix_ptr + at)
        since = tl.exp(high)
        between *= decay_between(high, tl.load(prefix_ptr + half + at), C)
    return since, between


@triton.jit(do_not_specialize=LENGTHS)
@no_type_check
def _solve(
    k_ptr, v_ptr, beta_ptr, prefix_ptr, inverse_ptr, values_ptr, erase_ptr,
    T, N, H, prefix_stride, half,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr,
    TILE_K: tl.constexpr, TILE_V: tl.constexpr, DECAY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """X, U and W of one chunk."""
    bh = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1)
    b, h = bh // H, bh % H
    place = tl.arange(0, C)
    t = n * C + place
    token = (b * T + t) * H + h
    dtype = k_ptr.dtype.element_ty
    spot = (bh * N + n) * C + place
    beta = tl.load(beta_ptr + token, mask=t < T, other=0.0)
    since, between = decays(prefix_ptr, b * prefix_stride + h * N * C + t, half, C, DECAY)
    lower = -beta[:, None] * between * overlaps(k_ptr, token, t, T, K, C, TILE_K)
    X = unit_inverse(lower, C, LEVELS, PRECISION)
    tl.store(inverse_ptr + spot[:, None] * C + place[None, :], X)
    X = X.to(dtype)
    for first in range(0, K, TILE_K):
        row = first + tl.arange(0, TILE_K)
        k = (rows(k_ptr, token, t, T, row, K) * (beta * since)[:, None]).to(dtype)
        tl.store(
            erase_ptr + spot[:, None] * K + row[None, :],
            tl.dot(X, k, input_precision=DOT).to(dtype),
            mask=(row < K)[None, :],
        )
    for first in range(0, V, TILE_V):
        column = first + tl.arange(0, TILE_V)
        v = (rows(v_ptr, token, t, T, column, V) * beta[:, None]).to(dtype)
        tl.store(
            values_ptr + spot[:, None] * V + column[None, :],
            tl.dot(X, v, input_precision=DOT).to(dtype),
            mask=(column < V)[None, :],
        )


@triton.jit(do_not_specialize=LENGTHS)
@no_type_check
def _solve_gradients(
    k_ptr, v_ptr, beta_ptr, prefix_ptr, inverse_ptr, values_ptr, erase_ptr,
    dvalues_ptr, derase_ptr, dk_ptr, dv_ptr, dbeta_ptr, dprefix_ptr,
    T, N, H, prefix_stride, half,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr,
    TILE_K: tl.constexpr, TILE_V: tl.constexpr, DECAY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """With Z = X^T dU and Y = X^T dW, the gradients of the right-hand sides, dL = Z U^T + Y W^T."""
    bh = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1)
    b, h = bh // H, bh % H
    place = tl.arange(0, C)
    t = n * C + place
    token = (b * T + t) * H + h
    dtype = k_ptr.dtype.element_ty
    spot = (bh * N + n) * C + place
    beta = tl.load(beta_ptr + token, mask=t < T, other=0.0)
    since, between = decays(prefix_ptr, b * prefix_stride + h * N * C + t, half, C, DECAY)
    X = tl.trans(tl.load(inverse_ptr + spot[:, None] * C + place[None, :]).to(dtype))
    dlower = tl.zeros((C, C), dtype=tl.float32)
    dbeta = tl.zeros((C,), dtype=tl.float32)
    for first in range(0, V, TILE_V):
        column = first + tl.arange(0, TILE_V)
        inside = (column < V)[None, :]
        entry = spot[:, None] * V + column[None, :]
        dU = tl.load(dvalues_ptr + entry, mask=inside, other=0.0)
        U = tl.load(values_ptr + entry, mask=inside, other=0.0)
        Z = tl.dot(X, dU, input_precision=DOT)
        dlower += tl.dot(Z.to(dtype), tl.trans(U), input_precision=DOT)
        dbeta += tl.sum(Z * rows(v_ptr, token, t, T, column, V).to(tl.float32), axis=1)
        tl.store(
            dv_ptr + token[:, None] * V + column[None, :],
            (Z * beta[:, None]).to(dtype),
            mask=(t[:, None] < T) & (column[None, :] < V),
        )
    dweight = tl.zeros((C,), dtype=tl.float32)
    for first in range(0, K, TILE_K):
        row = first + tl.arange(0, TILE_K)
        inside = (row < K)[None, :]
        entry = spot[:, None] * K + row[None, :]
        dW = tl.load(derase_ptr + entry, mask=inside, other=0.0)
        W = tl.load(erase_ptr + entry, mask=inside, other=0.0)
        Y = tl.dot(X, dW, input_precision=DOT)
        dlower += tl.dot(Y.to(dtype), tl.trans(W), input_precision=DOT)
        dweight += tl.sum(Y * rows(k_ptr, token, t, T, row, K).to(tl.float32), axis=1)
    dweight *= since
    dlower = -dlower * between
    product = dlower * overlaps(k_ptr, token, t, T, K, C, TILE_K)
    dbeta += dweight + tl.sum(product, axis=1)
    tl.store(dbeta_ptr + token, dbeta, mask=t < T)
    if DECAY:
        product *= beta[:, None]
        dprefix = beta * dweight + tl.sum(product, axis=1) - tl.sum(product, axis=0)
        tl.store(dprefix_ptr + bh * N * C + t, dprefix)
    dlower *= beta[:, None]
    both = (dlower + tl.trans(dlower)).to(dtype)
    for first in range(0, K, TILE_K):
        row = first + tl.arange(0, TILE_K)
        entry = spot[:, None] * K + row[None, :]
        dW = tl.load(derase_ptr + entry, mask=(row < K)[None, :], other=0.0)
        dk = tl.dot(X, dW, input_precision=DOT) * (beta * since)[:, None]
        dk += tl.dot(both, rows(k_ptr, token, t, T, row, K), input_precision=DOT)
        tl.store(
            dk_ptr + token[:, None] * K + row[None, :],
            dk.to(dtype),
            mask=(t[:, None] < T) & (row[None, :] < K),
        )
