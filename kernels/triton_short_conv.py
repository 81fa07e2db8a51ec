"""Triton kernels of the short causal convolution: taps, bias and activation in one pass.

A program makes a tile of tokens and channels. The W inputs of an output lie in W overlapping tiles;
the first is read from memory, the others come from the chip's caches. The backward pass makes the
slope of the activation again instead of reading it, and walks over several tiles of tokens, to sum
the gradients of the taps.
"""

from __future__ import annotations

from typing import Any, Literal, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .autotune import kinds, tuned
from .short_conv import MOST_TAPS
from .triton_common import check_device, common_dtype, full_tile, on_device_of, refuse

OP = "short_conv"
WALK = 8
"""The tiles of tokens that a program of the backward pass walks over."""


def short_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    activation: Literal["none", "silu"],
) -> tuple[Tensor, Tensor]:
    """See `short_conv.short_conv`.

    Raises `Unsupported` for float64, more than `MOST_TAPS` taps and tensors that are not on a GPU.
    """
    check_device(OP, x)
    common_dtype(OP, *(t for t in (x, weight, bias, state) if t is not None))
    if weight.shape[1] > MOST_TAPS:
        raise refuse(OP, f"W is at most {MOST_TAPS}, not {weight.shape[1]}")
    # The channels of a part of a wider projection lie side by side: it needs no copy.
    x = x if x.stride(2) == 1 else x.contiguous()
    y, last = _Conv.apply(  # type: ignore[no-untyped-call]
        x,
        weight.contiguous(),
        None if bias is None else bias.contiguous(),
        None if state is None else state.contiguous(),
        activation == "silu",
    )
    return y, last


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        state: Tensor | None,
        silu: bool,
    ) -> tuple[Tensor, Tensor]:
        batch, tokens, width = x.shape
        taps = weight.shape[1]
        y = torch.empty((batch, tokens, width), dtype=x.dtype, device=x.device)
        kept = x.dtype if state is None else state.dtype
        last = torch.empty((batch, width, taps - 1), dtype=kept, device=x.device)

        def run(config: dict[str, int]) -> None:
            tiles = triton.cdiv(tokens, config["TILE_T"])
            _forward[(batch * tiles, triton.cdiv(width, config["TILE_D"]))](
                x, weight, bias, state, y, last, tokens, width, x.stride(0), x.stride(1),
                W=taps, BIAS=bias is not None, START=state is not None, SILU=silu, **config,
            )  # fmt: skip

        with on_device_of(x):
            tuned(
                "short_conv.forward", _forward, x, run,
                limits=(full_tile(tokens), full_tile(width)), sizes=(batch, tokens, width),
                exact=(taps, silu, *kinds(weight, bias, state)),
            )  # fmt: skip
        ctx.save_for_backward(x, weight, bias, state)
        ctx.silu = silu
        return y, last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dlast: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, state = ctx.saved_tensors
        batch, tokens, width = x.shape
        taps = weight.shape[1]
        dx = torch.empty((batch, tokens, width), dtype=x.dtype, device=x.device)
        dstate = None if state is None else torch.empty_like(state)
        dy, dlast = dy.contiguous(), dlast.contiguous()

        def run(config: dict[str, int]) -> Tensor:
            walks = triton.cdiv(tokens + taps - 1, config["TILE_T"] * WALK)
            sums = torch.empty(
                (batch * walks, taps + 1, width), dtype=torch.float32, device=x.device
            )
            _backward[(batch * walks, triton.cdiv(width, config["TILE_D"]))](
                x, weight, bias, state, dy, dlast, dx, dstate, sums,
                tokens, width, x.stride(0), x.stride(1),
                W=taps, WALK=WALK, BIAS=bias is not None, START=state is not None,
                SILU=ctx.silu, **config,
            )  # fmt: skip
            return sums

        with on_device_of(x):
            sums = tuned(
                "short_conv.backward", _backward, x, run,
                limits=(full_tile(tokens), full_tile(width)), sizes=(batch, tokens, width),
                exact=(taps, ctx.silu, *kinds(weight, bias, state)),
            )  # fmt: skip
        total = sums.sum(dim=0)
        dweight = total[:taps].t().to(weight.dtype)
        return dx, dweight, None if bias is None else total[taps].to(bias.dtype), dstate, None


@triton.jit
@no_type_check
def _window(
    x_ptr, state_ptr, sequence, t, column, T, D, stride_b, stride_t,
    W: tl.constexpr, START: tl.constexpr,
):  # fmt: skip
    """x_t in float32, (TILE_T, TILE_D): the state's where t < 0, else 0 outside the sequence."""
    here = column[None, :] < D
    spot = sequence * stride_b + t[:, None] * stride_t + column[None, :]
    inside = (t[:, None] >= 0) & (t[:, None] < T) & here
    x = tl.load(x_ptr + spot, mask=inside, other=0.0).to(tl.float32)
    if START and W > 1:
        old = (sequence * D + column[None, :]) * (W - 1) + t[:, None] + (W - 1)
        before = (t[:, None] < 0) & (t[:, None] >= 1 - W) & here
        x += tl.load(state_ptr + old, mask=before, other=0.0).to(tl.float32)
    return x


@triton.jit
@no_type_check
def _weighted(
    x_ptr, weight_ptr, bias_ptr, state_ptr, sequence, t, column, T, D, stride_b, stride_t,
    W: tl.constexpr, BIAS: tl.constexpr, START: tl.constexpr,
):  # fmt: skip
    """bias + sum_w weight[:, w] x_{t-W+1+w}: what the activation takes."""
    here = column < D
    total = tl.zeros((t.shape[0], column.shape[0]), dtype=tl.float32)
    if BIAS:
        total += tl.load(bias_ptr + column, mask=here, other=0.0).to(tl.float32)[None, :]
    for w in tl.static_range(W):
        tap = tl.load(weight_ptr + column * W + w, mask=here, other=0.0).to(tl.float32)
        x = _window(
            x_ptr, state_ptr, sequence, t + (w - W + 1), column, T, D, stride_b, stride_t, W, START
        )
        total += tap[None, :] * x
    return total


@triton.jit(do_not_specialize=["T"])
@no_type_check
def _forward(
    x_ptr, weight_ptr, bias_ptr, state_ptr, y_ptr, last_ptr, T, D, stride_b, stride_t,
    W: tl.constexpr, TILE_T: tl.constexpr, TILE_D: tl.constexpr, BIAS: tl.constexpr,
    START: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(T, TILE_T)
    sequence = (tl.program_id(0) // tiles).to(tl.int64)
    n = tl.program_id(0) % tiles
    t = (n * TILE_T + tl.arange(0, TILE_T)).to(tl.int64)
    column = tl.program_id(1) * TILE_D + tl.arange(0, TILE_D)
    y = _weighted(
        x_ptr, weight_ptr, bias_ptr, state_ptr, sequence, t, column, T, D, stride_b, stride_t,
        W, BIAS, START,
    )  # fmt: skip
    if SILU:
        y = y * tl.sigmoid(y)
    inside = (t[:, None] < T) & (column[None, :] < D)
    spot = (sequence * T + t)[:, None] * D + column[None, :]
    tl.store(y_ptr + spot, y.to(y_ptr.dtype.element_ty), mask=inside)
    if W > 1 and n == tiles - 1:
        # The new state, the last W - 1 inputs, which a short sequence shares with the old one.
        j = tl.arange(0, TILE_T)
        new = _window(
            x_ptr, state_ptr, sequence, j.to(tl.int64) + (T - W + 1), column, T, D,
            stride_b, stride_t, W, START,
        )  # fmt: skip
        spot = (sequence * D + column[None, :]) * (W - 1) + j[:, None]
        mask = (j[:, None] < W - 1) & (column[None, :] < D)
        tl.store(last_ptr + spot, new.to(last_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["T"])
@no_type_check
def _backward(
    x_ptr, weight_ptr, bias_ptr, state_ptr, dy_ptr, dlast_ptr, dx_ptr, dstate_ptr, sums_ptr,
    T, D, stride_b, stride_t,
    W: tl.constexpr, TILE_T: tl.constexpr, TILE_D: tl.constexpr, WALK: tl.constexpr,
    BIAS: tl.constexpr, START: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """dx_t = sum_u weight[:, W-1-u] e_{t+u}, e the gradient before the activation, t >= 1 - W.

    What reaches t < 0 is the state's. Every program leaves its sums for the taps and the bias.
    """
    walks = tl.cdiv(T + W - 1, TILE_T * WALK)
    sequence = (tl.program_id(0) // walks).to(tl.int64)
    first = (tl.program_id(0) % walks) * (TILE_T * WALK) - (W - 1)
    column = tl.program_id(1) * TILE_D + tl.arange(0, TILE_D)
    here = column[None, :] < D
    tap_row = tl.arange(0, 16)
    sums = tl.zeros((16, TILE_D), dtype=tl.float32)
    for n in range(WALK):
        t = (first + n * TILE_T + tl.arange(0, TILE_T)).to(tl.int64)
        dx = tl.zeros((TILE_T, TILE_D), dtype=tl.float32)
        for u in tl.static_range(W):
            s = t + u
            inside = (s[:, None] >= 0) & (s[:, None] < T) & here
            spot = (sequence * T + s)[:, None] * D + column[None, :]
            e = tl.load(dy_ptr + spot, mask=inside, other=0.0).to(tl.float32)
            if SILU:
                z = _weighted(
                    x_ptr, weight_ptr, bias_ptr, state_ptr, sequence, s, column, T, D,
                    stride_b, stride_t, W, BIAS, START,
                )  # fmt: skip
                half = tl.sigmoid(z)
                e = e * half * (1 + z * (1 - half))
            tap = tl.load(weight_ptr + column * W + (W - 1 - u), mask=column < D, other=0.0)
            dx += tap.to(tl.float32)[None, :] * e
            if u == 0:
                for w in tl.static_range(W):
                    x = _window(
                        x_ptr, state_ptr, sequence, t + (w - W + 1), column, T, D,
                        stride_b, stride_t, W, START,
                    )  # fmt: skip
                    part = tl.sum(e * x, axis=0)[None, :]
                    sums += tl.where(tap_row[:, None] == w, part, 0.0)
                if BIAS:
                    sums += tl.where(tap_row[:, None] == W, tl.sum(e, axis=0)[None, :], 0.0)
        if W > 1:
            # The final state is made of inputs: its gradient reaches them past the convolution.
            j = t[:, None] + (W - 1) - T
            carried = (sequence * D + column[None, :]) * (W - 1) + j
            mask = (j >= 0) & (j < W - 1) & here
            dx += tl.load(dlast_ptr + carried, mask=mask, other=0.0).to(tl.float32)
        inside = (t[:, None] >= 0) & (t[:, None] < T) & here
        spot = (sequence * T + t)[:, None] * D + column[None, :]
        tl.store(dx_ptr + spot, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        if START and W > 1:
            old = (sequence * D + column[None, :]) * (W - 1) + t[:, None] + (W - 1)
            before = (t[:, None] < 0) & here
            tl.store(dstate_ptr + old, dx.to(dstate_ptr.dtype.element_ty), mask=before)
    spot = (tl.program_id(0).to(tl.int64) * (W + 1) + tap_row)[:, None] * D + column[None, :]
    tl.store(sums_ptr + spot, sums, mask=(tap_row[:, None] <= W) & here)
