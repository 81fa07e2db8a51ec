"""The diagonal recurrence: h_t = exp(log_a_t) * h_{t-1} + b_t, element by element.

The core of HGRN (arXiv 2311.04823), RG-LRU (2402.19427) and minGRU (2410.01201).
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from . import definitions
from .backend import choose, kernels, without_autocast
from .definitions import accumulator
from .letters import BD, BTD, D


@without_autocast
def diagonal_scan(log_a: D | BTD, b: BTD, state: BD | None = None) -> tuple[BTD, BD]:
    """The states of all tokens (b's dtype) and the last one (float32 at least).

    `log_a` is the natural logarithm of the decay, at most 0, of every token or the same for all;
    `state` continues a sequence (None: zeros). Raises `Unsupported` where a pinned backend does not
    serve the case.
    """
    backend = choose("diagonal_scan", b.device, dtype=b.dtype)
    if backend == "definition":
        return definitions.diagonal_scan(log_a, b, state)
    if backend == "triton":
        return kernels("diagonal_scan")(log_a, b, state)
    dtype = accumulator(log_a, b, state)
    decay, add = log_a.to(dtype).exp().expand(b.shape), b.to(dtype)
    start = None if state is None else state.to(dtype)
    if b.shape[1] == 1:
        last = add[:, 0] if start is None else torch.addcmul(add[:, 0], decay[:, 0], start)
        return last.unsqueeze(1).to(b.dtype), last
    h, last = _Scan.apply(decay, add, start)  # type: ignore[no-untyped-call]
    return h.to(b.dtype), last


class _Scan(torch.autograd.Function):
    """The scan and its gradient, which is a scan too, from the end to the start.

    With e_t the gradient of everything that h_t reaches, e_t = dh_t + a_{t+1} e_{t+1}; then
    db_t = e_t and da_t = e_t h_{t-1}. Autograd through the loop would keep every partial product.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, start: Tensor | None) -> tuple[Tensor, Tensor]:
        h = _scan(a, b, start, reverse=False)
        ctx.save_for_backward(a, h, start)
        return h, h[:, -1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh: Tensor, dlast: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        a, h, start = ctx.saved_tensors
        # The last decay multiplies the gradient of the final state, which is that of h_T: 1.
        later = F.pad(a[:, 1:], (0, 0, 0, 1), value=1.0)
        e = _scan(later, dh, dlast, reverse=True)
        first = torch.zeros_like(h[:, :1]) if start is None else start.unsqueeze(1)
        da = e * torch.cat((first, h[:, :-1]), dim=1)
        return da, e, None if start is None else e[:, 0] * a[:, 0]


def _scan(a: Tensor, b: Tensor, start: Tensor | None, *, reverse: bool) -> Tensor:
    """h_t = a_t h_{t-1} + b_t (with `reverse` h_t = a_t h_{t+1} + b_t) from `start`.

    Cut into N chunks of C, both near sqrt(T): C steps advance all chunks at once from zero, N steps
    carry the state over the chunks, one product adds what came before each. Decays are multiplied,
    never divided, so nothing overflows and a decay of 0 is exact.
    """
    batch, tokens, width = b.shape
    size = 1 << math.ceil(math.log2(tokens) / 2)
    chunks = -(-tokens // size)
    padding = (0, 0, 0, chunks * size - tokens)

    def by_place(x: Tensor, fill: float) -> Tensor:
        """(B, T, D) as (C, B, N, D) in memory of its own, which the steps write into."""
        x = F.pad(x, padding, value=fill).view(batch, chunks, size, width).permute(2, 0, 1, 3)
        return x.clone(memory_format=torch.contiguous_format)

    # The padding stands after the last token: it keeps the state, so that a reversed scan may
    # start with it.
    h, decay = by_place(b, 0.0), by_place(a, 1.0)
    places = range(size)[::-1] if reverse else range(size)
    states, decays = h.unbind(0), decay.unbind(0)
    for before, place in itertools.pairwise(places):
        states[place].addcmul_(decays[place], states[before])
        decays[place].mul_(decays[before])
    now = torch.zeros_like(h[0, :, 0]) if start is None else start
    into = torch.empty_like(h[0])
    for n in range(chunks)[::-1] if reverse else range(chunks):
        into[:, n] = now
        now = torch.addcmul(states[places[-1]][:, n], decays[places[-1]][:, n], now)
    h.addcmul_(decay, into)
    return h.permute(1, 2, 0, 3).reshape(batch, chunks * size, width)[:, :tokens]
