"""The complex diagonal recurrence: h_t = exp(log_a_t + i angle_t) h_{t-1} + f b_t, per channel.

The core of HGRN (arXiv 2311.04823), S5 (2208.04933) and the LRU (2303.06349). Complex numbers are
planes: the real parts of all channels, then the imaginary ones, F = 2 D numbers side by side.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import definitions
from .backend import choose, kernels, without_autocast
from .definitions import accumulator
from .diagonal_scan import diagonal_scan
from .letters import BF, BTD, BTF, D


@without_autocast
def complex_scan(
    log_a: D | BTD,
    angle: D | BTD,
    b: BTF,
    state: BF | None = None,
    factor: Tensor | None = None,
) -> tuple[BTF, BF]:
    """The states of all tokens (b's dtype) and the last one (float32 at least).

    `log_a`, at most 0, and `angle`, in radians, are the logarithm of the decay, of every token or
    the same for all (in float64 a phase keeps its digits over many tokens); `factor`, complex (D,),
    multiplies what is written (None: 1); `state` continues a sequence (None: zeros). Raises
    `Unsupported` where a pinned backend does not serve the case.
    """
    backend = choose("complex_scan", b.device, dtype=b.dtype)
    if backend == "definition":
        return definitions.complex_scan(log_a, angle, b, state, factor)
    if backend == "triton":
        return kernels("complex_scan")(log_a, angle, b, state, factor)
    dtype = accumulator(b, state)
    cos, sin = _turned(angle, b.shape[1])
    # f and the turning back, one complex product. exp(-i turned) h decays without turning: two real
    # recurrences.
    if factor is None:
        cut, slant = cos, -sin
    else:
        cut = factor.real * cos + factor.imag * sin
        slant = factor.imag * cos - factor.real * sin
    cut, slant, cos, sin = (t.to(dtype) for t in (cut, slant, cos, sin))
    real, imag = b.to(dtype).chunk(2, dim=-1)
    still = torch.cat((real * cut - imag * slant, imag * cut + real * slant), -1)
    h, _ = diagonal_scan(torch.cat((log_a, log_a), -1).to(dtype), still, state)
    real, imag = h.chunk(2, dim=-1)
    h = torch.cat((real * cos - imag * sin, imag * cos + real * sin), -1)
    return h.to(b.dtype), h[:, -1]


def _turned(angle: D | BTD, tokens: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the sum of the angles up to every token, in float64."""
    if angle.ndim == 3:
        total = angle.double().cumsum(1)
    else:
        steps = torch.arange(1, tokens + 1, dtype=torch.float64, device=angle.device)
        total = steps[:, None] * angle.double()
    return torch.cos(total), torch.sin(total)
