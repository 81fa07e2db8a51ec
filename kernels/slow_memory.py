"""Memory that is learned chunk by chunk: one model answers a whole chunk, then takes one step.

    o_t = f(x_t; W),    W' = W - sum_{t in chunk} theta_t grad |f(x_t; W) - v_t|^2

for a chunk of C tokens (HOPE's continuum memory, arXiv 2512.24695: a level of frequency 1/C).
Inside a chunk the weights stand still, so what is learned is read from the next chunk on.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import definitions
from .backend import choose, without_autocast
from .inner_model import Inner, Norm, gradient
from .letters import BTH, BTHK, BTHV


@without_autocast
def slow_memory(
    x: BTHK,
    v: BTHV,
    rate: BTH,
    inner: Inner,
    norm: Norm,
    weights: list[Tensor],
    pending: list[Tensor],
    chunk: int,
    phase: int = 0,
) -> tuple[BTHV, list[Tensor], list[Tensor]]:
    """The outputs, and the weights and pending steps after the last token, (B, H, in, out) each.

    `rate` is theta. `pending` is the sum of theta times gradient over the `phase` tokens, fewer
    than `chunk`, that the chunk under way has already seen; zeros where there are none. Computes
    in the dtype of the weights, which the outputs have too. Nothing is written in place.
    """
    if choose("delta_rule", x.device, "test-time") == "definition":
        return definitions.slow_memory(x, v, rate, inner, norm, weights, pending, chunk, phase)
    tokens, dtype = x.shape[1], weights[0].dtype
    x, v, theta = (t.to(dtype).transpose(1, 2) for t in (x, v, rate.unsqueeze(-1)))
    outputs, at = [], 0
    while at < tokens:
        end = min(at + chunk - phase, tokens)
        o, inputs, grads = gradient(inner, weights, x[:, :, at:end], v[:, :, at:end], norm)
        outputs.append(o)
        scaled = [theta[:, :, at:end] * g for g in grads]
        if tokens == 1:
            # A product of a column and a row, as one pass over the matrix.
            pending = [
                torch.addcmul(p, u.mT, g) for p, u, g in zip(pending, inputs, scaled, strict=True)
            ]
        else:
            pending = [p + u.mT @ g for p, u, g in zip(pending, inputs, scaled, strict=True)]
        phase = (phase + end - at) % chunk
        at = end
        if phase == 0:
            weights = [w - p for w, p in zip(weights, pending, strict=True)]
            pending = [torch.zeros_like(p) for p in pending]
    return torch.cat(outputs, 2).transpose(1, 2), weights, pending
