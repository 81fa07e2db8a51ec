"""The (gated) delta rule: a state that forgets what a key held before it writes.

S_t = (I - beta_t k_t k_t^T) Diag(exp g_t) S_{t-1} + beta_t k_t v_t^T,  o_t = scale * S_t^T q_t.

DeltaNet (arXiv 2102.11174; chunks 2406.06484) without decay, Gated DeltaNet (2412.06464) with one
per head and token, Kimi Delta Attention (2510.26692) with one per key channel and token.
The keys are taken as they are: a layer that wants them of length 1 normalises them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import definitions
from .backend import choose, kernels, without_autocast
from .chunks import Cut, causal_exp, prefix_sums
from .definitions import accumulator
from .letters import BHKV, BTH, BTHK, BTHV
from .matrix_state import FORGOTTEN, vector_scores

CHUNK = 32
"""Tokens of a chunk: the fastest of 32, 64, 128 on a CPU for heads of 16 to 64."""


@without_autocast
def delta_rule(
    q: BTHK,
    k: BTHK,
    v: BTHV,
    beta: BTH,
    log_decay: BTH | BTHK | None = None,
    state: BHKV | None = None,
    *,
    scale: float | None = None,
) -> tuple[BTHV, BHKV]:
    """The outputs of all tokens and the state after the last.

    `beta` is the writing strength; `log_decay` is g, the natural logarithm of the decay, finite and
    at most 0; `state` continues a sequence (None: zeros); `scale=None` is K**-0.5. The output has
    v's dtype, the state float32 at least. Raises `Unsupported` where a pinned backend does not
    serve the case.
    """
    if scale is None:
        scale = q.shape[-1] ** -0.5
    form = "vector" if log_decay is not None and log_decay.ndim == 4 else None
    width = max(q.shape[-1], v.shape[-1])
    backend = choose("delta_rule", q.device, form, width=width, dtype=v.dtype)
    if backend == "definition":
        return definitions.delta_rule(q, k, v, beta, log_decay, state, scale)
    if backend == "triton":
        return kernels("delta_rule")(q, k, v, beta, log_decay, state, scale)
    if q.shape[1] == 1:
        return _step(q, k, v, beta, log_decay, state, scale)
    return _chunked(q, k, v, beta, log_decay, state, scale)


def _step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    state: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """One token: read what the key holds, write the difference, read out."""
    batch, _, heads, key_width = q.shape
    value_width = v.shape[-1]
    dtype = accumulator(q, k, v, beta, log_decay, state)
    n = batch * heads
    key = k.to(dtype).reshape(n, 1, key_width)
    query = q.to(dtype).reshape(n, 1, key_width)
    write = v.to(dtype).reshape(n, 1, value_width)
    if state is None:
        old = key.new_zeros(n, key_width, value_width)
    else:
        old = state.to(dtype)
        if log_decay is not None:
            old = old * log_decay.to(dtype).exp().view(batch, heads, -1, 1)
        old = old.reshape(n, key_width, value_width)
    write = torch.baddbmm(write, key, old, alpha=-1) * beta.to(dtype).reshape(n, 1, 1)
    new = torch.baddbmm(old, key.mT, write)
    o = torch.bmm(query, new) * scale
    return (
        o.view(batch, 1, heads, value_width).to(v.dtype),
        new.view(batch, heads, key_width, value_width),
    )


def _chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    state: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The WY form (arXiv 2406.06484, section 3; with decay 2412.06464, section 3.3).

    Inside a chunk the writes u_i = beta_i (v_i - exp(G_i) S^T k_i - sum_{j<i} exp(G_i - G_j)
    (k_i . k_j) u_j) solve a unit triangular system, whose right-hand side is linear in S, the state
    before the chunk: u = U - W S. What is left is the plain recurrence with u in place of v.
    """
    tokens, out_dtype = q.shape[1], v.dtype
    dtype = accumulator(q, k, v, beta, log_decay, state)
    cut = Cut.of(tokens, CHUNK)
    q, k, v = cut(q.to(dtype) * scale), cut(k.to(dtype)), cut(v.to(dtype))
    strength = cut(beta.to(dtype).unsqueeze(-1))
    weighted = k * strength
    if log_decay is None:
        scores, overlap = (q @ k.mT).tril(), weighted @ k.mT
        read, ending, kept = q, k, None
        erase = weighted
    else:
        total = prefix_sums(log_decay, cut)
        if log_decay.ndim == 4:
            near = prefix_sums(log_decay.clamp_min(FORGOTTEN), cut)
            scores, overlap = (vector_scores(t, k, near) for t in (q, weighted))
        else:
            between = causal_exp(total, dtype)
            scores, overlap = q @ k.mT * between, weighted @ k.mT * between
        since_start = total.to(dtype).exp()
        end = total[..., -1:, :]
        read, erase = q * since_start, weighted * since_start
        ending = k * (end - total).to(dtype).exp()
        kept = end.to(dtype).exp()
    sides = torch.cat((v * strength, erase), dim=-1)
    # The solver reads only what is below the diagonal and takes the diagonal for ones.
    solved = torch.linalg.solve_triangular(overlap, sides, upper=False, unitriangular=True)
    values, erase = solved.split((v.shape[-1], k.shape[-1]), dim=-1)
    before, final = _carry(ending.mT, values, erase, kept, state)
    o = scores @ (values if before is None else values - erase @ before)
    if before is not None:
        o = o + read @ before
    return cut.join(o).to(out_dtype), final


def _carry(
    ending: Tensor, values: Tensor, erase: Tensor, kept: Tensor | None, state: Tensor | None
) -> tuple[Tensor | None, Tensor]:
    """The states before each chunk (None where the only one is zero) and after the last.

    S' = exp(G_C) S + E^T (U - W S), E the keys decayed to the chunk's end: one product per chunk,
    with the matrix exp(G_C) I - E^T W made for all chunks at once.
    """
    pair = values.shape[:2]
    written = (ending @ values).flatten(0, 1)
    if state is None and written.shape[1] == 1:
        return None, written[:, 0].view(*pair, *written.shape[2:])
    turn = (ending @ erase).flatten(0, 1)
    eye = torch.eye(turn.shape[-1], dtype=turn.dtype, device=turn.device)
    turn = (eye if kept is None else eye * kept.flatten(0, 1)) - turn
    now = torch.zeros_like(written[:, 0]) if state is None else state.to(turn.dtype).flatten(0, 1)
    before = []
    for matrix, step in zip(turn.unbind(1), written.unbind(1), strict=True):
        before.append(now)
        now = torch.baddbmm(step, matrix, now)
    states = torch.stack(before, dim=1)
    return states.view(*pair, *states.shape[1:]), now.view(*pair, *now.shape[1:])
