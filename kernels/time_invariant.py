"""Time-invariant diagonal state spaces: a sum of N fading averages or oscillations per channel.

x_t[d, n] = exp(a[d, n]) x_{t-1}[d, n] + u_t[d]. Real: y_t[d] = sum_n c[d, n] x_t[d, n] (Mega's
moving average, arXiv 2209.10655). Complex: y_t[d] = 2 Re sum_n c[d, n] x_t[d, n], each n standing
for a pair of conjugate states (S4D, 2206.11893). In the convolutional form inside pieces of the
sequence and the recurrent form between them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from . import definitions
from .backend import choose, without_autocast
from .definitions import accumulator
from .letters import BTD

PIECE = 64
"""Tokens of one convolution, a product with a triangular matrix per channel. An FFT over the whole
sequence would carry rounding errors of later tokens into earlier ones."""


@dataclass(frozen=True)
class Response:
    """What L tokens of a system with M real numbers of state per channel do."""

    kernel: Tensor
    """(D, L): the output l tokens after an input of 1."""
    held: Tensor
    """(D, L, M): what the state before the first token adds to the output of each."""
    left: Tensor
    """(D, L, M): the state l tokens after an input of 1."""
    advance: Callable[[Tensor, int], Tensor]
    """The state, (D, M, B), after so many tokens (at most L) without input."""


@without_autocast
def time_invariant(u: BTD, a: Tensor, c: Tensor, state: Tensor | None = None) -> tuple[BTD, Tensor]:
    """The outputs (u's dtype) and the state, float32 at least: (B, D, N), and for complex `a` (B,
    D, N, 2) with real and imaginary parts.

    `a` (real part at most 0) and `c` are complex128 or float64 of shape (D, N): phases of many
    tokens lose their digits in less. `state` continues a sequence (None: zeros). Raises
    `Unsupported` where a pinned backend does not serve the case.
    """
    if choose("diagonal_scan", u.device) == "definition":
        return definitions.time_invariant(u, a, c, state)
    dtype = accumulator(u, state)
    shape = (u.shape[0], *a.shape, 2) if a.is_complex() else (u.shape[0], *a.shape)
    held = None if state is None else state.to(dtype).contiguous().flatten(2)
    if u.shape[1] == 1:
        held = u.new_zeros(shape, dtype=dtype).flatten(2) if held is None else held
        y, last = _token(u[:, 0].to(dtype), a, c, held)
    else:
        size = min(PIECE, u.shape[1])
        y, last = in_pieces(u.to(dtype), _response(a, c, size, dtype), held)
    return y.to(u.dtype), last.reshape(shape)


def in_pieces(u: BTD, response: Response, state: Tensor | None) -> tuple[BTD, Tensor]:
    """The outputs and the last state, (B, D, M), of pieces as long as the response.

    All pieces are convolved at once; the state is carried over them one by one.
    """
    batch, tokens, width = u.shape
    size = response.kernel.shape[1]
    causal = F.pad(response.kernel, (size - 1, 0)).unfold(-1, size, 1).flip(-1)
    now = None if state is None else state.permute(1, 2, 0)
    outputs = []
    for start, length in ((0, size), (tokens - tokens % size, tokens % size)):
        pieces = (tokens - start) // length if length else 0
        if not pieces:
            continue
        piece = u[:, start : start + pieces * length].reshape(batch, pieces, length, width)
        piece = piece.permute(3, 2, 1, 0).reshape(width, length, pieces * batch)
        y = torch.bmm(causal[:, :length, :length], piece)
        new = torch.bmm(response.left[:, :length].flip(1).mT, piece)
        before = []
        for written in new.view(width, -1, pieces, batch).unbind(2):
            now = torch.zeros_like(written) if now is None else now
            before.append(now)
            now = written + response.advance(now, length)
        if state is not None or start or pieces > 1:  # else nothing came before
            into = torch.stack(before, 2).flatten(2)
            y = torch.baddbmm(y, response.held[:, :length], into)
        y = y.view(width, length, pieces, batch).permute(3, 2, 1, 0)
        outputs.append(y.reshape(batch, pieces * length, width))
    assert now is not None
    return torch.cat(outputs, 1), now.permute(2, 0, 1).contiguous()


def _response(a: Tensor, c: Tensor, size: int, dtype: torch.dtype) -> Response:
    powers = torch.arange(size + 1, dtype=torch.float64, device=a.device)
    fading = torch.exp(a[:, None] * powers[:, None])
    kernel = _read(c[:, None] * fading[:, :-1]).sum(-1)
    held = c[:, None] * fading[:, 1:]
    if not a.is_complex():
        held, left = held.to(dtype), fading[:, :-1].to(dtype)
        decay = fading.to(dtype)[..., None]
        return Response(kernel.to(dtype), held, left, lambda x, n: decay[:, n] * x)
    held = torch.view_as_real(2 * held.conj().resolve_conj()).flatten(2).to(dtype)
    left = torch.view_as_real(fading[:, :-1]).flatten(2).to(dtype)
    real, imag = fading.real.to(dtype)[..., None], fading.imag.to(dtype)[..., None]

    def advance(x: Tensor, n: int) -> Tensor:
        x, y = x.view(x.shape[0], -1, 2, x.shape[-1]).unbind(2)
        r, i = real[:, n], imag[:, n]
        return torch.stack((r * x - i * y, r * y + i * x), 2).flatten(1, 2)

    return Response(kernel.to(dtype), held, left, advance)


def _token(u: Tensor, a: Tensor, c: Tensor, state: Tensor) -> tuple[BTD, Tensor]:
    """One token: u (B, D), the state (B, D, M)."""
    wide = u.dtype.to_complex() if a.is_complex() else u.dtype
    before = torch.view_as_complex(state.view(*u.shape, -1, 2)) if a.is_complex() else state
    x = u[..., None] + torch.exp(a).to(wide) * before
    y = _read(c.to(wide) * x).sum(-1)
    last = torch.view_as_real(x.contiguous()).flatten(2) if a.is_complex() else x
    return y[:, None], last


def _read(t: Tensor) -> Tensor:
    """A sum over pairs of conjugates where there are such pairs."""
    return 2 * t.real if t.is_complex() else t
