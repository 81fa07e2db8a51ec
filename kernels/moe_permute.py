"""Tokens to the rows of their experts and back: what stands around a mixture's grouped product.

permute: row m of the result is token order_m // k.  unpermute: token n gets sum_j w_nj y[back_nj],
over the pairs (n, j) that were not dropped (the dispatch of GShard, Lepikhin et al., arXiv
2006.16668, without its dense masks).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .backend import choose, kernels, without_autocast
from .definitions import accumulator

OP = "moe_permute"


class Dispatch(NamedTuple):
    """Where the pairs (token n, choice j) stand once they are sorted by expert.

    A pair that is dropped, or whose expert computes nothing, has no row.
    """

    order: Tensor
    """The pair n * k + j of every row, (M,) of int64; within an expert pairs keep their order."""
    back: Tensor
    """The row of every pair, (N, k) of int64; -1 where it has none."""
    ends: Tensor
    """Where the rows of each expert end, (E,) of int32; the last is M."""


def dispatch(choices: Tensor, experts: int, kept: Tensor | None = None) -> Dispatch:
    """The dispatch of `choices` (N, k), whole numbers, of which 0..experts-1 have rows.

    `kept` (N, k) of bool: the pairs that were not dropped; None for all, and then every choice is
    an expert, so that the number of rows is known without reading the choices.
    """
    flat = choices.flatten()
    if kept is not None:
        flat = flat.masked_fill(~(kept.flatten() & (flat < experts)), experts)
    ordered, order = torch.sort(flat, stable=True)
    ids = torch.arange(experts, device=flat.device)
    ends = torch.searchsorted(ordered, ids, right=True).to(torch.int32)
    back = torch.empty_like(order)
    back[order] = torch.arange(order.numel(), device=flat.device)
    if kept is not None:
        read: Callable[[Tensor], int] = _rows
        if torch.compiler.is_compiling():  # as a decorator it would import Triton with torch's
            read = torch.compiler.disable(_rows)  # type: ignore[no-untyped-call]
        rows = read(ends)
        order = order[:rows]
        back = back.masked_fill(back >= rows, -1)
    return Dispatch(order, back.view(choices.shape), ends)


def _rows(ends: Tensor) -> int:
    """How many rows there are, which decides a shape: the device has to be waited for."""
    return int(ends[-1])


@without_autocast
def permute(x: Tensor, where: Dispatch) -> Tensor:
    """The tokens x (N, D) in the order of their experts, (M, D), in x's dtype.

    Raises `Unsupported` where a pinned backend does not serve the case.
    """
    backend = choose(OP, x.device, dtype=x.dtype)
    if backend == "triton":
        return cast(Tensor, kernels(OP, "permute")(x, where))
    if backend == "definition":
        rows = [x[pair // where.back.shape[1]] for pair in where.order.tolist()]
        return torch.stack(rows) if rows else x[:0]
    y: Tensor = _Permute.apply(x, where.order, where.back)  # type: ignore[no-untyped-call]
    return y


@without_autocast
def unpermute(y: Tensor, weights: Tensor, where: Dispatch) -> Tensor:
    """The weighted sums (N, D) of the rows y (M, D), in y's dtype, summed in float32 at least.

    `weights` (N, k) are those of the pairs; a pair without a row adds nothing, and its weight gets
    no gradient. Raises `Unsupported` where a pinned backend does not serve the case.
    """
    dtype = accumulator(y, weights)
    backend = choose(OP, y.device, dtype=y.dtype)
    if backend == "triton":
        return cast(Tensor, kernels(OP, "unpermute")(y, weights, where))
    if backend == "definition":
        return _definition(y.to(dtype), weights.to(dtype), where.back).to(y.dtype)
    out: Tensor = _Unpermute.apply(y, weights, where.order, where.back)  # type: ignore[no-untyped-call]
    return out


def _definition(y: Tensor, weights: Tensor, back: Tensor) -> Tensor:
    """Token by token: sum_j w_nj y[back_nj]."""
    out = []
    for places, row in zip(back.tolist(), weights, strict=True):
        total = y.new_zeros(y.shape[1])
        for place, weight in zip(places, row, strict=True):
            if place >= 0:
                total = total + weight * y[place]
        out.append(total)
    return torch.stack(out)


class _Permute(torch.autograd.Function):
    """A gather, whose gradient is a gather too: a scatter would add in any order on a GPU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(back)
        return x[order // back.shape[1]]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        (back,) = ctx.saved_tensors
        return _of_pairs(dy, back).to(accumulator(dy)).sum(1).to(dy.dtype), None, None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, weights: Tensor, order: Tensor, back: Tensor) -> Tensor:
        dtype = accumulator(y, weights)
        ctx.save_for_backward(y, weights, order, back)
        pairs = _of_pairs(y, back).to(dtype)
        return (pairs * weights.to(dtype).unsqueeze(-1)).sum(1).to(y.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor, None, None]:
        y, weights, order, back = ctx.saved_tensors
        dtype = accumulator(y, weights)
        rows = dout[order // back.shape[1]].to(dtype)
        dy = (rows * weights.to(dtype).flatten()[order].unsqueeze(-1)).to(y.dtype)
        dweights = (rows * y.to(dtype)).sum(-1)
        dpairs = dweights.new_zeros(back.numel()).index_copy(0, order, dweights)
        return dy, dpairs.view(back.shape).to(weights.dtype), None, None


def _of_pairs(rows: Tensor, back: Tensor) -> Tensor:
    """The row of every pair, (N, k, D) from (M, D); zeros where it has none."""
    if rows.shape[0] == 0:
        return rows.new_zeros(*back.shape, rows.shape[1])
    if rows.shape[0] == back.numel():
        return rows[back]
    return rows[back.clamp_min(0)].masked_fill((back < 0).unsqueeze(-1), 0.0)
