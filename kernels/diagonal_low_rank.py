"""The matrix state whose transition is diagonal plus low rank.

S_t = Diag(exp g_t) S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T,  o_t = scale * S_t^T q_t.

RWKV-7 (arXiv 2503.14456) with a = -kappa and b = kappa * rate; the delta rule with vector decay is
the case a = exp(g) k, b = -beta k.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import definitions
from .backend import choose, kernels, without_autocast
from .chunks import Cut, prefix_sums
from .definitions import accumulator
from .letters import BHKV, BTHK, BTHV
from .matrix_state import FORGOTTEN

CHUNK = 32


@without_autocast
def diagonal_low_rank(
    q: BTHK,
    k: BTHK,
    v: BTHV,
    a: BTHK,
    b: BTHK,
    log_decay: BTHK,
    state: BHKV | None = None,
    *,
    scale: float | None = None,
) -> tuple[BTHV, BHKV]:
    """The outputs of all tokens (v's dtype) and the state after the last (float32 at least).

    `log_decay` is g, at most 0; `a` reads the state before its decay; `state` continues a sequence
    (None: zeros); `scale=None` is K**-0.5. Raises `Unsupported` where a pinned backend does not
    serve the case.
    """
    if scale is None:
        scale = q.shape[-1] ** -0.5
    width = max(q.shape[-1], v.shape[-1])
    backend = choose("delta_rule", q.device, "diagonal-low-rank", width=width, dtype=v.dtype)
    if backend == "definition":
        return definitions.diagonal_low_rank(q, k, v, a, b, log_decay, state, scale)
    if backend == "triton":
        run = kernels("low_rank", "diagonal_low_rank")
        return run(q, k, v, a, b, log_decay, state, scale)
    if q.shape[1] == 1 and state is not None:
        return _step(q, k, v, a, b, log_decay, state, scale)
    return _chunked(q, k, v, a, b, log_decay, state, scale)


def _step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    log_decay: Tensor,
    state: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """One token: read under a, write under b and k, read out."""
    batch, _, heads, width = q.shape
    dtype = accumulator(q, k, v, a, b, log_decay, state)
    n = batch * heads

    def row(t: Tensor) -> Tensor:
        return t.to(dtype).reshape(n, 1, -1)

    old = state.to(dtype).reshape(n, width, -1)
    writes = torch.cat((torch.bmm(row(a), old), row(v)), 1)
    under = torch.cat((row(b), row(k)), 1).mT
    new = torch.baddbmm(old * row(log_decay).exp().mT, under, writes)
    o = torch.bmm(row(q), new) * scale
    return o.view(batch, 1, heads, -1).to(v.dtype), new.view(batch, heads, width, -1)


def _chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    log_decay: Tensor,
    state: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The WY form. Inside a chunk, with G the sums of g since its start, what a token reads is

    u_i = S^T (exp(G_{i-1}) a_i) + sum_{j<i} (a_i exp(G_{i-1} - G_j) b_j) u_j + (... k_j) v_j,

    a unit triangular system whose right-hand side is linear in S, the state before the chunk.
    """
    tokens, out_dtype = q.shape[1], v.dtype
    dtype = accumulator(q, k, v, a, b, log_decay, state)
    cut = Cut.of(tokens, CHUNK)
    q, k, v, a, b = (cut(t.to(dtype)) for t in (q * scale, k, v, a, b))
    total = prefix_sums(log_decay, cut)
    before = total - cut(log_decay.double())
    near = prefix_sums(log_decay.clamp_min(FORGOTTEN), cut)
    near_before = near - cut(log_decay.double().clamp_min(FORGOTTEN))
    # exp(G_i - G_j) as two factors around the middle of the chunk; 32 tokens of at least FORGOTTEN
    # keep both in float64's range.
    middle = near[..., near.shape[-2] // 2, :].unsqueeze(-2)
    right = (torch.cat((b, k), -2).double() * (middle - torch.cat((near, near), -2)).exp()).mT
    size = near.shape[-2]
    from_q = (q.double() * (near - middle).exp()) @ right
    from_a = (a.double() * (near_before - middle).exp()) @ right
    q_b, q_k = (t.tril().to(dtype) for t in torch.split(from_q, size, -1))
    a_b, a_k = (t.tril(-1).to(dtype) for t in torch.split(from_a, size, -1))
    sides = torch.cat((a_k @ v, a * before.to(dtype).exp()), -1)
    solved = torch.linalg.solve_triangular(-a_b, sides, upper=False, unitriangular=True)
    reads, through = solved.split((v.shape[-1], a.shape[-1]), -1)

    to_end = (total[..., -1:, :] - total).to(dtype).exp()
    late_b, late_k = (b * to_end).mT, (k * to_end).mT
    written = late_b @ reads + late_k @ v
    kept = total[..., -1, :].to(dtype).exp()
    turn = torch.diag_embed(kept) + late_b @ through
    now = torch.zeros_like(written[:, :, 0]) if state is None else state.to(dtype)
    states = []
    for n in range(cut.chunks):
        states.append(now)
        now = written[:, :, n] + turn[:, :, n] @ now
    start = torch.stack(states, 2)
    reads = reads + through @ start
    o = q_b @ reads + q_k @ v + (q * total.to(dtype).exp()) @ start
    return cut.join(o).to(out_dtype), now
