"""Triton kernels of the diagonal scan.

A program walks over the tokens of some channels, a tile of tokens at a time: inside the tile an
associative scan of (a, b) with (a, b) o (a', b') = (a a', a' b + b'), from tile to tile the state.
Every element is read and written once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .autotune import tuned
from .triton_common import check_device, common_dtype, full_tile, on_device_of

OP = "diagonal_scan"


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


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, log_a: Tensor, b: Tensor, start: Tensor | None) -> tuple[Tensor, Tensor]:
        batch, tokens, width = b.shape
        h = torch.empty(b.shape, dtype=b.dtype, device=b.device)
        last = torch.empty((batch, width), dtype=torch.float32, device=b.device)

        def run(config: dict[str, int]) -> None:
            _forward[(batch, triton.cdiv(width, config["TILE_D"]))](
                log_a, b, start, h, last, tokens, width, START=start is not None, **config
            )

        _launch(_forward, b, start, run)
        ctx.save_for_backward(log_a, h, start)
        return h, last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh: Tensor, dlast: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        log_a, h, start = ctx.saved_tensors
        batch, tokens, width = h.shape
        dlog_a = torch.empty(log_a.shape, dtype=log_a.dtype, device=h.device)
        db = torch.empty(h.shape, dtype=h.dtype, device=h.device)
        dstart = torch.empty((batch, width), dtype=torch.float32, device=h.device)
        dh, dlast = dh.contiguous(), dlast.contiguous()

        def run(config: dict[str, int]) -> None:
            _backward[(batch, triton.cdiv(width, config["TILE_D"]))](
                log_a, h, start, dh, dlast, dlog_a, db, dstart, tokens, width,
                START=start is not None, **config,
            )  # fmt: skip

        _launch(_backward, h, start, run)
        return dlog_a, db, None if start is None else dstart


def _launch(kernel: Any, x: Tensor, start: Tensor | None, run: Callable[..., None]) -> None:
    """One program per sequence and tile of the channels of x (B, T, D)."""
    batch, tokens, width = x.shape
    with on_device_of(x):
        tuned(
            OP, kernel, x, run, limits=(full_tile(tokens), full_tile(width)),
            sizes=(batch, tokens, width), exact=(kernel.__name__, start is not None),
        )  # fmt: skip


@triton.jit
@no_type_check
def _combine(a, b, a_, b_):
    return a * a_, a_ * b + b_


@triton.jit
@no_type_check
def _forward(
    log_a_ptr, b_ptr, start_ptr, h_ptr, last_ptr, T, D,
    TILE_T: tl.constexpr, TILE_D: tl.constexpr, START: tl.constexpr,
):  # fmt: skip
    sequence = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * TILE_D + tl.arange(0, TILE_D)
    place = tl.arange(0, TILE_T)
    now = tl.zeros((TILE_D,), dtype=tl.float32)
    if START:
        now = tl.load(start_ptr + sequence * D + column, mask=column < D, other=0.0)
    for n in range(tl.cdiv(T, TILE_T)):
        t = n * TILE_T + place
        spot = (sequence * T + t)[:, None] * D + column[None, :]
        inside = (t[:, None] < T) & (column[None, :] < D)
        # Past the end a decay of 1 and nothing to add: the last row of the tile is the state.
        a = tl.exp(tl.load(log_a_ptr + spot, mask=inside, other=0.0).to(tl.float32))
        b = tl.load(b_ptr + spot, mask=inside, other=0.0).to(tl.float32)
        kept, h = tl.associative_scan((a, b), 0, _combine)
        h = h + kept * now[None, :]
        tl.store(h_ptr + spot, h.to(h_ptr.dtype.element_ty), mask=inside)
        now = tl.sum(tl.where(place[:, None] == TILE_T - 1, h, 0.0), axis=0)
    tl.store(last_ptr + sequence * D + column, now, mask=column < D)


@triton.jit
@no_type_check
def _backward(
    log_a_ptr, h_ptr, start_ptr, dh_ptr, dlast_ptr, dlog_a_ptr, db_ptr, dstart_ptr, T, D,
    TILE_T: tl.constexpr, TILE_D: tl.constexpr, START: tl.constexpr,
):  # fmt: skip
    """e_t = dh_t + a_{t+1} e_{t+1} from the end; db_t = e_t, dlog_a_t = e_t a_t h_{t-1}."""
    sequence = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * TILE_D + tl.arange(0, TILE_D)
    here = column[None, :] < D
    place = tl.arange(0, TILE_T)
    now = tl.load(dlast_ptr + sequence * D + column, mask=column < D, other=0.0)
    first = tl.zeros((TILE_D,), dtype=tl.float32)
    if START:
        first = tl.load(start_ptr + sequence * D + column, mask=column < D, other=0.0)
    for n in range(tl.cdiv(T, TILE_T)):
        t = T - 1 - (n * TILE_T + place)
        spot = (sequence * T + t)[:, None] * D + column[None, :]
        inside = (t[:, None] >= 0) & here
        # The final state is h_T itself, so its gradient reaches the last token undecayed.
        later = tl.load(log_a_ptr + spot + D, mask=inside & (t[:, None] < T - 1), other=0.0)
        dh = tl.load(dh_ptr + spot, mask=inside, other=0.0).to(tl.float32)
        kept, e = tl.associative_scan((tl.exp(later.to(tl.float32)), dh), 0, _combine)
        e = e + kept * now[None, :]
        now = tl.sum(tl.where(place[:, None] == TILE_T - 1, e, 0.0), axis=0)
        a = tl.exp(tl.load(log_a_ptr + spot, mask=inside, other=0.0).to(tl.float32))
        before = tl.load(h_ptr + spot - D, mask=inside & (t[:, None] > 0), other=0.0)
        before = tl.where(t[:, None] == 0, first[None, :], before.to(tl.float32))
        tl.store(db_ptr + spot, e.to(db_ptr.dtype.element_ty), mask=inside)
        tl.store(dlog_a_ptr + spot, (e * a * before).to(dlog_a_ptr.dtype.element_ty), mask=inside)
    a = tl.load(log_a_ptr + sequence * T * D + column, mask=column < D, other=0.0)
    tl.store(dstart_ptr + sequence * D + column, now * tl.exp(a.to(tl.float32)), mask=column < D)
