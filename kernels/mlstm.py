"""The mLSTM: a matrix state with an exponential input gate, and the sum of its keys beside it.

C_t = f_t C_{t-1} + i_t k_t v_t^T,  n_t = f_t n_{t-1} + i_t k_t,  i_t = exp(ig_t), f_t in (0, 1),
h_t = C_t^T q_t / max(|n_t^T q_t|, 1)  (arXiv 2405.04517, section 2.3).

The state is kept divided by exp(m_t), m_t = max(log f_t + m_{t-1}, ig_t), so that nothing
overflows; m is the third part of the state.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from . import definitions
from .backend import choose, without_autocast
from .definitions import LARGEST, accumulator
from .letters import BH, BTH, BTHK, BTHV
from .matrix_state import matrix_state


@without_autocast
def mlstm(
    q: BTHK,
    k: BTHK,
    v: BTHV,
    input_gate: BTH,
    log_forget: BTH,
    state: tuple[Tensor, BH] | None = None,
) -> tuple[BTHV, tuple[Tensor, BH]]:
    """The outputs (v's dtype) and the state: (C, n) as (B, H, K, V+1) and m, both over exp(m).

    `input_gate` is ig, `log_forget` is log f, at most 0. q is divided by K^(1/2). It is the matrix
    state with decays exp(log f_t + m_{t-1} - m_t) and keys scaled by exp(ig_t - m_t), neither
    above 1. The output does not depend on m, so no gradient goes through it.
    """
    scale = q.shape[-1] ** -0.5
    if choose("matrix_state", q.device, "scalar") == "definition":
        return definitions.mlstm(q, k, v, input_gate, log_forget, state, scale)
    dtype = accumulator(q, k, v, input_gate, log_forget, None if state is None else state[0])
    matrix, start = (None, None) if state is None else state
    m, before = maxima(input_gate, log_forget, start)
    log_decay = (log_forget.double() + before - m).to(dtype)
    strength = (input_gate.double() - m).exp().to(dtype)
    columns = F.pad(v.to(dtype), (0, 1), value=1.0) * strength[..., None]
    o, matrix = matrix_state(q, k, columns, log_decay, matrix, scale=scale)
    floor = (-m).clamp_max(LARGEST).exp().to(dtype)[..., None]
    h = o[..., :-1] / torch.maximum(o[..., -1:].abs(), floor)
    return h.to(v.dtype), (matrix, m[:, -1].to(dtype))


@torch.no_grad()
def maxima(input_gate: Tensor, log_forget: Tensor, start: Tensor | None) -> tuple[Tensor, Tensor]:
    """m of all tokens and of the tokens before them, (B, T, H), in float64; m_0 is `start` or 0.

    m_t = F_t + max(m_0, max_{j<=t} ig_j - F_j), with F the prefix sums of log f.
    """
    total = log_forget.double().cumsum(1)
    first = torch.zeros_like(total[:, 0]) if start is None else start.double()
    best = torch.cummax(input_gate.double() - total, 1).values
    m = total + torch.maximum(best, first[:, None])
    return m, torch.cat((first[:, None], m[:, :-1]), 1)
