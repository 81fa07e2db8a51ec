"""Triton kernels of the complex diagonal scan, real and imaginary parts as planes.

As those of the real scan (`triton_diagonal_scan`), with pairs of numbers. What is the same for all
tokens, decays or angles, is read per channel and never made a tensor of tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .autotune import kinds, tuned
from .triton_common import check_device, common_dtype, on_device_of, one_token
from .triton_diagonal_scan import WIDEST_TILE

OP = "complex_scan"


def complex_scan(
    log_a: Tensor, angle: Tensor, b: Tensor, state: Tensor | None, factor: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See `complex_scan.complex_scan`.

    Raises `Unsupported` for inputs in float64 (fixed decays and angles may be) and for tensors that
    are not on a GPU.
    """
    check_device(OP, b)
    common_dtype(OP, b, *(t for t in (log_a, angle) if t.ndim == 3))
    h, last = _Scan.apply(  # type: ignore[no-untyped-call]
        log_a.contiguous(),
        angle.contiguous(),
        b.contiguous(),
        None if state is None else state.float().contiguous(),
        None if factor is None else torch.view_as_real(factor.resolve_conj()).float().contiguous(),
    )
    return h, last


def _fixed(log_a: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    """What is the same for all tokens, as the decay (D,) and as cosine and sine (D, 2).

    Made in float64, because a long sequence multiplies the roundings.
    """
    kept, turn = log_a, angle
    if log_a.ndim == 1:
        kept = log_a.double().exp().float()
    if angle.ndim == 1:
        wide = angle.double()
        turn = torch.stack((torch.cos(wide), torch.sin(wide)), dim=-1).float()
    return kept, turn


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        log_a: Tensor,
        angle: Tensor,
        b: Tensor,
        start: Tensor | None,
        factor: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        batch, tokens, double = b.shape
        width = double // 2
        h = torch.empty(b.shape, dtype=b.dtype, device=b.device)
        last = torch.empty((batch, double), dtype=torch.float32, device=b.device)
        decay = _fixed(log_a, angle)

        def run(config: dict[str, int]) -> None:
            _forward[(batch, triton.cdiv(width, config["TILE_D"]))](
                *decay, factor, b, start, h, last, tokens, width, double,
                FIXED=log_a.ndim == 1, TURN=angle.ndim == 1, **config,
            )  # fmt: skip

        _launch(_forward, b, (log_a, angle), (start, factor), run)
        ctx.save_for_backward(log_a, angle, b, h, start, factor)
        return h, last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh: Tensor, dlast: Tensor) -> tuple[Tensor | None, ...]:
        log_a, angle, b, h, start, factor = ctx.saved_tensors
        batch, tokens, double = h.shape
        width = double // 2

        def gradient(of: Tensor) -> Tensor:
            """Of every token, or sums over the tokens of every sequence."""
            if of.ndim == 3:
                return torch.empty(of.shape, dtype=of.dtype, device=h.device)
            return torch.empty((batch, width), dtype=torch.float32, device=h.device)

        dlog_a, dangle = gradient(log_a), gradient(angle)
        db = torch.empty(h.shape, dtype=h.dtype, device=h.device)
        dstart = torch.empty((batch, double), dtype=torch.float32, device=h.device)
        dfactor = None
        if factor is not None:
            dfactor = torch.empty((batch, width, 2), dtype=torch.float32, device=h.device)
        decay, dh, dlast = _fixed(log_a, angle), dh.contiguous(), dlast.contiguous()

        def run(config: dict[str, int]) -> None:
            _backward[(batch, triton.cdiv(width, config["TILE_D"]))](
                *decay, factor, b, h, start, dh, dlast, dlog_a, dangle, dfactor, db, dstart,
                tokens, width, double, FIXED=log_a.ndim == 1, TURN=angle.ndim == 1, **config,
            )  # fmt: skip

        _launch(_backward, h, (log_a, angle), (start, factor), run)
        if log_a.ndim == 1:
            dlog_a = dlog_a.sum(dim=0).to(log_a.dtype)
        if angle.ndim == 1:
            dangle = dangle.sum(dim=0).to(angle.dtype)
        if dfactor is not None:
            dfactor = dfactor.sum(dim=0)
        return dlog_a, dangle, db, None if start is None else dstart, dfactor


def _launch(
    kernel: Any,
    x: Tensor,
    decays: tuple[Tensor, Tensor],
    given: tuple[Tensor | None, ...],
    run: Callable[..., None],
) -> None:
    """One program per sequence and tile of the channels of x (B, T, 2 D)."""
    batch, tokens, double = x.shape
    with on_device_of(x):
        tuned(
            OP, kernel, x, run, limits=(triton.next_power_of_2(tokens), WIDEST_TILE),
            sizes=(batch, tokens, double),
            exact=(kernel.__name__, *(t.ndim for t in decays), *kinds(*decays, *given)),
        )  # fmt: skip


@triton.jit
@no_type_check
def _decay(
    log_a_ptr, angle_ptr, sequence, t, T, D, column, inside,
    FIXED: tl.constexpr, TURN: tl.constexpr,
):  # fmt: skip
    """Real and imaginary parts of the decays of tokens t, (TILE_T, TILE_D); outside 1."""
    spot = (sequence * T + t)[:, None] * D + column[None, :]
    if FIXED:
        kept = tl.load(log_a_ptr + column, mask=column < D, other=0.0)[None, :]
    else:
        kept = tl.exp(tl.load(log_a_ptr + spot, mask=inside, other=0.0).to(tl.float32))
    if TURN:
        cos = tl.load(angle_ptr + 2 * column, mask=column < D, other=0.0)[None, :]
        sin = tl.load(angle_ptr + 2 * column + 1, mask=column < D, other=0.0)[None, :]
    else:
        angle = tl.load(angle_ptr + spot, mask=inside, other=0.0).to(tl.float32)
        cos = tl.cos(angle)
        sin = tl.sin(angle)
    return tl.where(inside, kept * cos, 1.0), tl.where(inside, kept * sin, 0.0)


@triton.jit
@no_type_check
def _planes(ptr, place, D, mask):
    """Real and imaginary parts in float32, the second plane D numbers after the first."""
    real = tl.load(ptr + place, mask=mask, other=0.0).to(tl.float32)
    return real, tl.load(ptr + place + D, mask=mask, other=0.0).to(tl.float32)


@triton.jit
@no_type_check
def _put(ptr, place, D, real, imag, mask):
    tl.store(ptr + place, real.to(ptr.dtype.element_ty), mask=mask)
    tl.store(ptr + place + D, imag.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
@no_type_check
def _factor(ptr, column, here):
    """The factor's real and imaginary parts, (1, TILE_D), which stand side by side."""
    real = tl.load(ptr + 2 * column, mask=here, other=0.0)[None, :]
    return real, tl.load(ptr + 2 * column + 1, mask=here, other=0.0)[None, :]


@triton.jit(do_not_specialize=["T", "D", "F"])
@no_type_check
def _forward(
    log_a_ptr, angle_ptr, factor_ptr, b_ptr, start_ptr, h_ptr, last_ptr, T, D, F,
    TILE_T: tl.constexpr, TILE_D: tl.constexpr, FIXED: tl.constexpr, TURN: tl.constexpr,
):  # fmt: skip
    sequence = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * TILE_D + tl.arange(0, TILE_D)
    here = column < D
    place = tl.arange(0, TILE_T)
    token = place[:, None]
    now = tl.zeros((TILE_D,), dtype=tl.float32)
    now_i = tl.zeros((TILE_D,), dtype=tl.float32)
    if start_ptr is not None:
        now, now_i = _planes(start_ptr, sequence * F + column, D, here)
    if factor_ptr is not None:
        f, f_i = _factor(factor_ptr, column, here)
    for n in range(tl.cdiv(T, TILE_T)):
        t = n * TILE_T + place
        inside = (t[:, None] < T) & here[None, :]
        # Past the end a decay of 1 and nothing to add keep the state.
        a, a_i = _decay(log_a_ptr, angle_ptr, sequence, t, T, D, column, inside, FIXED, TURN)
        spot = (sequence * T + t)[:, None] * F + column[None, :]
        h, h_i = _planes(b_ptr, spot, D, inside)
        if factor_ptr is not None:
            h, h_i = f * h - f_i * h_i, f * h_i + f_i * h
        for i in tl.static_range(TILE_T):
            kept = one_token(a, token, i)
            kept_i = one_token(a_i, token, i)
            new = kept * now - kept_i * now_i + one_token(h, token, i)
            now_i = kept * now_i + kept_i * now + one_token(h_i, token, i)
            now = new
            h = tl.where(token == i, now[None, :], h)
            h_i = tl.where(token == i, now_i[None, :], h_i)
        _put(h_ptr, spot, D, h, h_i, inside)
    _put(last_ptr, sequence * F + column, D, now, now_i, here)


@triton.jit(do_not_specialize=["T", "D", "F"])
@no_type_check
def _backward(
    log_a_ptr, angle_ptr, factor_ptr, b_ptr, h_ptr, start_ptr, dh_ptr, dlast_ptr,
    dlog_a_ptr, dangle_ptr, dfactor_ptr, db_ptr, dstart_ptr, T, D, F,
    TILE_T: tl.constexpr, TILE_D: tl.constexpr, FIXED: tl.constexpr, TURN: tl.constexpr,
):  # fmt: skip
    """e_t = dh_t + conj(a_{t+1}) e_{t+1} from the end; with z = conj(a_t h_{t-1}) e_t,
    db_t = conj(f) e_t, df = sum_t conj(b_t) e_t, dlog_a_t = Re z, dangle_t = Im z.

    The final state is h_T itself, so its gradient reaches the last token undecayed.
    """
    sequence = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * TILE_D + tl.arange(0, TILE_D)
    here = column < D
    place = tl.arange(0, TILE_T)
    token = place[:, None]
    late, late_i = _planes(dlast_ptr, sequence * F + column, D, here)
    zeros = tl.zeros((TILE_D,), dtype=tl.float32)
    first = zeros
    first_i = zeros
    if start_ptr is not None:
        first, first_i = _planes(start_ptr, sequence * F + column, D, here)
    if factor_ptr is not None:
        f, f_i = _factor(factor_ptr, column, here)
    df = zeros
    df_i = zeros
    dlog_a = zeros
    dangle = zeros
    tiles = tl.cdiv(T, TILE_T)
    for n in range(tiles):
        t = (tiles - 1 - n) * TILE_T + place
        inside = (t[:, None] < T) & here[None, :]
        a, a_i = _decay(log_a_ptr, angle_ptr, sequence, t, T, D, column, inside, FIXED, TURN)
        spot = (sequence * T + t)[:, None] * F + column[None, :]
        e, e_i = _planes(dh_ptr, spot, D, inside)
        for i in tl.static_range(TILE_T):
            late += one_token(e, token, TILE_T - 1 - i)
            late_i += one_token(e_i, token, TILE_T - 1 - i)
            e = tl.where(token == TILE_T - 1 - i, late[None, :], e)
            e_i = tl.where(token == TILE_T - 1 - i, late_i[None, :], e_i)
            kept = one_token(a, token, TILE_T - 1 - i)
            kept_i = one_token(a_i, token, TILE_T - 1 - i)
            new = kept * late + kept_i * late_i
            late_i = kept * late_i - kept_i * late
            late = new
        h, h_i = _planes(h_ptr, spot - F, D, inside & (t[:, None] > 0))
        h = tl.where(t[:, None] == 0, first[None, :], h)
        h_i = tl.where(t[:, None] == 0, first_i[None, :], h_i)
        h, h_i = a * h - a_i * h_i, a * h_i + a_i * h
        z = tl.where(inside, h * e + h_i * e_i, 0.0)
        z_i = tl.where(inside, h * e_i - h_i * e, 0.0)
        own = (sequence * T + t)[:, None] * D + column[None, :]
        if FIXED:
            dlog_a += tl.sum(z, axis=0)
        else:
            tl.store(dlog_a_ptr + own, z.to(dlog_a_ptr.dtype.element_ty), mask=inside)
        if TURN:
            dangle += tl.sum(z_i, axis=0)
        else:
            tl.store(dangle_ptr + own, z_i.to(dangle_ptr.dtype.element_ty), mask=inside)
        if factor_ptr is not None:
            b, b_i = _planes(b_ptr, spot, D, inside)
            df += tl.sum(b * e + b_i * e_i, axis=0)
            df_i += tl.sum(b * e_i - b_i * e, axis=0)
            e, e_i = f * e + f_i * e_i, f * e_i - f_i * e
        _put(db_ptr, spot, D, e, e_i, inside)
    if FIXED:
        tl.store(dlog_a_ptr + sequence * D + column, dlog_a, mask=here)
    if TURN:
        tl.store(dangle_ptr + sequence * D + column, dangle, mask=here)
    if factor_ptr is not None:
        tl.store(dfactor_ptr + (sequence * D + column) * 2, df, mask=here)
        tl.store(dfactor_ptr + (sequence * D + column) * 2 + 1, df_i, mask=here)
    _put(dstart_ptr, sequence * F + column, D, late, late_i, here)
