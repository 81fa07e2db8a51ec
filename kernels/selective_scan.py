"""The selective scan: a diagonal state of N numbers per channel whose decays the token chooses.

h_t[d, n] = exp(dt_t[d] A[d, n]) h_{t-1}[d, n] + dt_t[d] B_t[n] x_t[d],
y_t[d] = sum_n C_t[n] h_t[d, n].

S6, the core of Mamba (arXiv 2312.00752, section 3.2).
"""

from __future__ import annotations

import torch

from . import definitions
from .backend import choose, kernels, without_autocast
from .definitions import accumulator
from .diagonal_scan import diagonal_scan
from .letters import BDN, BTD, BTN, DN

PIECE = 256
"""Tokens whose states, D N numbers each, are held at once."""


@without_autocast
def selective_scan(
    x: BTD, dt: BTD, a: DN, b: BTN, c: BTN, state: BDN | None = None
) -> tuple[BTD, BDN]:
    """The outputs (x's dtype) and the state after the last token (float32 at least).

    `dt` are the step sizes, above 0; `a` is at most 0; `state` continues a sequence (None: zeros).
    The states are those of `diagonal_scan`, over D N channels. Raises `Unsupported` where a pinned
    backend does not serve the case.
    """
    backend = choose("selective_scan", x.device, width=a.shape[1], dtype=x.dtype)
    if backend == "definition":
        return definitions.selective_scan(x, dt, a, b, c, state)
    if backend == "triton":
        return kernels("selective_scan")(x, dt, a, b, c, state)
    dtype = accumulator(x, dt, a, b, c, state)
    batch, tokens, width = x.shape
    rows = a.shape[1]
    now = None if state is None else state.to(dtype).flatten(1)
    dt, decay, c = dt.to(dtype), a.to(dtype), c.to(dtype)
    written = dt * x.to(dtype)
    outputs = []
    for start in range(0, tokens, PIECE):
        at = slice(start, min(start + PIECE, tokens))
        log_a = (dt[:, at, :, None] * decay).flatten(2)
        add = (written[:, at, :, None] * b[:, at, None, :].to(dtype)).flatten(2)
        h, now = diagonal_scan(log_a, add, now)
        h = h.reshape(-1, width, rows)
        outputs.append(torch.bmm(h, c[:, at].reshape(-1, rows, 1)).view(batch, -1, width))
    assert now is not None
    return torch.cat(outputs, 1).to(x.dtype), now.view(batch, width, rows)
