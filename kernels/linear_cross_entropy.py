"""The mean cross-entropy of linear logits, which are never all stored.

z_n = W h_n;  loss = mean over the counted tokens of log sum_a exp(z_na) - z_n,target, and with a
z-loss (arXiv 2204.02311, section 5) of weight lambda + lambda (log sum_a exp(z_na))^2.

Rows of tokens are taken in pieces. The gradients of h and W are made in the forward pass, while a
piece's logits are at hand: the gradient of a mean is one number, which scales both afterwards. That
is 6 N D A operations for forward and backward. Keeping only the normalisers and making the logits
again would be 8 N D A, and would serve a gradient per token, which a training does not have.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import definitions
from .backend import choose, kernels
from .definitions import accumulator

PIECE_BYTES = {"cpu": 2**24, "cuda": 2**28}
"""Logits of a piece: on a CPU what caches hold, on a GPU enough rows to fill a product, and few
enough pieces that summing the gradient of W in float32 costs less than its products."""

LogitGradient = Callable[[Tensor, Tensor, int, float, bool], Tensor]
"""(logits (N, A), targets (N,), ignore, lambda, whether gradients are wanted) to losses (N,).

Losses are float32 at least and 0 where ignored. With gradients, the logits are overwritten by those
of the sum of the losses: 1 / count may be more than half precision holds."""


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    scale: Tensor | None = None,
    ignore: int = -100,
    z_weight: float = 0.0,
) -> Tensor:
    """The mean loss over the targets that are not `ignore`, one number in float32 at least.

    hidden (..., D), weight (A, D), targets (...) of int64; `scale` (A,) multiplies the logits
    (nGPT). The loss is NaN where no target counts, as torch's is, and on the Triton backend where a
    target is outside the alphabet; elsewhere that raises IndexError. Under autocast the products
    are in its dtype. Gradients can be taken once. Raises ValueError where shapes differ and
    `Unsupported` where a pinned backend does not serve the case.
    """
    if hidden.shape[:-1] != targets.shape or weight.shape[1:] != hidden.shape[-1:]:
        raise ValueError(
            "linear_cross_entropy: hidden is (..., D), weight (A, D) and targets (...), not "
            f"{tuple(hidden.shape)}, {tuple(weight.shape)} and {tuple(targets.shape)}"
        )
    device = hidden.device
    if scale is not None:
        # On the table it is A D products, on the logits it would be N A.
        weight = weight * scale[:, None]
    if torch.is_autocast_enabled(device.type):
        low = torch.get_autocast_dtype(device.type)
        hidden, weight = hidden.to(low), weight.to(low)
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    backend = choose("linear_cross_entropy", device, dtype=dtype)
    rows, flat = hidden.reshape(-1, hidden.shape[-1]).to(dtype), targets.reshape(-1)
    with torch.autocast(device.type, enabled=False):
        if backend == "definition":
            losses, normalizers = definitions.linear_cross_entropy(rows, weight, flat, ignore)
            counted = flat != ignore
            return (losses + z_weight * normalizers.square() * counted).sum() / counted.sum()
        gradient: LogitGradient = logit_gradient
        if backend == "triton":
            gradient = kernels("linear_cross_entropy", "logit_gradient")  # type: ignore[assignment]
        weight = weight.to(dtype)
        if not torch.is_grad_enabled():
            # A function is told what requires gradients, not whether they are taken: of three
            # products two would be for nothing.
            rows, weight = rows.detach(), weight.detach()
        mean: Tensor = _Loss.apply(  # type: ignore[no-untyped-call]
            rows, weight, flat, ignore, z_weight, gradient
        )
        return mean


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        ignore: int,
        z_weight: float,
        gradient: LogitGradient,
    ) -> Tensor:
        wide = accumulator(hidden)
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        wanted = wants_hidden or wants_weight
        over_count = (targets != ignore).sum().to(wide).reciprocal()
        total = torch.zeros((), dtype=wide, device=hidden.device)
        dhidden = torch.empty_like(hidden) if wants_hidden else None
        dweight = None
        if wants_weight:
            dweight = torch.zeros(weight.shape, dtype=wide, device=weight.device)
        step = piece_rows(weight.shape[0], hidden)
        for first in range(0, hidden.shape[0], step):
            at = slice(first, first + step)
            logits = hidden[at] @ weight.mT
            total += gradient(logits, targets[at], ignore, z_weight, wanted).sum()
            if dhidden is not None:
                torch.mm(logits, weight, out=dhidden[at])
            if dweight is not None:
                if wide == logits.dtype:
                    dweight.addmm_(logits.mT, hidden[at])
                else:
                    dweight += logits.mT @ hidden[at]
        ctx.save_for_backward(dhidden, dweight, over_count)
        ctx.dtype = weight.dtype
        return total * over_count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        dhidden, dweight, over_count = ctx.saved_tensors
        factor = dloss * over_count
        # A product of half precision with one number would round the number first.
        found = (
            None if t is None else (t.to(factor.dtype) * factor).to(ctx.dtype)
            for t in (dhidden, dweight)
        )
        return (*found, None, None, None, None)


def piece_rows(alphabet: int, hidden: Tensor) -> int:
    """The rows of a piece: a multiple of 128, tiles of a matrix product, where it is not all."""
    most = PIECE_BYTES["cuda" if hidden.is_cuda else "cpu"]
    fit = most // (alphabet * hidden.element_size())
    return max(128, fit // 128 * 128)


def logit_gradient(
    logits: Tensor, targets: Tensor, ignore: int, z_weight: float, wanted: bool
) -> Tensor:
    """`LogitGradient` in torch. With p the softmax, dz = (1 + 2 lambda lse) p - target."""
    z = logits.to(accumulator(logits))
    counted = targets != ignore
    at = torch.where(counted, targets, 0)[:, None]
    log_p = torch.log_softmax(z, dim=1)
    own = log_p.gather(1, at)[:, 0]
    normalizer = z.gather(1, at)[:, 0] - own
    losses = z_weight * normalizer.square() - own
    if wanted:
        dz = log_p.exp_()
        dz *= (counted * (1 + 2 * z_weight * normalizer))[:, None]
        dz.scatter_add_(1, at, -counted.to(z.dtype)[:, None])
        logits.copy_(dz)
    return torch.where(counted, losses, 0.0)
