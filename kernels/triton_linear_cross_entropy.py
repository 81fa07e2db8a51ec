"""The Triton kernel of linear cross-entropy: losses of rows of logits, gradients in their place.

The products before and after it are torch's. A program walks over a row of logits twice: once for
the largest and the sum of exponentials, once for the gradient, which takes the logits' place; the
second walk finds the row in the chip's caches.
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from .autotune import tuned
from .triton_common import check_device, common_dtype, full_tile, on_device_of

OP = "linear_cross_entropy"


def logit_gradient(
    logits: Tensor, targets: Tensor, ignore: int, z_weight: float, wanted: bool
) -> Tensor:
    """See `linear_cross_entropy.LogitGradient`; NaN where a target is outside the alphabet.

    Raises `Unsupported` for float64 and tensors that are not on a GPU.
    """
    check_device(OP, logits)
    common_dtype(OP, logits)
    rows, alphabet = logits.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    targets = targets.contiguous()

    def run(config: dict[str, int]) -> None:
        _rows[(rows,)](
            logits, targets, losses, alphabet, logits.stride(0), ignore, z_weight,
            GRADIENT=wanted, **config,
        )  # fmt: skip

    with on_device_of(logits):
        tuned(
            OP, _rows, logits, run, limits=(full_tile(alphabet),), sizes=(rows,),
            exact=(alphabet, wanted), rewritten=(logits,) if wanted else (),
        )  # fmt: skip
    return losses


@triton.jit
@no_type_check
def _rows(
    logits_ptr, targets_ptr, losses_ptr, A, stride, ignore, z_weight,
    GRADIENT: tl.constexpr, TILE_A: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row)
    counted = target != ignore
    z_ptr = logits_ptr + row * stride
    place = tl.arange(0, TILE_A)
    # A maximum and a sum for every lane, joined once at the end.
    most = tl.full((TILE_A,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((TILE_A,), dtype=tl.float32)
    for first in range(0, A, TILE_A):
        column = first + place
        z = tl.load(z_ptr + column, mask=column < A, other=float("-inf")).to(tl.float32)
        larger = tl.maximum(most, z)
        # Where a lane has seen nothing, -inf - -inf would be NaN.
        base = tl.where(larger == float("-inf"), 0.0, larger)
        total = total * tl.exp(most - base) + tl.exp(z - base)
        most = larger
    top = tl.max(most, axis=0)
    normalizer = top + tl.log(tl.sum(total * tl.exp(most - top), axis=0))
    inside = (target >= 0) & (target < A)
    own = tl.load(z_ptr + target, mask=inside, other=float("nan")).to(tl.float32)
    loss = normalizer - own + z_weight * normalizer * normalizer
    tl.store(losses_ptr + row, tl.where(counted, loss, 0.0))
    if GRADIENT:
        # No later load may overtake the reading of the target's logit, which is overwritten.
        tl.debug_barrier()
        weight = tl.where(counted, 1.0, 0.0)
        slope = weight * (1 + 2 * z_weight * normalizer)
        for first in range(0, A, TILE_A):
            column = first + place
            z = tl.load(z_ptr + column, mask=column < A, other=0.0).to(tl.float32)
            dz = slope * tl.exp(z - normalizer) - tl.where(column == target, weight, 0.0)
            tl.store(z_ptr + column, dz.to(logits_ptr.dtype.element_ty), mask=column < A)
