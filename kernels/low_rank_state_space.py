"""Time-invariant state spaces whose matrix is diagonal plus low rank: S4 (arXiv 2111.00396).

x_t = Abar x_{t-1} + Bbar u_t, y_t = C x_t per channel, with A = Diag(a) - p p^* of the bilinear
discretisation Abar = (1 - A)^-1 (1 + A), Bbar = (1 - A)^-1 b: `a`, `p` and `b` already hold the
half step size. States come in conjugate pairs, of which `a`, `p`, `b`, `c` and the state hold one
each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import definitions
from .backend import choose, without_autocast
from .definitions import accumulator
from .letters import BTD
from .time_invariant import PIECE, Response, in_pieces


@without_autocast
def low_rank_state_space(
    u: BTD, a: Tensor, p: Tensor, b: Tensor, c: Tensor, state: Tensor | None = None
) -> tuple[BTD, Tensor]:
    """The outputs (u's dtype) and the state, (B, D, N, 2) with real and imaginary parts.

    `a` (real part below 0), `p`, `b` and `c` are complex128 of shape (D, N); `state` continues a
    sequence (None: zeros). One token is the recurrence, O(N) per channel; more are convolutions
    over pieces of the sequence. Raises `Unsupported` where a pinned backend does not serve the
    case.
    """
    if choose("diagonal_scan", u.device) == "definition":
        return definitions.low_rank_state_space(u, a, p, b, c, state)
    dtype = accumulator(u, state)
    wide = dtype.to_complex()
    shape = (u.shape[0], *a.shape, 2)
    if u.shape[1] == 1:
        now = u.new_zeros(shape, dtype=dtype) if state is None else state.to(dtype).contiguous()
        added = b.to(wide) * u[:, 0, :, None].to(dtype)
        x = _step(torch.view_as_complex(now), a, p, added)
        y = 2 * (c.to(wide) * x).sum(-1).real
        return y[:, None].to(u.dtype), torch.view_as_real(x.contiguous())
    held = None if state is None else state.to(dtype).contiguous().flatten(2)
    y, last = in_pieces(u.to(dtype), _response(a, p, b, c, min(PIECE, u.shape[1]), dtype), held)
    return y.to(u.dtype), last.reshape(shape)


def _step(x: Tensor, a: Tensor, p: Tensor, added: Tensor) -> Tensor:
    """(1 - A)^-1 ((1 + A) x + added) by Woodbury's identity, for x (..., D, N)."""
    fade = 1 / (1 - a)
    weight = 1 / (1 + 2 * (p.abs().square() * fade).real.sum(-1, keepdim=True))
    wide = x.dtype
    ahead, adjoint = (1 + a).to(wide), p.conj().to(wide)
    x = ahead * x - p.to(wide) * _pairs(adjoint, x) + added
    x = fade.to(wide) * x
    return x - (fade * p * weight).to(wide) * _pairs(adjoint, x)


def _pairs(row: Tensor, x: Tensor) -> Tensor:
    """The product of a row and a column over both of each pair, which is real."""
    return 2 * (row * x).real.sum(-1, keepdim=True)


def _response(
    a: Tensor, p: Tensor, b: Tensor, c: Tensor, size: int, dtype: torch.dtype
) -> Response:
    """All L powers at once, from generating functions (section 3.2 and appendix C.3).

    sum_l Abar^l z^l is the resolvent (1 - z Abar)^-1, which Woodbury's identity turns into sums of
    1 / ((1 - z) - (1 + z) a), Cauchy kernels. An inverse FFT over L points z brings back the
    powers. Where the paper's points lie on the unit circle, these lie inside it, at radius
    2^(-1/L): the resolvent stays bounded however slowly a state fades.
    """
    powers = _powers(a, p, size)
    # The sum ends before Abar^L: subtract (z Abar)^L = Abar^L / 2 from what the resolvent meets.
    column = torch.view_as_real(_step(torch.zeros_like(b), a, p, b)).flatten(1)
    row = torch.bmm(_row(c)[:, None], powers[0])[:, 0]
    last_column, last_row = column[..., None], row[:, None]
    for bit, power in enumerate(powers):
        if size >> bit & 1:
            last_column, last_row = torch.bmm(power, last_column), torch.bmm(last_row, power)
    column = column - last_column[..., 0] / 2
    row = row - last_row[:, 0] / 2

    points = torch.arange(size // 2 + 1, dtype=torch.float64, device=a.device) / size
    radius = 0.5 ** (1 / size)
    z = torch.polar(torch.full_like(points, radius), -2 * torch.pi * points)[:, None]
    both, low = torch.cat((a, a.conj()), -1)[:, None], torch.cat((p, p.conj()), -1)[:, None]
    fade = 1 / ((1 - z) - (1 + z) * both)
    spread = (1 + z) / (1 + (1 + z) * (low.abs().square() * fade).sum(-1, keepdim=True))
    back = low.conj()

    v = _complex(column)[:, None]
    meets = (1 - both) * v + low * (back * v).sum(-1, keepdim=True)
    right = fade * meets
    right = right - fade * low * spread * (back * right).sum(-1, keepdim=True)
    left = fade * _complex(row, of_row=True)[:, None]
    left = left - fade * back * spread * (left * low).sum(-1, keepdim=True)
    left = left * (1 - both) + (left * low).sum(-1, keepdim=True) * back

    shrink = radius ** -torch.arange(size, dtype=torch.float64, device=a.device)[:, None]
    states = _series(right, size) * shrink
    rows = _row(torch.view_as_complex((_series(left, size) * shrink).view(len(a), size, -1, 2)))
    kernel = (states * _row(c)[:, None]).sum(-1)
    ready = [power.to(dtype) for power in powers]

    def advance(x: Tensor, tokens: int) -> Tensor:
        for bit, power in enumerate(ready):
            if tokens >> bit & 1:
                x = torch.bmm(power, x)
        return x

    return Response(kernel.to(dtype), rows.to(dtype), states.to(dtype), advance)


def _powers(a: Tensor, p: Tensor, most: int) -> list[Tensor]:
    """Abar^1, Abar^2, Abar^4, ... up to `most`, real, (D, 2N, 2N), over real and imaginary parts.

    Abar itself is its step from each of the 2N directions.
    """
    rows = a.shape[1]
    basis = torch.eye(2 * rows, dtype=torch.float64, device=a.device)
    basis = torch.view_as_complex(basis.view(-1, rows, 2))[:, None]
    stepped = _step(basis, a, p, torch.zeros_like(a))
    powers = [torch.view_as_real(stepped.contiguous()).flatten(2).permute(1, 2, 0).contiguous()]
    while 2 ** len(powers) <= most:
        powers.append(torch.bmm(powers[-1], powers[-1]))
    return powers


def _row(c: Tensor) -> Tensor:
    """The real form of rows: what multiplies real and imaginary parts, (..., N) to (..., 2N)."""
    return torch.view_as_real(2 * c.conj().resolve_conj()).flatten(-2)


def _complex(real: Tensor, *, of_row: bool = False) -> Tensor:
    """Both of each conjugate pair, (D, 2N), from the real form (D, 2N).

    A column's real form holds its real and imaginary parts; a row's, what multiplies those.
    """
    half = torch.view_as_complex(real.view(real.shape[0], -1, 2))
    if of_row:
        half = half.conj() / 2
    return torch.cat((half, half.conj()), -1)


def _series(values: Tensor, size: int) -> Tensor:
    """Coefficients of generating functions, (D, L, 2N), real and imaginary parts side by side.

    `values`, (D, L/2 + 1, 2N), at half of the points: both parts have real coefficients.
    """
    one, other = values.chunk(2, -1)
    parts = torch.stack(((one + other) / 2, (one - other) / 2j), -1).flatten(-2)
    series: Tensor = torch.fft.irfft(parts, n=size, dim=1)
    return series.contiguous()
