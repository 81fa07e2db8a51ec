"""Triton kernels of the matrix state, without decay, with a fixed or with a scalar one.

The decay of a key channel has its own, in `triton_vector_decay`.

Chunks of C tokens (arXiv 2405.21060, section 6; 2312.06635, section 4.2). One kernel walks over the
chunks of a head and stores the state before each; then every chunk is independent. The gradient
does the same from the end: a walk for the gradients of the states, then every chunk on its own.
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
    check_device,
    check_width,
    chunk_prefix,
    common_dtype,
    decay_between,
    decay_gradient,
    full_tile,
    half_stride,
    on_device_of,
    rows,
    tile,
)
from .triton_step import step, step_serves
from .triton_vector_decay import vector_state

OP = "matrix_state"
CHUNK = 64
"""Tokens of a chunk; a short sequence takes the power of two that holds it."""


def matrix_state(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    state: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """See `matrix_state.matrix_state`; log_decay is None, (H,), (B, T, H) or (B, T, H, K).

    Raises `Unsupported` for float64, for K or V above 256 and for tensors that are not on a GPU.
    """
    check_device(OP, q)
    check_width(OP, K=q.shape[-1], V=v.shape[-1])
    dtype = common_dtype(OP, q, k, v)
    if step_serves(q, k, v, log_decay, state):
        return step(q, k, v, None, log_decay, state, scale)
    start = None if state is None else state.float().contiguous()
    q, k, v_ = (t.to(dtype).contiguous() for t in (q, k, v))
    if log_decay is not None and log_decay.ndim == 4:
        o, final = vector_state(q, k, v_, log_decay, None, start, scale)
        return o.to(v.dtype), final
    o, final = _MatrixState.apply(  # type: ignore[no-untyped-call]
        q, k, v_, log_decay, start, scale
    )
    return o.to(v.dtype), final


def matrix_state_preread(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bonus: Tensor,
    log_decay: Tensor | None,
    state: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """See `preread.matrix_state_preread`. Raises as `matrix_state`.

    Where a head's channels share their decay, `preread` has a cheaper form for many tokens.
    """
    check_device(OP, q)
    check_width(OP, K=q.shape[-1], V=v.shape[-1])
    dtype = common_dtype(OP, q, k, v)
    if step_serves(q, k, v, bonus, log_decay, state):
        return step(q, k, v, None, log_decay, state, scale, bonus=bonus)
    if log_decay is None:
        log_decay = torch.zeros((), device=q.device).expand(q.shape)
    elif log_decay.ndim < 4:
        log_decay = log_decay[..., None].expand(q.shape)
    start = None if state is None else state.float().contiguous()
    q, k, v_ = (t.to(dtype).contiguous() for t in (q, k, v))
    o, final = vector_state(q, k, v_, log_decay, bonus.contiguous(), start, scale)
    return o.to(v.dtype), final


class _MatrixState(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor | None,
        state: Tensor | None,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        tokens = q.shape[1]
        size = min(CHUNK, tile(tokens))
        prefix = None if log_decay is None else chunk_prefix(log_decay, tokens, size)
        before, final = _walk(k, v, prefix, state, size, 1.0, reverse=False)
        o = torch.empty(v.shape, dtype=v.dtype, device=v.device)
        launch_chunks(
            "matrix_state.outputs", _outputs, q, v, size, q, k, v, prefix, before, o, scale
        )
        ctx.save_for_backward(q, k, v, log_decay, prefix, before)
        ctx.scale, ctx.size, ctx.started = scale, size, state is not None
        return o, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, log_decay, prefix, before = ctx.saved_tensors
        do, dfinal = do.contiguous(), dfinal.contiguous()
        dafter, dstate = _walk(q, do, prefix, dfinal, ctx.size, ctx.scale, reverse=True)
        dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
        batch, tokens, heads, _ = q.shape
        padded = -(-tokens // ctx.size) * ctx.size
        dprefix = torch.empty(
            (0 if prefix is None else batch, heads, padded), dtype=torch.float32, device=q.device
        )
        launch_chunks(
            "matrix_state.gradients", _gradients, q, v, ctx.size,
            q, k, v, prefix, before, do, dafter, dq, dk, dv, dprefix, ctx.scale,
        )  # fmt: skip
        dg = None if log_decay is None else decay_gradient(dprefix, log_decay, tokens, ctx.size)
        return dq, dk, dv, dg, dstate if ctx.started else None, None


def _walk(
    x: Tensor,
    y: Tensor,
    prefix: Tensor | None,
    start: Tensor | None,
    size: int,
    scale: float,
    *,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """The states (B, H, N, K, V) before each chunk, in x's dtype, and the last, in float32.

    With `reverse` the gradients of the states after each chunk, and that of the first state.
    """
    batch, tokens, heads, key_width = x.shape
    value_width = y.shape[-1]
    chunks = -(-tokens // size)
    shape = (batch, heads, key_width, value_width)
    last = torch.empty(shape, dtype=torch.float32, device=x.device)
    states = torch.empty(
        (batch, heads, chunks, key_width, value_width), dtype=x.dtype, device=x.device
    )
    flags = {"DECAY": prefix is not None, "START": start is not None, "REVERSE": reverse}

    def run(config: dict[str, int]) -> None:
        grid = (
            batch * heads,
            triton.cdiv(key_width, config["TILE_K"]),
            triton.cdiv(value_width, config["TILE_V"]),
        )
        _states[grid](
            x, y, prefix, start, states, last,
            tokens, chunks, heads, batch_stride(prefix), half_stride(prefix), scale,
            K=key_width, V=value_width, C=size, **flags, **config,
        )  # fmt: skip

    with on_device_of(x):
        tuned(
            "matrix_state.states", _states, x, run,
            limits=(full_tile(key_width), full_tile(value_width)), sizes=(batch * heads, tokens),
            exact=(key_width, value_width, size, *flags.values(), *kinds(y)),
        )  # fmt: skip
    return states, last


def launch_chunks(name: str, kernel: Any, q: Tensor, v: Tensor, size: int, *arguments: Any) -> None:
    """One program per head and chunk."""
    batch, tokens, heads, key_width = q.shape
    chunks, value_width = -(-tokens // size), v.shape[-1]
    prefix = arguments[3]

    def run(config: dict[str, int]) -> None:
        kernel[(batch * heads, chunks)](
            *arguments, tokens, chunks, heads, batch_stride(prefix), half_stride(prefix),
            K=key_width, V=value_width, C=size, DECAY=prefix is not None, **config,
        )  # fmt: skip

    with on_device_of(q):
        tuned(
            name, kernel, q, run,
            limits=(full_tile(key_width), full_tile(value_width)), sizes=(batch * heads, tokens),
            exact=(key_width, value_width, size, *kinds(*arguments)),
        )  # fmt: skip


@triton.jit(do_not_specialize=LENGTHS)
@no_type_check
def _states(
    x_ptr, y_ptr, prefix_ptr, start_ptr, states_ptr, last_ptr,
    T, N, H, prefix_stride, half, scale,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    TILE_K: tl.constexpr, TILE_V: tl.constexpr,
    DECAY: tl.constexpr, START: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """S' = exp(G_C) S + sum_j w_j x_j y_j^T, w_j = exp(G_C - G_j), reversed scale exp(G_j)."""
    bh = tl.program_id(0).to(tl.int64)
    b, h = bh // H, bh % H
    row = tl.program_id(1) * TILE_K + tl.arange(0, TILE_K)
    column = tl.program_id(2) * TILE_V + tl.arange(0, TILE_V)
    place = tl.arange(0, C)
    entry = row[:, None] * V + column[None, :]
    there = (row[:, None] < K) & (column[None, :] < V)
    S = tl.zeros((TILE_K, TILE_V), dtype=tl.float32)
    if START:
        S = tl.load(start_ptr + bh * K * V + entry, mask=there, other=0.0)
    if DECAY:
        sums = prefix_ptr + b * prefix_stride + h * N * C
    for turn in range(N):
        n = N - 1 - turn if REVERSE else turn
        stored = states_ptr + (bh * N + n) * K * V + entry
        tl.store(stored, S.to(states_ptr.dtype.element_ty), mask=there)
        t = n * C + place
        token = (b * T + t) * H + h
        x = rows(x_ptr, token, t, T, row, K)
        y = rows(y_ptr, token, t, T, column, V)
        if DECAY:
            high = tl.load(sums + t)
            end = tl.load(sums + n * C + C - 1)
            if REVERSE:
                weight = tl.exp(high)
            else:
                low = tl.load(sums + half + t)
                end_low = tl.load(sums + half + n * C + C - 1)
                weight = tl.exp((end - high) + (end_low - low))
            y = (y * weight[:, None]).to(x.dtype)
            S = S * tl.exp(end)
        S += tl.dot(tl.trans(x), y, input_precision=DOT) * scale
    tl.store(last_ptr + bh * K * V + entry, S, mask=there)


@triton.jit(do_not_specialize=LENGTHS)
@no_type_check
def _outputs(
    q_ptr, k_ptr, v_ptr, prefix_ptr, before_ptr, o_ptr, scale,
    T, N, H, prefix_stride, half,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    TILE_K: tl.constexpr, TILE_V: tl.constexpr, DECAY: tl.constexpr,
):  # fmt: skip
    """o_i = scale (exp(G_i) S^T q_i + sum_{j<=i} exp(G_i - G_j) (q_i . k_j) v_j) of one chunk."""
    bh = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1)
    b, h = bh // H, bh % H
    place = tl.arange(0, C)
    t = n * C + place
    token = (b * T + t) * H + h
    scores = tl.zeros((C, C), dtype=tl.float32)
    for first in range(0, K, TILE_K):
        row = first + tl.arange(0, TILE_K)
        q = rows(q_ptr, token, t, T, row, K)
        k = rows(k_ptr, token, t, T, row, K)
        scores += tl.dot(q, tl.trans(k), input_precision=DOT)
    if DECAY:
        sums = prefix_ptr + b * prefix_stride + h * N * C + t
        high = tl.load(sums)
        scores *= decay_between(high, tl.load(sums + half), C)
        since_start = tl.exp(high) * scale
    else:
        scores = tl.where(place[:, None] >= place[None, :], scores, 0.0)
        since_start = tl.zeros((C,), dtype=tl.float32) + scale
    scores = (scores * scale).to(v_ptr.dtype.element_ty)
    for first_v in range(0, V, TILE_V):
        column = first_v + tl.arange(0, TILE_V)
        spot = token[:, None] * V + column[None, :]
        inside = (t[:, None] < T) & (column[None, :] < V)
        read = tl.zeros((C, TILE_V), dtype=tl.float32)
        for first in range(0, K, TILE_K):
            row = first + tl.arange(0, TILE_K)
            q = rows(q_ptr, token, t, T, row, K)
            S = tl.load(
                before_ptr + (bh * N + n) * K * V + row[:, None] * V + column[None, :],
                mask=(row[:, None] < K) & (column[None, :] < V),
                other=0.0,
            )
            read += tl.dot(q, S, input_precision=DOT)
        v = rows(v_ptr, token, t, T, column, V)
        o = tl.dot(scores, v, input_precision=DOT) + read * since_start[:, None]
        tl.store(o_ptr + spot, o.to(o_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=LENGTHS)
@no_type_check
def _gradients(
    q_ptr, k_ptr, v_ptr, prefix_ptr, before_ptr, do_ptr, dafter_ptr,
    dq_ptr, dk_ptr, dv_ptr, dprefix_ptr, scale,
    T, N, H, prefix_stride, half,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    TILE_K: tl.constexpr, TILE_V: tl.constexpr, DECAY: tl.constexpr,
):  # fmt: skip
    """The gradients of one chunk from those of its outputs and of the state after it.

    G_i stands in exp(G_i) q_i and in exp(-G_i) k_i, so its gradient is q_i . dq_i - k_i . dk_i; the
    last one also decays the state after the chunk.
    """
    bh = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1)
    b, h = bh // H, bh % H
    place = tl.arange(0, C)
    t = n * C + place
    token = (b * T + t) * H + h
    dtype = q_ptr.dtype.element_ty
    state = (bh * N + n) * K * V
    scores = tl.zeros((C, C), dtype=tl.float32)
    for first in range(0, K, TILE_K):
        row = first + tl.arange(0, TILE_K)
        q = rows(q_ptr, token, t, T, row, K)
        k = rows(k_ptr, token, t, T, row, K)
        scores += tl.dot(q, tl.trans(k), input_precision=DOT)
    dscores = tl.zeros((C, C), dtype=tl.float32)
    for first_v in range(0, V, TILE_V):
        column = first_v + tl.arange(0, TILE_V)
        do = rows(do_ptr, token, t, T, column, V)
        v = rows(v_ptr, token, t, T, column, V)
        dscores += tl.dot(do, tl.trans(v), input_precision=DOT)
    if DECAY:
        sums = prefix_ptr + b * prefix_stride + h * N * C
        high = tl.load(sums + t)
        low = tl.load(sums + half + t)
        end = tl.load(sums + n * C + C - 1)
        end_low = tl.load(sums + half + n * C + C - 1)
        between = decay_between(high, low, C) * scale
        scores *= between
        dscores *= between
        since_start = tl.exp(high) * scale
        to_end = tl.exp((end - high) + (end_low - low))
        kept = tl.exp(end)
    else:
        causal = place[:, None] >= place[None, :]
        scores = tl.where(causal, scores * scale, 0.0)
        dscores = tl.where(causal, dscores * scale, 0.0)
        since_start = tl.zeros((C,), dtype=tl.float32) + scale
        to_end = tl.zeros((C,), dtype=tl.float32) + 1.0
    scores = scores.to(dtype)
    dscores = dscores.to(dtype)
    dprefix = tl.zeros((C,), dtype=tl.float32)
    dend = 0.0
    for first in range(0, K, TILE_K):
        row = first + tl.arange(0, TILE_K)
        spot = token[:, None] * K + row[None, :]
        inside = (t[:, None] < T) & (row[None, :] < K)
        dq = tl.zeros((C, TILE_K), dtype=tl.float32)
        dk = tl.zeros((C, TILE_K), dtype=tl.float32)
        for first_v in range(0, V, TILE_V):
            column = first_v + tl.arange(0, TILE_V)
            entry = state + row[:, None] * V + column[None, :]
            there = (row[:, None] < K) & (column[None, :] < V)
            S = tl.load(before_ptr + entry, mask=there, other=0.0)
            dS = tl.load(dafter_ptr + entry, mask=there, other=0.0)
            do = rows(do_ptr, token, t, T, column, V)
            v = rows(v_ptr, token, t, T, column, V)
            dq += tl.dot(do, tl.trans(S), input_precision=DOT)
            dk += tl.dot(v, tl.trans(dS), input_precision=DOT)
            if DECAY:
                dend += kept * tl.sum(S.to(tl.float32) * dS.to(tl.float32))
        q = rows(q_ptr, token, t, T, row, K)
        k = rows(k_ptr, token, t, T, row, K)
        dk *= to_end[:, None]
        if DECAY:
            dend += tl.sum(k.to(tl.float32) * dk)
        dq = dq * since_start[:, None] + tl.dot(dscores, k, input_precision=DOT)
        dk += tl.dot(tl.trans(dscores), q, input_precision=DOT)
        if DECAY:
            dprefix += tl.sum(q.to(tl.float32) * dq - k.to(tl.float32) * dk, axis=1)
        tl.store(dq_ptr + spot, dq.to(dtype), mask=inside)
        tl.store(dk_ptr + spot, dk.to(dtype), mask=inside)
    if DECAY:
        dprefix += tl.where(place == C - 1, dend, 0.0)
        tl.store(dprefix_ptr + bh * N * C + t, dprefix)
    for first_v in range(0, V, TILE_V):
        column = first_v + tl.arange(0, TILE_V)
        spot_v = token[:, None] * V + column[None, :]
        inside_v = (t[:, None] < T) & (column[None, :] < V)
        dv = tl.zeros((C, TILE_V), dtype=tl.float32)
        for first in range(0, K, TILE_K):
            row = first + tl.arange(0, TILE_K)
            k = rows(k_ptr, token, t, T, row, K)
            dS = tl.load(
                dafter_ptr + state + row[:, None] * V + column[None, :],
                mask=(row[:, None] < K) & (column[None, :] < V),
                other=0.0,
            )
            dv += tl.dot(k, dS, input_precision=DOT)
        do = rows(do_ptr, token, t, T, column, V)
        dv = dv * to_end[:, None] + tl.dot(tl.trans(scores), do, input_precision=DOT)
        tl.store(dv_ptr + spot_v, dv.to(dtype), mask=inside_v)
