"""The matrix-state recurrence that reads before it writes, with a bonus for the token itself.

o_t = scale * (S_{t-1} + Diag(u) k_t v_t^T)^T q_t,  S_t = Diag(exp g_t) S_{t-1} + k_t v_t^T.

RWKV-5 and RWKV-6 (arXiv 2404.05892): the decay of a token does not touch its own read-out.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from . import definitions
from .backend import STEP_TOKENS, choose, kernels, without_autocast
from .definitions import accumulator
from .letters import BHKV, BTH, BTHK, BTHV, HK, H
from .matrix_state import decay_form, matrix_state


@without_autocast
def matrix_state_preread(
    q: BTHK,
    k: BTHK,
    v: BTHV,
    bonus: HK,
    log_decay: H | BTH | BTHK | None = None,
    state: BHKV | None = None,
    *,
    scale: float | None = None,
) -> tuple[BTHV, BHKV]:
    """As `matrix_state`, reading the state before the token's own write; `bonus` is u."""
    if scale is None:
        scale = q.shape[-1] ** -0.5
    form = decay_form(log_decay)
    width = max(q.shape[-1], v.shape[-1])
    case = "preread" if form == "vector" else form
    backend = choose("matrix_state", q.device, case, width=width, dtype=v.dtype)
    if backend == "definition":
        return definitions.matrix_state_preread(q, k, v, bonus, log_decay, state, scale)
    if backend == "triton" and (form == "vector" or q.shape[1] <= STEP_TOKENS):
        run = kernels("matrix_state", "matrix_state_preread")
        return run(q, k, v, bonus, log_decay, state, scale)
    dtype = accumulator(q, k, v, log_decay, state)
    if q.shape[1] == 1 and state is not None:
        read, final = _step(q, k, v, log_decay, state.to(dtype))
        read = read * scale
    else:
        read, final = _shifted(q, k, v, log_decay, state, scale)
    itself = (q.to(dtype) * bonus.to(dtype) * k.to(dtype)).sum(-1, keepdim=True) * scale
    return torch.addcmul(read.to(dtype), itself, v.to(dtype)).to(v.dtype), final


def _step(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One token: a read-out and an outer product."""
    batch, _, heads, key_width = q.shape
    value_width, n, dtype = v.shape[-1], batch * heads, state.dtype
    o = torch.bmm(q.to(dtype).reshape(n, 1, key_width), state.reshape(n, key_width, value_width))
    if log_decay is not None:
        kept = log_decay.to(dtype).exp()
        if kept.ndim < 4:  # (H,) or (B, 1, H): the same for every key channel
            kept = kept[..., None]
        state = state * (kept if kept.ndim == 2 else kept[:, 0])[..., None]
    final = torch.baddbmm(
        state.reshape(n, key_width, value_width),
        k.to(dtype).reshape(n, key_width, 1),
        v.to(dtype).reshape(n, 1, value_width),
    )
    return o.view(batch, 1, heads, value_width), final.view_as(state)


def _shifted(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    state: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The plain recurrence over T+1 tokens with keys, values and decays one token late.

    Its state at token t is then the one before the write of t, and its last state is S_T.
    """
    if log_decay is not None and log_decay.ndim == 1:
        log_decay = log_decay.expand(*q.shape[:3])
    late_k, late_v = F.pad(k, (0, 0, 0, 0, 1, 0)), F.pad(v, (0, 0, 0, 0, 1, 0))
    late_decay = None
    if log_decay is not None:
        late_decay = F.pad(log_decay, (0, 0) * (log_decay.ndim - 2) + (1, 0))
    early_q = F.pad(q, (0, 0, 0, 0, 0, 1))
    o, final = matrix_state(early_q, late_k, late_v, late_decay, state, scale=scale)
    return o[:, :-1], final
