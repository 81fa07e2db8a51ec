"""Triton kernels of the (gated) delta rule.

The WY form of `delta_rule._chunked`: the triangular systems of all chunks are independent and are
solved first, in `triton_delta_solve`. What depends on the chunk before, the writes U - W S and
the states, is walked over here; outputs and gradients of a chunk are the matrix state's kernels
with the writes in place of the values.
"""

from __future__ import annotations

from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .autotune import kinds, tuned
from .chunks import Cut
from .triton_common import (
    DOT,
    LENGTHS,
    batch_stride,
    check_device,
    check_width,
    common_dtype,
    decay_between,
    full_tile,
    half_stride,
    on_device_of,
    rows,
    split_prefix,
    tile,
)
from .triton_delta_solve import DeltaSolve
from .triton_low_rank import delta_rule_per_channel
from .triton_matrix_state import _gradients, _outputs, launch_chunks
from .triton_step import step, step_serves

OP = "delta_rule"
CHUNK = 64


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    state: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """See `delta_rule.delta_rule`.

    Raises `Unsupported` for float64, for K or V above 256 and for tensors that are not on a GPU.
    """
    check_device(OP, q)
    check_width(OP, K=q.shape[-1], V=v.shape[-1])
    dtype = common_dtype(OP, q, k, v)
    if step_serves(q, k, v, beta, log_decay, state):
        return step(q, k, v, beta, log_decay, state, scale)
    if log_decay is not None and log_decay.ndim == 4:
        return delta_rule_per_channel(q, k, v, beta, log_decay, state, scale)
    tokens = q.shape[1]
    size = min(CHUNK, tile(tokens))
    total = None
    if log_decay is not None:
        # Chunks of exactly `size`: the kernels pad the last one themselves.
        cut = Cut(tokens, -(-tokens // size), size)
        total = cut(log_decay.double().unsqueeze(-1)).cumsum(dim=3).flatten(2)
    q, k, v_ = (t.to(dtype).contiguous() for t in (q, k, v))
    values, erase = DeltaSolve.apply(  # type: ignore[no-untyped-call]
        k, v_, beta.float().contiguous(), total, size
    )
    o, final = _Walk.apply(  # type: ignore[no-untyped-call]
        q,
        k,
        values,
        erase,
        total,
        None if state is None else state.float().contiguous(),
        scale,
    )
    return o.to(v.dtype), final


class _Walk(torch.autograd.Function):
    """From queries, keys, U, W (B, H, N, C, ...) and the prefix sums to outputs and final state."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        values: Tensor,
        erase: Tensor,
        total: Tensor | None,
        state: Tensor | None,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        batch, tokens, heads, key_width = q.shape
        chunks, size, value_width = values.shape[2:]
        prefix = None if total is None else split_prefix(total)
        writes = torch.empty((batch, tokens, heads, value_width), dtype=q.dtype, device=q.device)
        o = torch.empty(writes.shape, dtype=q.dtype, device=q.device)
        before = torch.empty(
            (batch, heads, chunks, key_width, value_width), dtype=q.dtype, device=q.device
        )
        last = torch.empty(
            (batch, heads, key_width, value_width), dtype=torch.float32, device=q.device
        )
        _walk(
            "delta_rule.states", _delta_states, (batch, heads, key_width, value_width), size,
            prefix, state, tokens,
            k, erase, values, prefix, state, before, writes, last, tokens, chunks, heads,
        )  # fmt: skip
        launch_chunks(
            "matrix_state.outputs", _outputs, q, writes, size,
            q, k, writes, prefix, before, o, scale,
        )  # fmt: skip
        ctx.save_for_backward(q, k, writes, erase, prefix, before)
        ctx.scale, ctx.size, ctx.started = scale, size, state is not None
        return o, last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor, dlast: Tensor) -> tuple[Tensor | None, ...]:
        q, k, writes, erase, prefix, before = ctx.saved_tensors
        do, dlast = do.contiguous(), dlast.contiguous()
        batch, tokens, heads, key_width = q.shape
        value_width = writes.shape[-1]
        chunks = before.shape[2]
        dafter = torch.empty(before.shape, dtype=q.dtype, device=q.device)
        dstate = torch.empty(dlast.shape, dtype=torch.float32, device=q.device)
        _walk(
            "delta_rule.gradients", _delta_gradients, (batch, heads, key_width, value_width),
            ctx.size, prefix, dlast, tokens,
            q, k, erase, do, prefix, dlast, dafter, dstate, ctx.scale, tokens, chunks, heads,
        )  # fmt: skip
        dq, dk, dwrites = (
            torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, writes)
        )
        dtotal = torch.empty(
            (0 if prefix is None else batch, heads, chunks * ctx.size),
            dtype=torch.float32,
            device=q.device,
        )
        launch_chunks(
            "matrix_state.gradients", _gradients, q, writes, ctx.size,
            q, k, writes, prefix, before, do, dafter, dq, dk, dwrites, dtotal, ctx.scale,
        )  # fmt: skip
        dvalues = Cut(tokens, chunks, ctx.size)(dwrites)
        derase = -(dvalues @ before.mT)
        return (
            dq,
            dk,
            dvalues,
            derase,
            None if prefix is None else dtotal.double(),
            dstate if ctx.started else None,
            None,
        )


def _walk(
    name: str,
    kernel: Any,
    shape: tuple[int, int, int, int],
    size: int,
    prefix: Tensor | None,
    start: Tensor | None,
    tokens: int,
    *arguments: Any,
) -> None:
    """One program per head and tile of values: W S needs all of the state's rows at once."""
    batch, heads, key_width, value_width = shape
    first = arguments[0]
    flags = {"DECAY": prefix is not None, "START": start is not None}

    def run(config: dict[str, int]) -> None:
        kernel[(batch * heads, triton.cdiv(value_width, config["TILE_V"]))](
            *arguments, batch_stride(prefix), half_stride(prefix),
            K=key_width, V=value_width, C=size, FULL_K=full_tile(key_width), **flags, **config,
        )  # fmt: skip

    with on_device_of(first):
        tuned(
            name, kernel, first, run,
            limits=(full_tile(value_width),), sizes=(batch * heads, tokens),
            exact=(key_width, value_width, size, *kinds(*arguments)),
        )  # fmt: skip


@triton.jit(do_not_specialize=LENGTHS)
@no_type_check
def _delta_states(
    k_ptr, erase_ptr, values_ptr, prefix_ptr, start_ptr, before_ptr, writes_ptr, last_ptr,
    T, N, H, prefix_stride, half,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    FULL_K: tl.constexpr, TILE_V: tl.constexpr,
    DECAY: tl.constexpr, START: tl.constexpr,
):  # fmt: skip
    """u = U - W S;  S' = exp(G_C) S + sum_j exp(G_C - G_j) k_j u_j^T."""
    bh = tl.program_id(0).to(tl.int64)
    b, h = bh // H, bh % H
    row = tl.arange(0, FULL_K)
    column = tl.program_id(1) * TILE_V + tl.arange(0, TILE_V)
    place = tl.arange(0, C)
    entry = row[:, None] * V + column[None, :]
    there = (row[:, None] < K) & (column[None, :] < V)
    S = tl.zeros((FULL_K, TILE_V), dtype=tl.float32)
    if START:
        S = tl.load(start_ptr + bh * K * V + entry, mask=there, other=0.0)
    if DECAY:
        sums = prefix_ptr + b * prefix_stride + h * N * C
    for n in range(N):
        chunk = bh * N + n
        t = n * C + place
        token = (b * T + t) * H + h
        erase = tl.load(
            erase_ptr + (chunk * C + place)[:, None] * K + row[None, :],
            mask=(row < K)[None, :],
            other=0.0,
        )
        write = tl.load(
            values_ptr + (chunk * C + place)[:, None] * V + column[None, :],
            mask=(column < V)[None, :],
            other=0.0,
        )
        S_ = S.to(erase.dtype)
        tl.store(before_ptr + chunk * K * V + entry, S_, mask=there)
        u = write.to(tl.float32) - tl.dot(erase, S_, input_precision=DOT)
        tl.store(
            writes_ptr + token[:, None] * V + column[None, :],
            u.to(erase.dtype),
            mask=(t[:, None] < T) & (column[None, :] < V),
        )
        k = rows(k_ptr, token, t, T, row, K)
        if DECAY:
            high = tl.load(sums + t)
            low = tl.load(sums + half + t)
            end = tl.load(sums + n * C + C - 1)
            end_low = tl.load(sums + half + n * C + C - 1)
            # Tokens are weighed in the narrower factor of the product.
            u *= tl.exp((end - high) + (end_low - low))[:, None]
            S = S * tl.exp(end)
        S += tl.dot(tl.trans(k), u.to(erase.dtype), input_precision=DOT)
    tl.store(last_ptr + bh * K * V + entry, S, mask=there)


@triton.jit(do_not_specialize=LENGTHS)
@no_type_check
def _delta_gradients(
    q_ptr, k_ptr, erase_ptr, do_ptr, prefix_ptr, dlast_ptr, dafter_ptr, dstate_ptr, scale,
    T, N, H, prefix_stride, half,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    FULL_K: tl.constexpr, TILE_V: tl.constexpr,
    DECAY: tl.constexpr, START: tl.constexpr,
):  # fmt: skip
    """The gradients dS of the states, from the last chunk to the first.

    du = P^T do + exp(G_C - G) k dS', P the scores; dS = exp(G_C) dS' + (exp(G) q)^T do - W^T du.
    """
    bh = tl.program_id(0).to(tl.int64)
    b, h = bh // H, bh % H
    row = tl.arange(0, FULL_K)
    column = tl.program_id(1) * TILE_V + tl.arange(0, TILE_V)
    place = tl.arange(0, C)
    entry = row[:, None] * V + column[None, :]
    there = (row[:, None] < K) & (column[None, :] < V)
    dS = tl.load(dlast_ptr + bh * K * V + entry, mask=there, other=0.0)
    if DECAY:
        sums = prefix_ptr + b * prefix_stride + h * N * C
    for turn in range(N):
        n = N - 1 - turn
        chunk = bh * N + n
        t = n * C + place
        token = (b * T + t) * H + h
        q = rows(q_ptr, token, t, T, row, K)
        k = rows(k_ptr, token, t, T, row, K)
        do = rows(do_ptr, token, t, T, column, V)
        erase = tl.load(
            erase_ptr + (chunk * C + place)[:, None] * K + row[None, :],
            mask=(row < K)[None, :],
            other=0.0,
        )
        dS_ = dS.to(q.dtype)
        tl.store(dafter_ptr + chunk * K * V + entry, dS_, mask=there)
        scores = tl.dot(q, tl.trans(k), input_precision=DOT) * scale
        du = tl.dot(k, dS_, input_precision=DOT)
        if DECAY:
            high = tl.load(sums + t)
            low = tl.load(sums + half + t)
            end = tl.load(sums + n * C + C - 1)
            end_low = tl.load(sums + half + n * C + C - 1)
            scores *= decay_between(high, low, C)
            du *= tl.exp((end - high) + (end_low - low))[:, None]
            early = (do * tl.exp(high)[:, None]).to(do.dtype)
            dS = dS * tl.exp(end)
        else:
            scores = tl.where(place[:, None] >= place[None, :], scores, 0.0)
            early = do
        du += tl.dot(tl.trans(scores.to(do.dtype)), do, input_precision=DOT)
        dS += tl.dot(tl.trans(q), early, input_precision=DOT) * scale
        dS -= tl.dot(tl.trans(erase), du.to(do.dtype), input_precision=DOT)
    tl.store(dstate_ptr + bh * K * V + entry, dS, mask=there)
