"""RWKV-4's average: per channel, values weighted by exp(key), fading, the token itself by a bonus.

y_t = (num_{t-1} + exp(u + k_t) v_t) / (den_{t-1} + exp(u + k_t)),
num_t = exp(g) num_{t-1} + exp(k_t) v_t, den_t = exp(g) den_{t-1} + exp(k_t)  (arXiv 2305.13048).

num and den are kept over exp(m_t), m_t = max(g + m_{t-1}, k_t), so that nothing overflows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import definitions
from .backend import choose, without_autocast
from .definitions import NOTHING, accumulator
from .diagonal_scan import diagonal_scan
from .letters import BD, BTD, D


@without_autocast
def wkv(
    k: BTD, v: BTD, log_decay: D, bonus: D, state: tuple[BD, BD, BD] | None = None
) -> tuple[BTD, tuple[BD, BD, BD]]:
    """The averages (v's dtype) and the state (num, den, m), float32 at least.

    `log_decay` is g, at most 0; `state=None` starts a sequence, as does one whose m is `NOTHING`.
    The averages do not depend on m, so no gradient goes through it.
    """
    if choose("diagonal_scan", v.device) == "definition":
        return definitions.wkv(k, v, log_decay, bonus, state)
    dtype = accumulator(k, v, log_decay, bonus, None if state is None else state[0])
    key, value = k.to(dtype), v.to(dtype)
    num, den, first = (None, None, None) if state is None else (t.to(dtype) for t in state)
    m, before = _maxima(k, log_decay, first)
    strength = torch.exp((key.double() - m).to(dtype))
    log_a = (log_decay.double() + before - m).to(dtype)
    # num and den are one scan, and so is what it starts from.
    width = k.shape[-1]
    start = None if num is None or den is None else torch.cat((num, den), -1)
    written = torch.cat((strength * value, strength), -1)
    h, last = diagonal_scan(torch.cat((log_a, log_a), -1), written, start)
    zeros = torch.zeros_like(h[:, 0]) if start is None else start
    held = torch.cat((zeros[:, None], h[:, :-1]), 1)
    own = key.double() + bonus.double()
    most = torch.maximum(before, own.detach())
    old, new = (before - most).exp().to(dtype), (own - most).exp().to(dtype)
    y = (old * held[..., :width] + new * value) / (old * held[..., width:] + new)
    return y.to(v.dtype), (last[:, :width], last[:, width:], m[:, -1].to(dtype))


@torch.no_grad()
def _maxima(k: Tensor, log_decay: Tensor, first: Tensor | None) -> tuple[Tensor, Tensor]:
    """m of all tokens and of those before them, (B, T, D), in float64.

    m_t = t g + max(m_0, max_{j<=t} k_j - j g).
    """
    steps = torch.arange(1, k.shape[1] + 1, device=k.device, dtype=torch.float64)
    total = steps[:, None] * log_decay.double()
    best = torch.cummax(k.double() - total, 1).values
    start = torch.full_like(best[:, 0], NOTHING) if first is None else first.double()
    m = total + torch.maximum(best, start[:, None])
    return m, torch.cat((start[:, None], m[:, :-1]), 1)
