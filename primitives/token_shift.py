"""Token shift: an operator's projections see a mix of the token and the one before it.

RWKV-5 mixes with a learned share per channel, RWKV-6 with one that also depends on both tokens
(arXiv 2404.05892, sections 4.1 and 4.2). Each projection of an operator has a mix of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..kernels.letters import BTD

SHIFTS = ("none", "static", "dynamic")
RANK = 32
"""Width between the two maps that make RWKV-6's mix from the input."""


class TokenShift(nn.Module):
    """x_s = x_t + (x_{t-1} - x_t) m_s for each of S streams.

    `static`: m_s is learned. `dynamic`: m_s + tanh(x' A_s) B_s, with x' the static mix by `first`.
    """

    def __init__(self, kind: str, width: int, streams: int) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.rand(streams, width))
        self.dynamic = kind == "dynamic"
        if self.dynamic:
            self.first = nn.Parameter(torch.rand(width))
            self.down = nn.Linear(width, streams * RANK, bias=False)
            # Small at the start, as published: the mix begins near the static one.
            self.up = nn.Parameter(torch.empty(streams, RANK, width).uniform_(-0.01, 0.01))

    def forward(self, x: BTD, last: Tensor | None) -> tuple[list[BTD], Tensor]:
        """The streams and the last token, (B, D), in the dtype of the given one."""
        before = torch.zeros_like(x[:, 0]) if last is None else last.to(x.dtype)
        change = torch.cat((before[:, None], x[:, :-1]), 1) - x
        mixes: list[Tensor] = list(self.mix.to(x.dtype))
        if self.dynamic:
            batch, tokens, width = x.shape
            streams = len(mixes)
            low = torch.tanh(self.down(x + change * self.first.to(x.dtype)))
            low = low.view(batch * tokens, streams, RANK).transpose(0, 1)
            more = torch.bmm(low, self.up).view(streams, batch, tokens, width)
            mixes = [mix + more[s].to(x.dtype) for s, mix in enumerate(mixes)]
        end = x[:, -1]
        return [x + change * mix for mix in mixes], end if last is None else end.to(last.dtype)


def token_shift_params(kind: str, width: int, streams: int) -> int:
    if kind == "none":
        return 0
    return streams * width + (width + 2 * streams * RANK * width if kind == "dynamic" else 0)


def token_shift_products(kind: str, width: int, streams: int) -> int:
    """Multiply-adds of a token."""
    return 2 * streams * RANK * width if kind == "dynamic" else 0
