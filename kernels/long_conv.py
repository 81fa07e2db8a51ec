"""The long causal convolution over tokens, one filter as long as the sequence per channel.

y_t = sum_{s <= t} taps[:, t - s] u_s (Hyena, arXiv 2302.10866, equation 2).
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
"""Tokens of the pieces inside which the convolution is a product with a triangular matrix."""


@without_autocast
def long_conv(u: BTD, taps: Tensor) -> BTD:
    """The outputs, in u's dtype, for taps (D, S) with S >= T: the first meets the token itself.

    One FFT over the whole would carry rounding errors of later tokens into earlier outputs. Here
    each of the levels 64, 128, ... convolves the first half of every stretch of twice as many
    tokens by FFT and keeps what falls into the second half: T (log T)^2 operations, and no later
    token is ever touched. Raises `Unsupported` where a pinned backend does not serve the case.
    """
    if choose("long_conv", u.device) == "definition":
        return definitions.long_conv(u, taps)
    batch, tokens, width = u.shape
    dtype = accumulator(u, taps)
    taps = taps[:, :tokens].to(dtype)
    size = min(PIECE, tokens)
    pieces = -(-tokens // size)
    x = F.pad(u.to(dtype).mT, (0, pieces * size - tokens))
    near = F.pad(taps[:, :size], (size - 1, 0)).unfold(-1, size, 1).flip(-1)
    blocks = x.view(batch, width, pieces, size)
    y = torch.einsum("dij,bdpj->bdpi", near, blocks).flatten(2)[..., :tokens]
    while size < tokens:
        # Stretches whose second half holds a token.
        stretches = -(-(tokens - size) // (2 * size))
        whole = F.pad(x, (0, max(0, stretches * 2 * size - x.shape[-1])))
        whole = whole[..., : stretches * 2 * size].view(batch, width, stretches, 2 * size)
        spectrum = torch.fft.rfft(whole[..., :size], n=2 * size)
        filters = torch.fft.rfft(taps[:, : 2 * size], n=2 * size)
        # Cyclic with period 2 size: what wraps round falls into the first half.
        far = torch.fft.irfft(spectrum * filters[:, None], n=2 * size)
        far = F.pad(far[..., size:], (size, 0)).flatten(2)[..., :tokens]
        y = y + F.pad(far, (0, tokens - far.shape[-1]))
        size *= 2
    return y.mT.to(u.dtype)
