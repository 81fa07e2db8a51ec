"""The linear recurrence with a matrix state, with no decay or one per head, token or channel.

S_t = Diag(exp g_t) S_{t-1} + k_t v_t^T,  o_t = scale * S_t^T q_t, per head, S of shape (K, V).

Linear attention (arXiv 2006.16236) without decay, RetNet (2307.08621) with a fixed one per head,
Mamba-2 (2405.21060) with one per token, GLA (2312.06635) with one per token and key channel.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from . import definitions
from .backend import choose, kernels, without_autocast
from .chunks import Cut, carry, causal_exp, prefix_sums
from .definitions import accumulator
from .letters import BHKV, BTH, BTHK, BTHV, H

Form = Literal["none", "fixed", "scalar", "vector"]

CHUNK = 32
"""Tokens of a chunk: the fastest of 16, 32, 64, 128 on a CPU for heads of 16 to 64."""

FORGOTTEN = -40.0
"""A log-decay below this keeps 4e-18 of a state, less than any dtype can tell from nothing."""


def decay_form(log_decay: Tensor | None) -> Form:
    """The kind of decay by its shape: None, (H,), (B, T, H) or (B, T, H, K)."""
    if log_decay is None:
        return "none"
    forms: dict[int, Form] = {1: "fixed", 3: "scalar", 4: "vector"}
    if log_decay.ndim not in forms:
        raise ValueError(
            "log_decay is None, (H,), (B, T, H) or (B, T, H, K), not of shape "
            f"{tuple(log_decay.shape)}"
        )
    return forms[log_decay.ndim]


@without_autocast
def matrix_state(
    q: BTHK,
    k: BTHK,
    v: BTHV,
    log_decay: H | BTH | BTHK | None = None,
    state: BHKV | None = None,
    *,
    scale: float | None = None,
) -> tuple[BTHV, BHKV]:
    """The outputs of all tokens and the state after the last.

    `log_decay` is g, the natural logarithm of the decay, at most 0; `state` continues a sequence
    (None: zeros); `scale=None` is K**-0.5. The output has v's dtype, the state float32 at least.
    Raises `Unsupported` where a pinned backend does not serve the case, ValueError for a decay of
    another shape.
    """
    form = decay_form(log_decay)
    if scale is None:
        scale = q.shape[-1] ** -0.5
    width = max(q.shape[-1], v.shape[-1])
    backend = choose("matrix_state", q.device, form, width=width, dtype=v.dtype)
    if backend == "definition":
        return definitions.matrix_state(q, k, v, log_decay, state, scale)
    if backend == "triton":
        return kernels("matrix_state")(q, k, v, log_decay, state, scale)
    if q.shape[1] == 1:
        return _step(q, k, v, log_decay, state, scale)
    return _chunked(q, k, v, log_decay, state, scale, form)


def _step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    state: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """One token: an outer product and a read-out."""
    batch, _, heads, key_width = q.shape
    value_width = v.shape[-1]
    dtype = accumulator(q, k, v, log_decay, state)
    n = batch * heads
    key = k.to(dtype).reshape(n, key_width, 1)
    value = v.to(dtype).reshape(n, 1, value_width)
    query = q.to(dtype).reshape(n, 1, key_width)
    if state is None:
        new = torch.bmm(key, value)
    else:
        old = state.to(dtype)
        if log_decay is not None:
            kept = log_decay.to(dtype).exp()
            if kept.ndim < 4:  # (H,) or (B, 1, H): the same for every key channel
                kept = kept[..., None]
            old = old * (kept if kept.ndim == 2 else kept[:, 0])[..., None]
        new = torch.baddbmm(old.reshape(n, key_width, value_width), key, value)
    o = torch.bmm(query, new) * scale
    return (
        o.view(batch, 1, heads, value_width).to(v.dtype),
        new.view(batch, heads, key_width, value_width),
    )


def _chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    state: Tensor | None,
    scale: float,
    form: Form,
) -> tuple[Tensor, Tensor]:
    """Products within chunks of C tokens, and the state from chunk to chunk.

    With G the sum of g since the chunk's start and S the state before the chunk,
    o_i = exp(G_i) S^T q_i + sum_{j<=i} exp(G_i - G_j) (q_i . k_j) v_j, and
    S' = exp(G_C) S + sum_j exp(G_C - G_j) k_j v_j^T. No exponent is positive, so nothing overflows.
    With a decay per channel the products are per channel too (arXiv 2312.06635, section 4).
    """
    tokens, out_dtype = q.shape[1], v.dtype
    dtype = accumulator(q, k, v, log_decay, state)
    cut = Cut.of(tokens, CHUNK)
    q, k, v = cut(q.to(dtype) * scale), cut(k.to(dtype)), cut(v.to(dtype))
    if log_decay is None:
        before, final = carry(k.mT @ v, None, state)
        o = (q @ k.mT).tril() @ v
        if before is not None:
            o = o + q @ before
        return cut.join(o).to(out_dtype), final
    total = prefix_sums(log_decay, cut)
    end = total[..., -1:, :]
    since_start, to_end = total.to(dtype).exp(), (end - total).to(dtype).exp()
    if form == "vector":
        scores = vector_scores(q, k, prefix_sums(log_decay.clamp_min(FORGOTTEN), cut))
        written = (k * to_end).mT @ v
    else:
        scores = q @ k.mT * causal_exp(total, dtype)
        # A decay that is the same for all of a key may weigh the values, often the narrower ones.
        written = k.mT @ (v * to_end)
    before, final = carry(written, end.to(dtype).exp().mT, state)
    o = scores @ v
    if before is not None and form == "vector":
        o = o + (q * since_start) @ before
    elif before is not None:
        o = torch.addcmul(o, q @ before, since_start)
    return cut.join(o).to(out_dtype), final


def vector_scores(q: Tensor, k: Tensor, total: Tensor) -> Tensor:
    """sum_k q_ik exp(G_ik - G_jk) k_jk for j <= i, else 0, as one product per chunk.

    The factors exp(G_i - M) and exp(M - G_j), M the sum at the middle of the chunk, stay in
    float64's range: 16 tokens of at least `FORGOTTEN` are exp(-640), and 1e-308 is exp(-708). Above
    the diagonal their product may overflow; it is overwritten there, and no gradient comes back.
    """
    middle = total[..., total.shape[-2] // 2, :].unsqueeze(-2)
    left = q.double() * (total - middle).exp()
    right = k.double() * (middle - total).exp()
    return (left @ right.mT).tril().to(q.dtype)
