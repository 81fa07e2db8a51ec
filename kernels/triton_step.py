"""The Triton kernel that decodes one token of a matrix state, plain or with the delta rule.

The state is read once and written once, which is all that a step must move.
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_common import full_tile, on_device_of, tile


def step_serves(q: Tensor, *others: Tensor | None) -> bool:
    """One token, and no gradient asked for: the kernel has none."""
    wanted = any(t is not None and t.requires_grad for t in (q, *others))
    return q.shape[1] == 1 and not (wanted and torch.is_grad_enabled())


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    log_decay: Tensor | None,
    state: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """(B, 1, H, V) and the next state; `beta` (B, 1, H) makes it the delta rule's."""
    batch, _, heads, key_width = q.shape
    value_width = v.shape[-1]
    tile_v = min(32, tile(value_width))
    o = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    new = torch.empty((batch, heads, key_width, value_width), dtype=torch.float32, device=q.device)
    with on_device_of(q):
        _step[(batch * heads, triton.cdiv(value_width, tile_v))](
            q.contiguous(), k.contiguous(), v.contiguous(),
            None if beta is None else beta.contiguous(),
            None if log_decay is None else log_decay.contiguous(),
            None if state is None else state.float().contiguous(),
            o, new, heads, scale,
            K=key_width, V=value_width, FULL_K=full_tile(key_width), TILE_V=tile_v,
            DELTA=beta is not None, START=state is not None,
            DECAY=log_decay is not None,
            FIXED=log_decay is not None and log_decay.ndim == 1,
            num_warps=4,
        )  # fmt: skip
    return o, new


@triton.jit
@no_type_check
def _step(
    q_ptr, k_ptr, v_ptr, beta_ptr, log_decay_ptr, state_ptr, o_ptr, new_ptr, H, scale,
    K: tl.constexpr, V: tl.constexpr, FULL_K: tl.constexpr, TILE_V: tl.constexpr,
    DELTA: tl.constexpr, START: tl.constexpr, DECAY: tl.constexpr, FIXED: tl.constexpr,
):  # fmt: skip
    """S' = e^g S + k v^T, or e^g S + k beta (v - e^g S^T k)^T;  o = scale S'^T q."""
    bh = tl.program_id(0).to(tl.int64)
    row = tl.arange(0, FULL_K)
    column = tl.program_id(1) * TILE_V + tl.arange(0, TILE_V)
    entry = bh * K * V + row[:, None] * V + column[None, :]
    there = (row[:, None] < K) & (column[None, :] < V)
    q = tl.load(q_ptr + bh * K + row, mask=row < K, other=0.0).to(tl.float32)
    k = tl.load(k_ptr + bh * K + row, mask=row < K, other=0.0).to(tl.float32)
    v = tl.load(v_ptr + bh * V + column, mask=column < V, other=0.0).to(tl.float32)
    S = tl.zeros((FULL_K, TILE_V), dtype=tl.float32)
    if START:
        S = tl.load(state_ptr + entry, mask=there, other=0.0)
        if DECAY:
            head = bh % H if FIXED else bh
            S = S * tl.exp(tl.load(log_decay_ptr + head).to(tl.float32))
    if DELTA:
        beta = tl.load(beta_ptr + bh).to(tl.float32)
        v = beta * (v - tl.sum(S * k[:, None], axis=0))
    S = S + k[:, None] * v[None, :]
    tl.store(new_ptr + entry, S, mask=there)
    o = tl.sum(S * q[:, None], axis=0) * scale
    tl.store(o_ptr + bh * V + column, o.to(o_ptr.dtype.element_ty), mask=column < V)
