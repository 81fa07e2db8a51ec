"""What the Triton kernels share. Imported only by them, so only where Triton is installed.

The kernels are marked `no_type_check`: Triton compiles their source, in which a name is a tensor on
the device or a constant, and neither a type checker nor jaxtyping's hook should touch it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from .backend import TRITON_DTYPES, WIDEST, Backend, Unsupported

SMALLEST_TILE = 16
"""The smallest side of a tile that a tensor core multiplies."""
LARGEST_TILE = 64

DOT = tl.constexpr("tf32x3")
"""How float32 tiles are multiplied: as three TF32 products, on tensor cores, with float32's digits
but for the last. TF32 alone has three digits; `ieee` compiles into minutes of scalar code."""

LENGTHS = ["T", "N", "H"]
"""Tokens, chunks and heads: a kernel is compiled once for all of them, not once more for multiples
of 16 and for 1. Rows are K or V numbers, constants, so loads lose nothing by it."""

OTHERS: tuple[Backend, ...] = ("definition", "chunked")


def refuse(op: str, reason: str) -> Unsupported:
    """The error for a case that the kernels of `op` do not serve."""
    return Unsupported(op, "triton", reason, OTHERS)


def common_dtype(op: str, *tensors: Tensor) -> torch.dtype:
    """The dtype in which the kernels multiply: the widest of the inputs'."""
    dtype = tensors[0].dtype
    for t in tensors[1:]:
        dtype = torch.promote_types(dtype, t.dtype)
    if dtype not in TRITON_DTYPES:
        raise refuse(op, f"inputs are float32, bfloat16 or float16, not {str(dtype)[6:]}")
    return dtype


def check_width(op: str, **widths: int) -> None:
    for name, width in widths.items():
        if width > WIDEST:
            raise refuse(op, f"{name} is at most {WIDEST}, not {width}")


def check_device(op: str, tensor: Tensor) -> None:
    """Triton's interpreter (TRITON_INTERPRET=1) takes tensors of the CPU, a compiler does not."""
    if not tensor.is_cuda and not triton.knobs.runtime.interpret:
        raise refuse(op, f"tensors are on a CUDA device, not on {tensor.device}")


def tile(width: int) -> int:
    """The side of the tiles that cover `width`, a power of two from 16 to 64."""
    return min(LARGEST_TILE, full_tile(width))


def full_tile(width: int) -> int:
    """The side of the one tile that covers `width`: a power of two of at least 16."""
    return max(SMALLEST_TILE, 1 << (width - 1).bit_length())


@contextmanager
def on_device_of(tensor: Tensor) -> Iterator[None]:
    """Launch on the tensor's device, which need not be the current one."""
    if tensor.is_cuda:
        with torch.cuda.device(tensor.device):
            yield
    else:
        yield


def chunk_prefix(log_decay: Tensor, tokens: int, size: int) -> Tensor:
    """Sums of g from each chunk's start, as `split_prefix` splits them."""
    if log_decay.ndim == 1:
        log_decay = log_decay.expand(1, tokens, -1)
    g = log_decay.double().mT
    g = F.pad(g, (0, -tokens % size)).view(*g.shape[:2], -1, size).cumsum(dim=-1).flatten(2)
    return split_prefix(g)


def split_prefix(total: Tensor) -> Tensor:
    """Prefix sums (B or 1, H, N * C) in float64 as (2, ...): float32, and what that rounds off.

    Two float32 hold what one float64 does, at the price of two subtractions: after a token that
    forgets everything the small decays that follow keep their digits (`chunks.prefix_sums`).
    """
    high = total.float()
    return torch.stack((high, (total - high).float()))


def batch_stride(prefix: Tensor | None) -> int:
    """Elements from one sequence's prefix sums to the next's: 0 where all have the same."""
    return 0 if prefix is None or prefix.shape[1] == 1 else prefix.stride(1)


def half_stride(prefix: Tensor | None) -> int:
    """Elements from the sums to what they round off."""
    return 0 if prefix is None else prefix.stride(0)


def decay_gradient(dprefix: Tensor, log_decay: Tensor, tokens: int, size: int) -> Tensor:
    """The gradient of g from that of its prefix sums, (B, H, N * C): sums from the chunk's end."""
    parts = dprefix.double().view(*dprefix.shape[:2], -1, size)
    dg = parts.flip(-1).cumsum(dim=-1).flip(-1).flatten(2)[..., :tokens]
    dg = dg.sum(dim=(0, 2)) if log_decay.ndim == 1 else dg.mT
    return dg.to(log_decay.dtype)


@triton.jit
@no_type_check
def rows(ptr, token, t, T, row, K: tl.constexpr):
    """x of the tokens t (C,) in the channels `row`, zero where there are none."""
    inside = (t[:, None] >= 0) & (t[:, None] < T) & (row[None, :] < K)
    return tl.load(ptr + token[:, None] * K + row[None, :], mask=inside, other=0.0)


@triton.jit
@no_type_check
def decay_between(high, low, C: tl.constexpr):
    """exp(G_i - G_j) where j <= i, else 0, from the two parts of G, (C,) each."""
    place = tl.arange(0, C)
    difference = (high[:, None] - high[None, :]) + (low[:, None] - low[None, :])
    # The mask comes before exp, which would overflow above the diagonal.
    return tl.exp(tl.where(place[:, None] >= place[None, :], difference, float("-inf")))


@triton.jit
@no_type_check
def one_token(tile, token, wanted):
    """One token of a tile, whose first axis `token` numbers; `wanted` is a constant.

    Where a thread holds all tokens of its channels, by the layout that Triton gives to loads that
    it cannot make wider (the width is not specialised), the compiler drops the zeros: a walk from
    token to token costs no exchange between threads.
    """
    bits = tl.where(token == wanted, tile.to(tl.int32, bitcast=True), 0)
    return tl.sum(bits, axis=0).to(tl.float32, bitcast=True)
