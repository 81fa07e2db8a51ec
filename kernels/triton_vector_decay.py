"""Triton kernels of the matrix state with a decay per key channel (GLA, HGRN2, RWKV-6).

Chunks as in `triton_matrix_state`, but exp(G_i - G_j) differs per channel and has to be inside the
product of queries and keys. It is split by halving (arXiv 2312.06635, section 4.3, cuts once, into
16s; here down to single tokens): a pair (i, j), j < i, parts at the one level where i lies in the
second half of a block and j in the first. With m the border between them, exp(G_i - G_m) and
exp(G_m - G_j) are both at most 1, whatever the decay, so nothing overflows and every level is one
product on tensor cores. All exponents are sums of log-decays and never differences, so that none
loses digits behind a token that forgets everything.
"""

from __future__ import annotations

from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .autotune import kinds, tuned
from .triton_common import DOT, LENGTHS, full_tile, on_device_of, rows, tile
from .triton_halves import level_pairs, pair_scores, sums_since, sums_until

CHUNK = 64
"""Tokens of a chunk; a short sequence takes the power of two that holds it."""
CHUNK_FLOAT32 = 32
"""The same for float32, whose tiles, three times in TF32, do not fit a chip in chunks of 64."""


def vector_state(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    bonus: Tensor | None,
    state: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """`matrix_state` with log_decay (B, T, H, K); with `bonus` (H, K), `matrix_state_preread`.

    q, k and v are contiguous and of one dtype, `state` is float32.
    """
    found: tuple[Tensor, Tensor] = _VectorState.apply(  # type: ignore[no-untyped-call]
        q, k, v, log_decay.contiguous(), bonus, state, scale
    )
    return found


class _VectorState(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor,
        bonus: Tensor | None,
        state: Tensor | None,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        size = chunk_size(q)
        late, kept = decayed(k, log_decay, size, 1.0, to_end=True)
        before, final = walk(late, v, kept, state, size, reverse=False)
        o = torch.empty(v.shape, dtype=v.dtype, device=v.device)
        launch_chunks(
            "vector_decay.outputs", _outputs, q, v, size,
            q, k, v, log_decay, bonus, before, o, scale,
            PRE=bonus is not None, READ=True,
        )  # fmt: skip
        ctx.save_for_backward(q, k, v, log_decay, bonus, late, kept, before)
        ctx.scale, ctx.size, ctx.started = scale, size, state is not None
        return o, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, log_decay, bonus, late, kept, before = ctx.saved_tensors
        do, dfinal = do.contiguous(), dfinal.contiguous()
        pre = bonus is not None
        early, _ = decayed(q, log_decay, ctx.size, ctx.scale, to_end=False, pre=pre)
        dafter, dstate = walk(early, do, kept, dfinal, ctx.size, reverse=True)
        dq, dk, dv, dg, dbonus = gradients(
            q, k, v, log_decay, bonus, late, before, do, dafter, ctx.size, ctx.scale, dtype=q.dtype
        )
        return (
            dq,
            dk,
            dv,
            dg.to(log_decay.dtype),
            None if bonus is None else dbonus.sum(dim=(0, 2)).to(bonus.dtype),
            dstate if ctx.started else None,
            None,
        )


def chunk_size(x: Tensor) -> int:
    """Tokens of the chunks of x, (B, T, ...)."""
    return min(CHUNK_FLOAT32 if x.dtype == torch.float32 else CHUNK, tile(x.shape[1]))


def decayed(
    x: Tensor, log_decay: Tensor, size: int, scale: float, *, to_end: bool, pre: bool = False
) -> tuple[Tensor, Tensor]:
    """scale x_i decayed since its chunk's start, or to its end, and exp(G_C), (B, H, N, K) float32.

    With `pre` without the decay of the token itself, which a read before the write does not see.
    """
    batch, tokens, heads, width = x.shape
    chunks = -(-tokens // size)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    kept = torch.empty((batch, heads, chunks, width), dtype=torch.float32, device=x.device)

    def run(config: dict[str, int]) -> None:
        _decayed[(batch * heads, chunks, triton.cdiv(width, config["TILE_K"]))](
            x, log_decay, out, kept, scale, tokens, chunks, heads,
            K=width, C=size, END=to_end, PRE=pre, **config,
        )  # fmt: skip

    with on_device_of(x):
        tuned(
            "vector_decay.decayed", _decayed, x, run,
            limits=(full_tile(width),), sizes=(batch * heads, tokens),
            exact=(width, size, to_end, pre, *kinds(log_decay)),
        )  # fmt: skip
    return out, kept


def walk(
    x: Tensor, y: Tensor, kept: Tensor, start: Tensor | None, size: int, *, reverse: bool
) -> tuple[Tensor, Tensor]:
    """The states (B, H, N, K, V) before each chunk, in x's dtype, and the last, in float32.

    `x` comes from `decayed`. With `reverse`, the gradients of the states after each chunk.
    """
    batch, tokens, heads, key_width = x.shape
    value_width, chunks = y.shape[-1], kept.shape[2]
    shape = (batch, heads, key_width, value_width)
    last = torch.empty(shape, dtype=torch.float32, device=x.device)
    states = torch.empty((*shape[:2], chunks, *shape[2:]), dtype=x.dtype, device=x.device)
    flags = {"START": start is not None, "REVERSE": reverse}

    def run(config: dict[str, int]) -> None:
        grid = (
            batch * heads,
            triton.cdiv(key_width, config["TILE_K"]),
            triton.cdiv(value_width, config["TILE_V"]),
        )
        _states[grid](
            x, y, kept, start, states, last, tokens, chunks, heads,
            K=key_width, V=value_width, C=size, **flags, **config,
        )  # fmt: skip

    with on_device_of(x):
        tuned(
            "vector_decay.states", _states, x, run,
            limits=(full_tile(key_width), full_tile(value_width)), sizes=(batch * heads, tokens),
            exact=(key_width, value_width, size, *flags.values(), *kinds(y)),
        )  # fmt: skip
    return states, last


def gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    bonus: Tensor | None,
    late: Tensor,
    before: Tensor,
    do: Tensor,
    dafter: Tensor,
    size: int,
    scale: float,
    *,
    read: bool = True,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dq, dk (`dtype`), dv (v's), dg and the chunks' parts (B, H, N, K) of dbonus, in float32.

    Without `read` only what the writes k v^T of these tokens do, not the state before the chunk.
    """
    batch, _, heads, key_width = q.shape
    dq, dk = (torch.empty(q.shape, dtype=dtype, device=q.device) for _ in range(2))
    dg = torch.empty(q.shape, dtype=torch.float32, device=q.device)
    dv = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    shape = (0 if bonus is None else batch, heads, before.shape[2], key_width)
    dbonus = torch.empty(shape, dtype=torch.float32, device=q.device)
    launch_chunks(
        "vector_decay.gradients", _gradients, q, v, size,
        q, k, v, log_decay, bonus, late, before, do, dafter, dq, dk, dv, dg, dbonus, scale,
        PRE=bonus is not None, READ=read,
    )  # fmt: skip
    return dq, dk, dv, dg, dbonus


def launch_chunks(
    name: str,
    kernel: Any,
    q: Tensor,
    v: Tensor,
    size: int,
    *arguments: Any,
    rewritten: tuple[Tensor | None, ...] = (),
    **flags: Any,
) -> None:
    """One program per head and chunk."""
    batch, tokens, heads, key_width = q.shape
    chunks, value_width = -(-tokens // size), v.shape[-1]

    def run(config: dict[str, int]) -> None:
        kernel[(batch * heads, chunks)](
            *arguments, tokens, chunks, heads,
            K=key_width, V=value_width, C=size, LEVELS=size.bit_length() - 1, **flags, **config,
        )  # fmt: skip

    with on_device_of(q):
        tuned(
            name, kernel, q, run,
            # Rows of a tile of values are at most 128 bytes: more do not fit beside the decays.
            limits=(full_tile(key_width), min(128 // q.itemsize, full_tile(value_width))),
            sizes=(batch * heads, tokens),
            exact=(key_width, value_width, size, *flags.values(), *kinds(*arguments)),
            rewritten=rewritten,
        )  # fmt: skip


@triton.jit(do_not_specialize=LENGTHS)
@no_type_check
def _decayed(
    x_ptr, g_ptr, out_ptr, kept_ptr, scale, T, N, H,
    K: tl.constexpr, C: tl.constexpr, TILE_K: tl.constexpr, END: tl.constexpr, PRE: tl.constexpr,
):  # fmt: skip
    """scale x_i exp(G_i), with PRE exp(G_{i-1}), or, with END, scale x_i exp(G_C - G_i)."""
    bh = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1)
    b, h = bh // H, bh % H
    row = tl.program_id(2) * TILE_K + tl.arange(0, TILE_K)
    t = n * C + tl.arange(0, C)
    token = (b * T + t) * H + h
    x = rows(x_ptr, token, t, T, row, K).to(tl.float32)
    g = rows(g_ptr, token, t, T, row, K).to(tl.float32)
    if END:
        # A neighbour of the chunk's edge belongs to another chunk: `sums_*` leave it out.
        later = rows(g_ptr, token + H, t + 1, T, row, K).to(tl.float32)
        total = sums_until(later, C, C, TILE_K)
    else:
        total = sums_since(rows(g_ptr, token - H, t - 1, T, row, K).to(tl.float32), C, C, TILE_K)
        if not PRE:
            total += g
    out = (x * tl.exp(total) * scale).to(out_ptr.dtype.element_ty)
    inside = (t[:, None] < T) & (row[None, :] < K)
    tl.store(out_ptr + token[:, None] * K + row[None, :], out, mask=inside)
    tl.store(kept_ptr + (bh * N + n) * K + row, tl.exp(tl.sum(g, axis=0)), mask=row < K)


@triton.jit(do_not_specialize=LENGTHS)
@no_type_check
def _states(
    x_ptr, y_ptr, kept_ptr, start_ptr, states_ptr, last_ptr, T, N, H,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    TILE_K: tl.constexpr, TILE_V: tl.constexpr, START: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """S' = exp(G_C) S + sum_j x_j y_j^T, from the first chunk to the last or the other way."""
    bh = tl.program_id(0).to(tl.int64)
    b, h = bh // H, bh % H
    row = tl.program_id(1) * TILE_K + tl.arange(0, TILE_K)
    column = tl.program_id(2) * TILE_V + tl.arange(0, TILE_V)
    entry = row[:, None] * V + column[None, :]
    there = (row[:, None] < K) & (column[None, :] < V)
    S = tl.zeros((TILE_K, TILE_V), dtype=tl.float32)
    if START:
        S = tl.load(start_ptr + bh * K * V + entry, mask=there, other=0.0)
    for turn in range(N):
        n = N - 1 - turn if REVERSE else turn
        stored = states_ptr + (bh * N + n) * K * V + entry
        tl.store(stored, S.to(states_ptr.dtype.element_ty), mask=there)
        t = n * C + tl.arange(0, C)
        token = (b * T + t) * H + h
        x = rows(x_ptr, token, t, T, row, K)
        y = rows(y_ptr, token, t, T, column, V)
        kept = tl.load(kept_ptr + (bh * N + n) * K + row, mask=row < K, other=0.0)
        S = S * kept[:, None] + tl.dot(tl.trans(x), y, input_precision=DOT)
    tl.store(last_ptr + bh * K * V + entry, S, mask=there)


@triton.jit(do_not_specialize=LENGTHS)
@no_type_check
def _outputs(
    q_ptr, k_ptr, v_ptr, g_ptr, bonus_ptr, before_ptr, o_ptr, scale, T, N, H,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr,
    TILE_K: tl.constexpr, TILE_V: tl.constexpr, PRE: tl.constexpr, READ: tl.constexpr,
):  # fmt: skip
    """o_i = scale (S^T (exp(G_i) q_i) + sum_{j<=i} (q_i . exp(G_i - G_j) k_j) v_j) of one chunk."""
    bh = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1)
    b, h = bh // H, bh % H
    t = n * C + tl.arange(0, C)
    token = (b * T + t) * H + h
    scores = pair_scores(
        q_ptr, k_ptr, g_ptr, bonus_ptr, token, t, T, H, h, K, C, LEVELS, TILE_K, PRE, True
    )
    scores = (scores * scale).to(v_ptr.dtype.element_ty)
    for first_v in range(0, V, TILE_V):
        column = first_v + tl.arange(0, TILE_V)
        o = tl.dot(scores, rows(v_ptr, token, t, T, column, V), input_precision=DOT)
        if READ:
            for first in range(0, K, TILE_K):
                row = first + tl.arange(0, TILE_K)
                since = sums_since(
                    rows(g_ptr, token - H, t - 1, T, row, K).to(tl.float32), C, C, TILE_K
                )
                if not PRE:
                    since += rows(g_ptr, token, t, T, row, K).to(tl.float32)
                q = rows(q_ptr, token, t, T, row, K)
                q = (q * (tl.exp(since) * scale)).to(q.dtype)
                S = tl.load(
                    before_ptr + (bh * N + n) * K * V + row[:, None] * V + column[None, :],
                    mask=(row[:, None] < K) & (column[None, :] < V),
                    other=0.0,
                )
                o += tl.dot(q, S, input_precision=DOT)
        tl.store(
            o_ptr + token[:, None] * V + column[None, :],
            o.to(o_ptr.dtype.element_ty),
            mask=(t[:, None] < T) & (column[None, :] < V),
        )


@triton.jit(do_not_specialize=LENGTHS)
@no_type_check
def _gradients(
    q_ptr, k_ptr, v_ptr, g_ptr, bonus_ptr, late_ptr, before_ptr, do_ptr, dafter_ptr,
    dq_ptr, dk_ptr, dv_ptr, dg_ptr, dbonus_ptr, scale, T, N, H,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr,
    TILE_K: tl.constexpr, TILE_V: tl.constexpr, PRE: tl.constexpr, READ: tl.constexpr,
):  # fmt: skip
    """The gradients of one chunk from those of its outputs and of the state after it.

    G_i stands in exp(G_i) q_i and in exp(-G_i) k_i, so its gradient is q_i dq_i - k_i dk_i; the
    last one also decays the state after the chunk. That of g_i is the sum of these from i on.
    """
    bh = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1)
    b, h = bh // H, bh % H
    place = tl.arange(0, C)
    t = n * C + place
    token = (b * T + t) * H + h
    dtype = q_ptr.dtype.element_ty
    state = (bh * N + n) * K * V
    scores = pair_scores(
        q_ptr, k_ptr, g_ptr, bonus_ptr, token, t, T, H, h, K, C, LEVELS, TILE_K, PRE, True
    )
    scores = (scores * scale).to(dtype)
    dscores = tl.zeros((C, C), dtype=tl.float32)
    for first_v in range(0, V, TILE_V):
        column = first_v + tl.arange(0, TILE_V)
        do = rows(do_ptr, token, t, T, column, V)
        v = rows(v_ptr, token, t, T, column, V)
        dscores += tl.dot(do, tl.trans(v), input_precision=DOT)
        dv = tl.dot(tl.trans(scores), do, input_precision=DOT)
        for first in range(0, K, TILE_K):
            row = first + tl.arange(0, TILE_K)
            dS = tl.load(
                dafter_ptr + state + row[:, None] * V + column[None, :],
                mask=(row[:, None] < K) & (column[None, :] < V),
                other=0.0,
            )
            dv += tl.dot(rows(late_ptr, token, t, T, row, K), dS, input_precision=DOT)
        tl.store(
            dv_ptr + token[:, None] * V + column[None, :],
            dv.to(dv_ptr.dtype.element_ty),
            mask=(t[:, None] < T) & (column[None, :] < V),
        )
    dscores *= scale
    ditself = tl.sum(tl.where(place[:, None] == place[None, :], dscores, 0.0), axis=1)
    for first in range(0, K, TILE_K):
        row = first + tl.arange(0, TILE_K)
        spot = token[:, None] * K + row[None, :]
        inside = (t[:, None] < T) & (row[None, :] < K)
        dq = tl.zeros((C, TILE_K), dtype=tl.float32)
        dk = tl.zeros((C, TILE_K), dtype=tl.float32)
        dend = tl.zeros((TILE_K,), dtype=tl.float32)
        for first_v in range(0, V, TILE_V):
            column = first_v + tl.arange(0, TILE_V)
            entry = state + row[:, None] * V + column[None, :]
            there = (row[:, None] < K) & (column[None, :] < V)
            dS = tl.load(dafter_ptr + entry, mask=there, other=0.0)
            v = rows(v_ptr, token, t, T, column, V)
            dk += tl.dot(v, tl.trans(dS), input_precision=DOT)
            if READ:
                S = tl.load(before_ptr + entry, mask=there, other=0.0)
                do = rows(do_ptr, token, t, T, column, V)
                dq += tl.dot(do, tl.trans(S), input_precision=DOT)
                dend += tl.sum(S.to(tl.float32) * dS.to(tl.float32), axis=1)
        q = rows(q_ptr, token, t, T, row, K)
        k = rows(k_ptr, token, t, T, row, K)
        g = rows(g_ptr, token, t, T, row, K).to(tl.float32)
        earlier = rows(g_ptr, token - H, t - 1, T, row, K).to(tl.float32)
        later = rows(g_ptr, token + H, t + 1, T, row, K).to(tl.float32)
        own = tl.zeros((C, TILE_K), dtype=tl.float32) if PRE else g
        dq *= tl.exp(sums_since(earlier, C, C, TILE_K) + own) * scale
        dk *= tl.exp(sums_until(later, C, C, TILE_K))
        dend = dend * tl.exp(tl.sum(g, axis=0)) + tl.sum(k.to(tl.float32) * dk, axis=0)
        for level in tl.static_range(LEVELS):
            since = tl.exp(sums_since(earlier, 1 << level, C, TILE_K) + own)
            until = tl.exp(sums_until(later, 1 << level, C, TILE_K))
            part = tl.where(level_pairs(1 << level, C), dscores, 0.0).to(dtype)
            dq += since * tl.dot(part, (k * until).to(dtype), input_precision=DOT)
            dk += until * tl.dot(tl.trans(part), (q * since).to(dtype), input_precision=DOT)
        q, k = q.to(tl.float32), k.to(tl.float32)
        dtotal = q * dq - k * dk
        dg = tl.cumsum(dtotal, axis=0, reverse=True) + dend[None, :]
        if PRE:
            dg -= q * dq
        tl.store(dg_ptr + spot, dg, mask=inside)
        # A token's read of its own write does not decay: it is added after dg is made.
        weight = tl.zeros((TILE_K,), dtype=tl.float32) + 1.0
        if bonus_ptr is not None:
            weight = tl.load(bonus_ptr + h * K + row, mask=row < K, other=0.0).to(tl.float32)
            part = tl.sum(ditself[:, None] * q * k, axis=0)
            tl.store(dbonus_ptr + (bh * N + n) * K + row, part, mask=row < K)
        dq += ditself[:, None] * k * weight[None, :]
        dk += ditself[:, None] * q * weight[None, :]
        tl.store(dq_ptr + spot, dq.to(dq_ptr.dtype.element_ty), mask=inside)
        tl.store(dk_ptr + spot, dk.to(dk_ptr.dtype.element_ty), mask=inside)
