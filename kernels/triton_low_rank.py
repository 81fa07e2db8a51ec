"""Triton kernels of diagonal plus low rank (RWKV-7), and of the delta rule with vector decay (KDA).

Of S_t = Diag(exp g_t) S_{t-1} + b_t u_t^T [+ k_t v_t^T], u_t = x_t + S_{t-1}^T a_t, in the WY form
of `diagonal_low_rank._chunked`. A first kernel makes the products of a and b inside each chunk (by
halves, see `triton_vector_decay`), inverts the triangular matrix I - L with them, and hands over
U and W with u = U + W S, S the state before the chunk. A walk over the chunks makes the states and
u; outputs and gradients are then the matrix state's, with b for keys and u for values, and a last
kernel takes the gradient through the inverse.
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
    check_device,
    check_width,
    common_dtype,
    full_tile,
    on_device_of,
    rows,
)
from .triton_halves import pair_scores
from .triton_low_rank_solve import _solve, _solve_gradients, precision
from .triton_step import step, step_serves
from .triton_vector_decay import _outputs, chunk_size, decayed, gradients, launch_chunks

OP = "delta_rule"


def diagonal_low_rank(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    log_decay: Tensor,
    state: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """See `diagonal_low_rank.diagonal_low_rank`.

    Raises `Unsupported` for float64, for K or V above 256 and for tensors that are not on a GPU.
    """
    check_device(OP, q)
    check_width(OP, K=q.shape[-1], V=v.shape[-1])
    dtype = common_dtype(OP, q, k, v, a, b)
    if step_serves(q, k, v, a, b, log_decay, state):
        return step(q, k, v, None, log_decay, state, scale, low_rank=(a, b))
    o, final = _LowRank.apply(  # type: ignore[no-untyped-call]
        *(t.to(dtype).contiguous() for t in (q, a, b, k, v)),
        log_decay.contiguous(),
        None if state is None else state.float().contiguous(),
        scale,
    )
    return o.to(v.dtype), final


def delta_rule_per_channel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor,
    state: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """`delta_rule` with log_decay (B, T, H, K): the case b = k, a = -beta exp(g) k, x = beta v."""
    dtype = common_dtype(OP, q, k, v)
    strength = beta.float().unsqueeze(-1)
    a = -(strength * k.float() * log_decay.float().exp())
    o, final = _LowRank.apply(  # type: ignore[no-untyped-call]
        *(t.to(dtype).contiguous() for t in (q, a, k)),
        None,
        (strength * v.float()).to(dtype).contiguous(),
        log_decay.contiguous(),
        None if state is None else state.float().contiguous(),
        scale,
    )
    return o.to(v.dtype), final


class _LowRank(torch.autograd.Function):
    """With k, x is 0 and k v^T is written beside b u^T; without k, v is x."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        a: Tensor,
        b: Tensor,
        k: Tensor | None,
        v: Tensor,
        log_decay: Tensor,
        state: Tensor | None,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        batch, tokens, heads, key_width = q.shape
        value_width, size = v.shape[-1], chunk_size(q)
        chunks = -(-tokens // size)
        late, kept = decayed(b, log_decay, size, 1.0, to_end=True)
        late_k = None if k is None else decayed(k, log_decay, size, 1.0, to_end=True)[0]

        def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=q.device)

        inverse = empty(batch, heads, chunks, size, size)
        through = empty(*q.shape, dtype=q.dtype)
        alone, u = (empty(*v.shape, dtype=v.dtype) for _ in range(2))
        launch_chunks(
            "low_rank.solve", _solve, q, v, size,
            a, b, k, v, log_decay, inverse, through, alone,
            PRECISION=precision(q),
        )  # fmt: skip
        before = empty(batch, heads, chunks, key_width, value_width, dtype=q.dtype)
        last = empty(batch, heads, key_width, value_width)
        _walk(
            "low_rank.states", _low_rank_states, q, v, size,
            through, alone, late, late_k, v, kept, state, before, u, last,
        )  # fmt: skip
        o = _read(q, b, u, log_decay, before, size, scale, read=True)
        if k is not None:
            o = o + _read(q, k, v, log_decay, before, size, scale, read=False)
        ctx.save_for_backward(
            q, a, b, k, v, log_decay, inverse, through, u, late, late_k, kept, before
        )
        ctx.scale, ctx.size, ctx.started = scale, size, state is not None
        return o.to(v.dtype), last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor, dlast: Tensor) -> tuple[Tensor | None, ...]:
        q, a, b, k, v, log_decay, inverse, through, u, late, late_k, kept, before = (
            ctx.saved_tensors
        )
        scale, size = ctx.scale, ctx.size
        do, dlast = do.contiguous(), dlast.contiguous()
        early, _ = decayed(q, log_decay, size, scale, to_end=False)
        du = torch.empty(v.shape, dtype=v.dtype, device=v.device)
        launch_chunks("low_rank.direct", _direct, q, v, size, q, b, log_decay, do, du, scale)
        dafter = torch.empty(before.shape, dtype=before.dtype, device=q.device)
        dstate = torch.empty(dlast.shape, dtype=torch.float32, device=q.device)
        _walk(
            "low_rank.gradients", _low_rank_gradients, q, v, size,
            early, through, late, do, du, kept, dlast, dafter, dstate,
        )  # fmt: skip
        dq, db, du, dg, _ = gradients(
            q, b, u, log_decay, None, late, before, do, dafter, size, scale
        )
        dk, dv = None, torch.empty(v.shape, dtype=torch.float32, device=v.device)
        if k is not None:
            dq_k, dk, dv_k, dg_k, _ = gradients(
                q, k, v, log_decay, None, late_k, before, do, dafter, size, scale, read=False
            )
            dq, dg, dv = dq + dq_k, dg + dg_k, dv_k.float()
        da = torch.empty(a.shape, dtype=a.dtype, device=a.device)
        launch_chunks(
            "low_rank.solve_gradients", _solve_gradients, q, v, size,
            a, b, k, v, u, log_decay, inverse, before, du, da, db, dk, dv, dg,
            PRECISION=precision(q), rewritten=(db, dk, dv, dg),
        )  # fmt: skip
        return (
            dq.to(q.dtype),
            da,
            db.to(b.dtype),
            None if k is None or dk is None else dk.to(k.dtype),
            dv.to(v.dtype),
            dg.to(log_decay.dtype),
            dstate if ctx.started else None,
            None,
        )


def _read(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    before: Tensor,
    size: int,
    scale: float,
    *,
    read: bool,
) -> Tensor:
    """What the queries read of the writes k v^T and, with `read`, of the state: float32."""
    o = torch.empty(v.shape, dtype=torch.float32, device=v.device)
    launch_chunks(
        "vector_decay.outputs", _outputs, q, v, size,
        q, k, v, log_decay, None, before, o, scale, PRE=False, READ=read,
    )  # fmt: skip
    return o


def _walk(name: str, kernel: Any, q: Tensor, v: Tensor, size: int, *arguments: Any) -> None:
    """One program per head and tile of values: W S needs all of the state's rows at once."""
    batch, tokens, heads, key_width = q.shape
    value_width = v.shape[-1]

    def run(config: dict[str, int]) -> None:
        kernel[(batch * heads, triton.cdiv(value_width, config["TILE_V"]))](
            *arguments, tokens, -(-tokens // size), heads,
            K=key_width, V=value_width, C=size, FULL_K=full_tile(key_width), **config,
        )  # fmt: skip

    with on_device_of(q):
        tuned(
            name, kernel, q, run, limits=(full_tile(value_width),), sizes=(batch * heads, tokens),
            exact=(key_width, value_width, size, *kinds(*arguments)),
        )  # fmt: skip


@triton.jit(do_not_specialize=LENGTHS)
@no_type_check
def _low_rank_states(
    through_ptr, alone_ptr, late_ptr, late_k_ptr, v_ptr, kept_ptr, start_ptr,
    before_ptr, u_ptr, last_ptr, T, N, H,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, FULL_K: tl.constexpr, TILE_V: tl.constexpr,
):  # fmt: skip
    """u = U + W S;  S' = exp(G_C) S + sum_j exp(G_C - G_j) (b_j u_j^T [+ k_j v_j^T])."""
    bh = tl.program_id(0).to(tl.int64)
    b, h = bh // H, bh % H
    row = tl.arange(0, FULL_K)
    column = tl.program_id(1) * TILE_V + tl.arange(0, TILE_V)
    entry = row[:, None] * V + column[None, :]
    there = (row[:, None] < K) & (column[None, :] < V)
    S = tl.zeros((FULL_K, TILE_V), dtype=tl.float32)
    if start_ptr is not None:
        S = tl.load(start_ptr + bh * K * V + entry, mask=there, other=0.0)
    for n in range(N):
        t = n * C + tl.arange(0, C)
        token = (b * T + t) * H + h
        through = rows(through_ptr, token, t, T, row, K)
        S_ = S.to(through.dtype)
        tl.store(before_ptr + (bh * N + n) * K * V + entry, S_, mask=there)
        alone = rows(alone_ptr, token, t, T, column, V).to(tl.float32)
        u = (alone + tl.dot(through, S_, input_precision=DOT)).to(through.dtype)
        tl.store(
            u_ptr + token[:, None] * V + column[None, :],
            u,
            mask=(t[:, None] < T) & (column[None, :] < V),
        )
        kept = tl.load(kept_ptr + (bh * N + n) * K + row, mask=row < K, other=0.0)
        late = rows(late_ptr, token, t, T, row, K)
        S = S * kept[:, None] + tl.dot(tl.trans(late), u, input_precision=DOT)
        if late_k_ptr is not None:
            late = rows(late_k_ptr, token, t, T, row, K)
            v = rows(v_ptr, token, t, T, column, V)
            S += tl.dot(tl.trans(late), v, input_precision=DOT)
    tl.store(last_ptr + bh * K * V + entry, S, mask=there)


@triton.jit(do_not_specialize=LENGTHS)
@no_type_check
def _direct(
    q_ptr, b_ptr, g_ptr, do_ptr, du_ptr, scale, T, N, H,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr,
    TILE_K: tl.constexpr, TILE_V: tl.constexpr,
):  # fmt: skip
    """The part of du that the chunk's own outputs make: P^T do, P the products of q and b."""
    bh = tl.program_id(0).to(tl.int64)
    b, h = bh // H, bh % H
    t = tl.program_id(1) * C + tl.arange(0, C)
    token = (b * T + t) * H + h
    scores = pair_scores(
        q_ptr, b_ptr, g_ptr, None, token, t, T, H, h, K, C, LEVELS, TILE_K, False, True
    )
    scores = tl.trans((scores * scale).to(q_ptr.dtype.element_ty))
    for first in range(0, V, TILE_V):
        column = first + tl.arange(0, TILE_V)
        du = tl.dot(scores, rows(do_ptr, token, t, T, column, V), input_precision=DOT)
        tl.store(
            du_ptr + token[:, None] * V + column[None, :],
            du.to(du_ptr.dtype.element_ty),
            mask=(t[:, None] < T) & (column[None, :] < V),
        )


@triton.jit(do_not_specialize=LENGTHS)
@no_type_check
def _low_rank_gradients(
    early_ptr, through_ptr, late_ptr, do_ptr, du_ptr, kept_ptr, dlast_ptr,
    dafter_ptr, dstate_ptr, T, N, H,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, FULL_K: tl.constexpr, TILE_V: tl.constexpr,
):  # fmt: skip
    """The gradients dS of the states, from the last chunk to the first.

    du = P^T do + exp(G_C - G) b dS';  dS = exp(G_C) dS' + scale (exp(G) q)^T do + W^T du.
    """
    bh = tl.program_id(0).to(tl.int64)
    b, h = bh // H, bh % H
    row = tl.arange(0, FULL_K)
    column = tl.program_id(1) * TILE_V + tl.arange(0, TILE_V)
    entry = row[:, None] * V + column[None, :]
    there = (row[:, None] < K) & (column[None, :] < V)
    dS = tl.load(dlast_ptr + bh * K * V + entry, mask=there, other=0.0)
    for turn in range(N):
        n = N - 1 - turn
        t = n * C + tl.arange(0, C)
        token = (b * T + t) * H + h
        do = rows(do_ptr, token, t, T, column, V)
        dS_ = dS.to(do.dtype)
        tl.store(dafter_ptr + (bh * N + n) * K * V + entry, dS_, mask=there)
        du = rows(du_ptr, token, t, T, column, V).to(tl.float32)
        late = rows(late_ptr, token, t, T, row, K)
        du += tl.dot(late, dS_, input_precision=DOT)
        kept = tl.load(kept_ptr + (bh * N + n) * K + row, mask=row < K, other=0.0)
        early = rows(early_ptr, token, t, T, row, K)
        dS = dS * kept[:, None] + tl.dot(tl.trans(early), do, input_precision=DOT)
        through = rows(through_ptr, token, t, T, row, K)
        dS += tl.dot(tl.trans(through), du.to(do.dtype), input_precision=DOT)
    tl.store(dstate_ptr + bh * K * V + entry, dS, mask=there)
