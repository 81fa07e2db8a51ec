"""Triton kernels of RMSNorm with a residual sum and a gate.

A program holds whole rows, so that every number is read once and written once. The backward pass
takes the root mean square again from the row that it reads anyway; each of its programs walks over
rows and leaves one row of sums for the gradient of the weight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .autotune import kinds, tuned
from .rms_norm import MOST_CHANNELS
from .triton_common import check_device, common_dtype, full_tile, on_device_of, refuse

R = TypeVar("R")

OP = "rms_norm"
PROGRAMS = 512
"""Of the backward pass, at most: some for every multiprocessor, and few rows of sums."""


def rms_norm(
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None,
    gate: Tensor | None,
    eps: float,
    activation: str,
    gate_first: bool,
) -> tuple[Tensor, Tensor]:
    """See `rms_norm.rms_norm`.

    Raises `Unsupported` for float64, rows wider than `MOST_CHANNELS` and tensors that are not on a
    GPU.
    """
    check_device(OP, x)
    common_dtype(OP, *(t for t in (x, weight, residual, gate) if t is not None))
    if x.shape[-1] > MOST_CHANNELS:
        raise refuse(OP, f"rows have at most {MOST_CHANNELS} channels, not {x.shape[-1]}")
    rows, added, gates = (None if t is None else _rows(t) for t in (x, residual, gate))
    y, h = _Norm.apply(  # type: ignore[no-untyped-call]
        rows, weight.contiguous(), added, gates, eps, activation == "silu", gate_first
    )
    return y.view(x.shape), x if residual is None else h.view(x.shape)


def _rows(t: Tensor) -> Tensor:
    """(N, D) with the channels of a row side by side; a part of a wider tensor is not copied."""
    t = t.reshape(-1, t.shape[-1])
    return t if t.stride(1) == 1 else t.contiguous()


def tile_of_rows(config: dict[str, int], width: int) -> dict[str, int]:
    """A tile of several short rows, or of one: wider than the tile, it takes more warps too."""
    full, numbers = full_tile(width), config["NUMBERS"]
    return {
        "ROWS": max(1, numbers // full),
        "FULL_D": full,
        "num_warps": min(16, config["num_warps"] * max(1, full // numbers)),
        "num_stages": config["num_stages"],
    }


def _launch(
    kernel: Any, x: Tensor, given: tuple[Tensor | None, ...], run: Callable[[dict[str, int]], R],
    **flags: bool,
) -> R:  # fmt: skip
    rows, width = x.shape
    with on_device_of(x):
        return tuned(
            OP, kernel, x, lambda config: run({**tile_of_rows(config, width), **flags}),
            limits=(MOST_CHANNELS,), sizes=(rows,),
            exact=(kernel.__name__, width, *flags.values(), *kinds(*given)),
        )  # fmt: skip


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        residual: Tensor | None,
        gate: Tensor | None,
        eps: float,
        silu: bool,
        first: bool,
    ) -> tuple[Tensor, Tensor | None]:
        rows, width = x.shape
        kind = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
        wide = torch.promote_types(kind, weight.dtype)
        y = torch.empty((rows, width), dtype=wide, device=x.device)
        h = None
        if residual is not None:
            h = torch.empty((rows, width), dtype=kind, device=x.device)

        def run(config: dict[str, int]) -> None:
            _forward[(triton.cdiv(rows, config["ROWS"]),)](
                x, weight, residual, gate, y, h, rows, width, eps, x.stride(0),
                0 if residual is None else residual.stride(0),
                0 if gate is None else gate.stride(0),
                **config,
            )  # fmt: skip

        flags = {"GATE": gate is not None, "SILU": silu, "FIRST": first}
        _launch(_forward, x, (weight, residual, gate), run, RESIDUAL=residual is not None, **flags)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x if h is None else h, weight, gate)
        ctx.options = (eps, silu, first)
        ctx.kinds = (x.dtype, None if residual is None else residual.dtype)
        return y, h

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dh: Tensor | None) -> tuple[Tensor | None, ...]:
        h, weight, gate = ctx.saved_tensors
        eps, silu, first = ctx.options
        rows, width = h.shape
        dy = torch.zeros_like(h) if dy is None else _rows(dy)
        dh = None if dh is None else _rows(dh)
        dx = torch.empty((rows, width), dtype=h.dtype, device=h.device)
        dgate = None
        if gate is not None:
            dgate = torch.empty((rows, width), dtype=gate.dtype, device=h.device)

        def run(config: dict[str, int]) -> Tensor:
            programs = min(PROGRAMS, triton.cdiv(rows, config["ROWS"]))
            sums = torch.empty((programs, width), dtype=torch.float32, device=h.device)
            _backward[(programs,)](
                h, weight, gate, dy, dh, dx, dgate, sums, rows, width, eps,
                h.stride(0), 0 if gate is None else gate.stride(0), dy.stride(0),
                0 if dh is None else dh.stride(0),
                **config,
            )  # fmt: skip
            return sums

        flags = {"GATE": gate is not None, "SILU": silu, "FIRST": first}
        sums = _launch(_backward, h, (weight, gate, dy, dh), run, CARRIED=dh is not None, **flags)
        dweight = sums.sum(dim=0).to(weight.dtype)
        kind, other = ctx.kinds
        dresidual = None if other is None else dx.to(other)
        return dx.to(kind), dweight, dresidual, dgate, None, None, None


@triton.jit(do_not_specialize=["N"])
@no_type_check
def _forward(
    x_ptr, weight_ptr, residual_ptr, gate_ptr, y_ptr, h_ptr, N, D, eps, stride_x, stride_r,
    stride_g, RESIDUAL: tl.constexpr, GATE: tl.constexpr, SILU: tl.constexpr, FIRST: tl.constexpr,
    ROWS: tl.constexpr, FULL_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, FULL_D)[None, :]
    inside = (row < N) & (column < D)
    u = tl.load(x_ptr + row * stride_x + column, mask=inside, other=0.0).to(tl.float32)
    if RESIDUAL:
        r = tl.load(residual_ptr + row * stride_r + column, mask=inside, other=0.0)
        u += r.to(tl.float32)
        tl.store(h_ptr + row * D + column, u.to(h_ptr.dtype.element_ty), mask=inside)
    if GATE:
        g = tl.load(gate_ptr + row * stride_g + column, mask=inside, other=0.0).to(tl.float32)
        opening = tl.sigmoid(g)
        if SILU:
            opening = g * opening
        if FIRST:
            u = u * opening
    scale = tl.rsqrt(tl.sum(u * u, axis=1) / D + eps)
    w = tl.load(weight_ptr + column, mask=column < D, other=0.0).to(tl.float32)
    y = u * scale[:, None] * w
    if GATE and not FIRST:
        y = y * opening
    tl.store(y_ptr + row * D + column, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["N"])
@no_type_check
def _backward(
    h_ptr, weight_ptr, gate_ptr, dy_ptr, dh_ptr, dx_ptr, dgate_ptr, sums_ptr, N, D, eps,
    stride_h, stride_g, stride_dy, stride_dh,
    GATE: tl.constexpr, CARRIED: tl.constexpr, SILU: tl.constexpr, FIRST: tl.constexpr,
    ROWS: tl.constexpr, FULL_D: tl.constexpr,
):  # fmt: skip
    """du = (w e - n mean(w e n)) / rms and dw = sum e n, with n = u / rms, e = dy act(gate)."""
    column = tl.arange(0, FULL_D)[None, :]
    w = tl.load(weight_ptr + column, mask=column < D, other=0.0).to(tl.float32)
    sums = tl.zeros((1, FULL_D), dtype=tl.float32)
    for n in range(tl.program_id(0), tl.cdiv(N, ROWS), tl.num_programs(0)):
        row = (n * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        inside = (row < N) & (column < D)
        h = tl.load(h_ptr + row * stride_h + column, mask=inside, other=0.0).to(tl.float32)
        e = tl.load(dy_ptr + row * stride_dy + column, mask=inside, other=0.0).to(tl.float32)
        u = h
        if GATE:
            g = tl.load(gate_ptr + row * stride_g + column, mask=inside, other=0.0)
            g = g.to(tl.float32)
            half = tl.sigmoid(g)
            opening = half
            slope = half * (1 - half)
            if SILU:
                opening = g * half
                slope = half * (1 + g * (1 - half))
            if FIRST:
                u = h * opening
        scale = tl.rsqrt(tl.sum(u * u, axis=1) / D + eps)[:, None]
        normed = u * scale
        if GATE and not FIRST:
            dgate = e * normed * w * slope
            e = e * opening
        sums += tl.sum(e * normed, axis=0)[None, :]
        e = e * w
        along = tl.sum(e * normed, axis=1)[:, None] / D
        dx = (e - normed * along) * scale
        if GATE and FIRST:
            dgate = dx * h * slope
            dx = dx * opening
        if GATE:
            to = dgate_ptr + row * D + column
            tl.store(to, dgate.to(dgate_ptr.dtype.element_ty), mask=inside)
        if CARRIED:
            dh = tl.load(dh_ptr + row * stride_dh + column, mask=inside, other=0.0)
            dx += dh.to(tl.float32)
        tl.store(dx_ptr + row * D + column, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    tl.store(sums_ptr + tl.program_id(0).to(tl.int64) * D + column, sums, mask=column < D)
