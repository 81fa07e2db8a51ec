"""Time-invariant diagonal state spaces: a sum of N fading oscillations per channel.

x_t[d, n] = exp(a[d, n]) x_{t-1}[d, n] + u_t[d],  y_t[d] = 2 Re sum_n c[d, n] x_t[d, n], a and c
complex: each n stands for a pair of conjugate states. S4D (arXiv 2206.11893), in its convolutional
form over pieces of the sequence and its recurrent form between them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from . import definitions
from .backend import choose, without_autocast
from .definitions import accumulator
from .letters import BTD

PIECE = 64
"""Tokens of one convolution, a product with a triangular matrix per channel. An FFT would carry
rounding errors of later tokens into earlier ones."""


@without_autocast
def time_invariant(u: BTD, a: Tensor, c: Tensor, state: Tensor | None = None) -> tuple[BTD, Tensor]:
    """The outputs (u's dtype) and the state, (B, D, N, 2) with real and imaginary parts.

    `a` (real part at most 0) and `c` are complex128 of shape (D, N): phases of many tokens lose
    their digits in less. `state` continues a sequence (None: zeros). Raises `Unsupported` where a
    pinned backend does not serve the case.
    """
    if choose("diagonal_scan", u.device) == "definition":
        return definitions.time_invariant(u, a, c, state)
    dtype = accumulator(u, state)
    wide = torch.complex128 if dtype == torch.float64 else torch.complex64
    x = None if state is None else torch.view_as_complex(state.to(dtype).contiguous())
    size = min(PIECE, u.shape[1])
    # exp(a l) for l = 0..size
    powers = torch.arange(size + 1, dtype=torch.float64, device=u.device)
    fading = torch.exp(a[..., None] * powers)
    kernel = 2 * (c[..., None] * fading[..., :-1]).sum(1).real.to(dtype)
    causal = F.pad(kernel, (size - 1, 0)).unfold(-1, size, 1).flip(-1)
    held = (c[..., None] * fading[..., 1:]).to(wide)
    fading = fading.to(wide)
    outputs = []
    for piece in torch.split(u.to(dtype), size, 1):
        tokens = piece.shape[1]
        if tokens == 1:
            y = kernel[:, 0] * piece
            new = piece[:, 0, :, None].to(wide).expand(-1, -1, a.shape[1])
        else:
            y = (causal[:, :tokens, :tokens] @ piece.permute(2, 1, 0)).permute(2, 1, 0)
            ending = fading[..., :tokens].flip(-1)
            new = torch.einsum("dnt,btd->bdn", ending, piece.to(wide))
        if x is not None:
            y = y + 2 * (held[..., :tokens] * x[..., None]).sum(2).real.mT
            new = new + fading[..., tokens] * x
        x = new
        outputs.append(y)
    assert x is not None
    return torch.cat(outputs, 1).to(u.dtype), torch.view_as_real(x.contiguous())
