"""The Triton kernel that decodes a matrix state, one to three tokens, in all of its forms.

The state is read once and written once, whatever the tokens, and is all that a step must move. The
scans decode with their own kernels, whose tiles are as short as the call.
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from .autotune import kinds, tuned
from .backend import STEP_TOKENS
from .triton_common import full_tile, on_device_of


def step_serves(q: Tensor, *others: Tensor | None) -> bool:
    """Few tokens, and no gradient asked for: the kernel has none."""
    wanted = any(t is not None and t.requires_grad for t in (q, *others))
    return q.shape[1] <= STEP_TOKENS and not (wanted and torch.is_grad_enabled())


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    log_decay: Tensor | None,
    state: Tensor | None,
    scale: float,
    *,
    bonus: Tensor | None = None,
    low_rank: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """(B, T, H, V) and the state after the last token.

    `beta` (B, T, H) makes it the delta rule's, `bonus` (H, K) the one that reads before it writes,
    `low_rank`, a and b (B, T, H, K), diagonal plus low rank; the decay is None, (H,), (B, T, H) or
    (B, T, H, K).
    """
    batch, tokens, heads, key_width = q.shape
    value_width = v.shape[-1]
    o = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    new = torch.empty((batch, heads, key_width, value_width), dtype=torch.float32, device=q.device)
    a, b = (None, None) if low_rank is None else low_rank
    all_given = (q, k, v, a, b, beta, bonus, log_decay, None if state is None else state.float())
    given = tuple(None if t is None else t.contiguous() for t in all_given)
    decay = 0 if log_decay is None else log_decay.ndim

    def run(config: dict[str, int]) -> None:
        _step[(batch * heads, triton.cdiv(value_width, config["TILE_V"]))](
            *given, o, new, heads, scale,
            T=tokens, K=key_width, V=value_width, FULL_K=full_tile(key_width), DECAY=decay,
            **config,
        )  # fmt: skip

    with on_device_of(q):
        tuned(
            "step", _step, q, run, limits=(full_tile(value_width),), sizes=(batch * heads,),
            exact=(tokens, key_width, value_width, decay, *kinds(*given)),
        )  # fmt: skip
    return o, new


@triton.jit(do_not_specialize=["H"])
@no_type_check
def _step(
    q_ptr, k_ptr, v_ptr, a_ptr, b_ptr, beta_ptr, bonus_ptr, log_decay_ptr, state_ptr,
    o_ptr, new_ptr, H, scale,
    T: tl.constexpr, K: tl.constexpr, V: tl.constexpr, FULL_K: tl.constexpr,
    TILE_V: tl.constexpr, DECAY: tl.constexpr,
):  # fmt: skip
    """S' = e^g S + k v^T, e^g S + k beta (v - e^g S^T k)^T or e^g S + b (a^T S) + k v^T;
    o = scale S'^T q, or, with a bonus u, scale (S + Diag(u) k v^T)^T q.

    DECAY is the number of axes of the decay, 0 where there is none.
    """
    bh = tl.program_id(0).to(tl.int64)
    head = bh % H
    row = tl.arange(0, FULL_K)
    column = tl.program_id(1) * TILE_V + tl.arange(0, TILE_V)
    entry = bh * K * V + row[:, None] * V + column[None, :]
    there = (row[:, None] < K) & (column[None, :] < V)
    S = tl.zeros((FULL_K, TILE_V), dtype=tl.float32)
    if state_ptr is not None:
        S = tl.load(state_ptr + entry, mask=there, other=0.0)
    for t in tl.static_range(T):
        at = (bh // H * T + t) * H + head
        q = tl.load(q_ptr + at * K + row, mask=row < K, other=0.0).to(tl.float32)
        k = tl.load(k_ptr + at * K + row, mask=row < K, other=0.0).to(tl.float32)
        v = tl.load(v_ptr + at * V + column, mask=column < V, other=0.0).to(tl.float32)
        if bonus_ptr is not None:
            u = tl.load(bonus_ptr + head * K + row, mask=row < K, other=0.0).to(tl.float32)
            o = tl.sum(S * q[:, None], axis=0) + tl.sum(q * u * k, axis=0) * v
        if a_ptr is not None:
            a = tl.load(a_ptr + at * K + row, mask=row < K, other=0.0).to(tl.float32)
            read = tl.sum(S * a[:, None], axis=0)
        if DECAY == 4:
            g = tl.load(log_decay_ptr + at * K + row, mask=row < K, other=0.0)
            S = S * tl.exp(g.to(tl.float32))[:, None]
        elif DECAY > 0:
            g = tl.load(log_decay_ptr + (head if DECAY == 1 else at))
            S = S * tl.exp(g.to(tl.float32))
        if a_ptr is not None:
            b = tl.load(b_ptr + at * K + row, mask=row < K, other=0.0).to(tl.float32)
            S = S + b[:, None] * read[None, :]
        if beta_ptr is not None:
            beta = tl.load(beta_ptr + at).to(tl.float32)
            v = beta * (v - tl.sum(S * k[:, None], axis=0))
        S = S + k[:, None] * v[None, :]
        if bonus_ptr is None:
            o = tl.sum(S * q[:, None], axis=0)
        o = (o * scale).to(o_ptr.dtype.element_ty)
        tl.store(o_ptr + at * V + column, o, mask=column < V)
    tl.store(new_ptr + entry, S, mask=there)
