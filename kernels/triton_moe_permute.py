"""Triton kernels of the way of tokens to the rows of their experts and back.

Programs belong to tokens, in both ways: a token's row is read once and written to all of its
experts' rows, or these are read and added to one. So every row is moved once, where a gather by
rows reads a token once per expert, and sums have one order.
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
from .moe_permute import Dispatch
from .triton_common import check_device, common_dtype, full_tile, on_device_of

OP = "moe_permute"


def permute(x: Tensor, where: Dispatch) -> Tensor:
    """See `moe_permute.permute`. Raises `Unsupported` for float64 and where there is no GPU."""
    check_device(OP, x)
    common_dtype(OP, x)
    rows = where.order.numel()
    y: Tensor = _Permute.apply(x.contiguous(), where.back.contiguous(), rows)  # type: ignore[no-untyped-call]
    return y


def unpermute(y: Tensor, weights: Tensor, where: Dispatch) -> Tensor:
    """See `moe_permute.unpermute`. Raises as `permute`."""
    check_device(OP, y)
    common_dtype(OP, y, weights)
    out: Tensor = _Unpermute.apply(  # type: ignore[no-untyped-call]
        y.contiguous(), weights.contiguous(), where.back.contiguous()
    )
    return out


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, back: Tensor, rows: int) -> Tensor:
        ctx.save_for_backward(back)
        y = torch.empty((rows, x.shape[1]), dtype=x.dtype, device=x.device)
        _spread(x, back, None, None, y, None)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        (back,) = ctx.saved_tensors
        return _gather(dy.contiguous(), back, None), None, None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, weights: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(y, weights, back)
        return _gather(y, back, weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor, None]:
        y, weights, back = ctx.saved_tensors
        dy = torch.empty(y.shape, dtype=y.dtype, device=y.device)
        dweights = torch.empty(weights.shape, dtype=weights.dtype, device=y.device)
        _spread(dout.contiguous(), back, weights, y, dy, dweights)
        return dy, dweights, None


def _gather(rows: Tensor, back: Tensor, weights: Tensor | None) -> Tensor:
    """(N, D): the sum of each token's rows of (M, D), weighted or not, in float32 until the end."""
    tokens, width = back.shape[0], rows.shape[1]
    out = torch.empty((tokens, width), dtype=rows.dtype, device=rows.device)

    def run(config: dict[str, int]) -> None:
        _gather_rows[(tokens, triton.cdiv(width, config["TILE_D"]))](
            rows, weights, back, out, width, K=back.shape[1], **config
        )

    _launch(_gather_rows, rows, back, (weights,), run)
    return out


def _spread(
    x: Tensor,
    back: Tensor,
    weights: Tensor | None,
    y: Tensor | None,
    out: Tensor,
    dots: Tensor | None,
) -> None:
    """The tokens x (N, D), weighted or not, into the rows out (M, D); x . y of the pairs, (N, k).

    A pair's product needs the whole row in one program; without it tiles are programs too.
    """
    tokens, width = x.shape

    def run(config: dict[str, int]) -> None:
        tiles = 1 if dots is not None else triton.cdiv(width, config["TILE_D"])
        _spread_rows[(tokens, tiles)](
            x, weights, back, y, out, dots, width,
            K=back.shape[1], FULL_K=triton.next_power_of_2(back.shape[1]), **config,
        )  # fmt: skip

    _launch(_spread_rows, x, back, (weights, dots), run)


def _launch(
    kernel: Any,
    x: Tensor,
    back: Tensor,
    given: tuple[Tensor | None, ...],
    run: Callable[..., None],
) -> None:
    tokens, choices = back.shape
    if tokens == 0:
        return
    with on_device_of(x):
        tuned(
            OP, kernel, x, run, limits=(full_tile(x.shape[1]),), sizes=(tokens, x.shape[1]),
            exact=(kernel.__name__, choices, *kinds(*given)),
        )  # fmt: skip


@triton.jit
@no_type_check
def _gather_rows(
    rows_ptr, weights_ptr, back_ptr, out_ptr, D, K: tl.constexpr, TILE_D: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * TILE_D + tl.arange(0, TILE_D)
    total = tl.zeros((TILE_D,), dtype=tl.float32)
    for j in range(K):
        place = tl.load(back_ptr + token * K + j)
        there = (column < D) & (place >= 0)
        row = tl.load(rows_ptr + place * D + column, mask=there, other=0.0).to(tl.float32)
        if weights_ptr is not None:
            row = row * tl.load(weights_ptr + token * K + j).to(tl.float32)
        # A row that is not there adds nothing, whatever its weight.
        total += tl.where(there, row, 0.0)
    tl.store(out_ptr + token * D + column, total.to(out_ptr.dtype.element_ty), mask=column < D)


@triton.jit
@no_type_check
def _spread_rows(
    x_ptr, weights_ptr, back_ptr, y_ptr, out_ptr, dots_ptr, D,
    K: tl.constexpr, FULL_K: tl.constexpr, TILE_D: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    choice = tl.arange(0, FULL_K)
    dots = tl.zeros((FULL_K,), dtype=tl.float32)
    for n in range(tl.program_id(1), tl.cdiv(D, TILE_D), tl.num_programs(1)):
        column = n * TILE_D + tl.arange(0, TILE_D)
        x = tl.load(x_ptr + token * D + column, mask=column < D, other=0.0)
        for j in range(K):
            place = tl.load(back_ptr + token * K + j)
            there = (column < D) & (place >= 0)
            to = place * D + column
            row = x
            if weights_ptr is not None:
                row = x.to(tl.float32) * tl.load(weights_ptr + token * K + j).to(tl.float32)
            tl.store(out_ptr + to, row.to(out_ptr.dtype.element_ty), mask=there)
            if dots_ptr is not None:
                y = tl.load(y_ptr + to, mask=there, other=0.0).to(tl.float32)
                part = tl.sum(tl.where(there, x.to(tl.float32) * y, 0.0), axis=0)
                dots += tl.where(choice == j, part, 0.0)
    if dots_ptr is not None:
        to = dots_ptr + token * K + choice
        tl.store(to, dots.to(dots_ptr.dtype.element_ty), mask=choice < K)
