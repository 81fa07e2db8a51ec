"""Triton kernels of the diagonal scan.

A program walks over the tokens of some channels, a tile of tokens at a time, a thread over those of
one channel. Every element is read and written once; a decay that all tokens share is read once per
channel.
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

OP = "diagonal_scan"
WIDEST_TILE = 128
"""Of the configurations. A narrow tile is no narrower than a warp: a channel per thread."""


def diagonal_scan(log_a: Tensor, b: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """See `diagonal_scan.diagonal_scan`.

    Raises `Unsupported` for float64 and for tensors that are not on a GPU.
    """
    check_device(OP, b)
    common_dtype(OP, log_a, b)
    start = None if state is None else state.float().contiguous()
    h, last = _Scan.apply(  # type: ignore[no-untyped-call]
        log_a.contiguous(), b.contiguous(), start
    )
    return h, last


def _fixed(log_a: Tensor) -> Tensor:
    """A decay that all tokens share, made in float64: a long sequence multiplies its rounding."""
    return log_a.double().exp().float() if log_a.ndim == 1 else log_a


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, log_a: Tensor, b: Tensor, start: Tensor | None) -> tuple[Tensor, Tensor]:
        batch, tokens, width = b.shape
        h = torch.empty(b.shape, dtype=b.dtype, device=b.device)
        last = torch.empty((batch, width), dtype=torch.float32, device=b.device)
        decay = _fixed(log_a)

        def run(config: dict[str, int]) -> None:
            _forward[(batch, triton.cdiv(width, config["TILE_D"]))](
                decay, b, start, h, last, tokens, width, FIXED=log_a.ndim == 1, **config
            )

        _launch(_forward, b, log_a, start, run)
        ctx.save_for_backward(log_a, h, start)
        return h, last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh: Tensor, dlast: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        log_a, h, start = ctx.saved_tensors
        batch, tokens, width = h.shape
        if log_a.ndim == 1:
            dlog_a = torch.empty((batch, width), dtype=torch.float32, device=h.device)
        else:
            dlog_a = torch.empty(log_a.shape, dtype=log_a.dtype, device=h.device)
        db = torch.empty(h.shape, dtype=h.dtype, device=h.device)
        dstart = torch.empty((batch, width), dtype=torch.float32, device=h.device)
        decay, dh, dlast = _fixed(log_a), dh.contiguous(), dlast.contiguous()

        def run(config: dict[str, int]) -> None:
            _backward[(batch, triton.cdiv(width, config["TILE_D"]))](
                decay, h, start, dh, dlast, dlog_a, db, dstart, tokens, width,
                FIXED=log_a.ndim == 1, **config,
            )  # fmt: skip

        _launch(_backward, h, log_a, start, run)
        if log_a.ndim == 1:
            dlog_a = dlog_a.sum(dim=0).to(log_a.dtype)
        return dlog_a, db, None if start is None else dstart


def _launch(
    kernel: Any, x: Tensor, log_a: Tensor, start: Tensor | None, run: Callable[..., None]
) -> None:
    """One program per sequence and tile of the channels of x (B, T, D).

    The tile of a step is as short as it is, so that it moves its state and little else.
    """
    batch, tokens, width = x.shape
    with on_device_of(x):
        tuned(
            OP, kernel, x, run, limits=(triton.next_power_of_2(tokens), WIDEST_TILE),
            sizes=(batch, tokens, width),
            exact=(kernel.__name__, log_a.ndim, *kinds(log_a, start)),
        )  # fmt: skip


@triton.jit
@no_type_check
def _decay(log_a_ptr, spot, column, D, inside, FIXED: tl.constexpr):
    """exp(log_a), (TILE_T, TILE_D), or the decay of all tokens; outside the mask 1."""
    if FIXED:
        kept = tl.load(log_a_ptr + column, mask=column < D, other=1.0)
        return tl.where(inside, kept[None, :], 1.0)
    return tl.exp(tl.load(log_a_ptr + spot, mask=inside, other=0.0).to(tl.float32))


@triton.jit(do_not_specialize=["T", "D"])
@no_type_check
def _forward(
    log_a_ptr, b_ptr, start_ptr, h_ptr, last_ptr, T, D,
    TILE_T: tl.constexpr, TILE_D: tl.constexpr, FIXED: tl.constexpr,
):  # fmt: skip
    sequence = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * TILE_D + tl.arange(0, TILE_D)
    here = column < D
    place = tl.arange(0, TILE_T)
    token = place[:, None]
    now = tl.zeros((TILE_D,), dtype=tl.float32)
    if start_ptr is not None:
        now = tl.load(start_ptr + sequence * D + column, mask=here, other=0.0)
    for n in range(tl.cdiv(T, TILE_T)):
        t = n * TILE_T + place
        spot = (sequence * T + t)[:, None] * D + column[None, :]
        inside = (t[:, None] < T) & here[None, :]
        # Past the end a decay of 1 and nothing to add keep the state.
        a = _decay(log_a_ptr, spot, column, D, inside, FIXED)
        b = tl.load(b_ptr + spot, mask=inside, other=0.0).to(tl.float32)
        h = b
        for i in tl.static_range(TILE_T):
            now = one_token(a, token, i) * now + one_token(b, token, i)
            h = tl.where(token == i, now[None, :], h)
        tl.store(h_ptr + spot, h.to(h_ptr.dtype.element_ty), mask=inside)
    tl.store(last_ptr + sequence * D + column, now, mask=here)


@triton.jit(do_not_specialize=["T", "D"])
@no_type_check
def _backward(
    log_a_ptr, h_ptr, start_ptr, dh_ptr, dlast_ptr, dlog_a_ptr, db_ptr, dstart_ptr, T, D,
    TILE_T: tl.constexpr, TILE_D: tl.constexpr, FIXED: tl.constexpr,
):  # fmt: skip
    """e_t = dh_t + a_{t+1} e_{t+1} from the end; db_t = e_t, dlog_a_t = e_t a_t h_{t-1}.

    The final state is h_T itself, so its gradient reaches the last token undecayed.
    """
    sequence = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * TILE_D + tl.arange(0, TILE_D)
    here = column < D
    place = tl.arange(0, TILE_T)
    token = place[:, None]
    late = tl.load(dlast_ptr + sequence * D + column, mask=here, other=0.0)
    total = tl.zeros((TILE_D,), dtype=tl.float32)
    first = tl.zeros((TILE_D,), dtype=tl.float32)
    if start_ptr is not None:
        first = tl.load(start_ptr + sequence * D + column, mask=here, other=0.0)
    tiles = tl.cdiv(T, TILE_T)
    for n in range(tiles):
        t = (tiles - 1 - n) * TILE_T + place
        spot = (sequence * T + t)[:, None] * D + column[None, :]
        inside = (t[:, None] < T) & here[None, :]
        a = _decay(log_a_ptr, spot, column, D, inside, FIXED)
        e = tl.load(dh_ptr + spot, mask=inside, other=0.0).to(tl.float32)
        for i in tl.static_range(TILE_T):
            late += one_token(e, token, TILE_T - 1 - i)
            e = tl.where(token == TILE_T - 1 - i, late[None, :], e)
            late = late * one_token(a, token, TILE_T - 1 - i)
        before = tl.load(h_ptr + spot - D, mask=inside & (t[:, None] > 0), other=0.0)
        before = tl.where(t[:, None] == 0, first[None, :], before.to(tl.float32))
        tl.store(db_ptr + spot, e.to(db_ptr.dtype.element_ty), mask=inside)
        dlog_a = e * a * before
        if FIXED:
            total += tl.sum(tl.where(inside, dlog_a, 0.0), axis=0)
        else:
            tl.store(dlog_a_ptr + spot, dlog_a.to(dlog_a_ptr.dtype.element_ty), mask=inside)
    if FIXED:
        tl.store(dlog_a_ptr + sequence * D + column, total, mask=here)
    tl.store(dstart_ptr + sequence * D + column, late, mask=here)
