"""Mega's moving average: several damped exponential averages of each channel.

h_t = alpha beta x_t + (1 - alpha delta) h_{t-1}, y_t = eta . h_t, all of them vectors per channel,
with alpha and delta in (0, 1) (arXiv 2209.10655, section 3.1).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...kernels.letters import BTD
from ...kernels.time_invariant import time_invariant
from ..recurrent_parts import at_least_float32

SMALLEST = 1e-30
"""Of a decay: a logarithm stays finite, and a token later nothing is left."""


class MovingAverage(nn.Module):
    """`dims` averages of each channel, whose logits of alpha and delta are learned.

    They start as the authors' do: logits of standard deviation 0.2, beta near 1 and -1 in turn, eta
    normal, here of variance 1 / `dims`.
    """

    def __init__(self, width: int, dims: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.randn(width, dims) * 0.2)
        self.delta = nn.Parameter(torch.randn(width, dims) * 0.2)
        signs = 1.0 - 2.0 * (torch.arange(dims) % 2)
        self.beta = nn.Parameter(torch.randn(width, dims) * 0.02 + signs)
        self.eta = nn.Parameter(torch.randn(width, dims) * dims**-0.5)

    def forward(self, x: BTD, state: Tensor | None) -> tuple[BTD, Tensor]:
        """The averages, float32 at least, and the state after the last token, (B, D, dims): h
        without its factor alpha beta."""
        alpha, delta = torch.sigmoid(self.alpha.double()), torch.sigmoid(self.delta.double())
        decay = (1 - alpha * delta).clamp_min(SMALLEST)
        read = self.eta.double() * alpha * self.beta.double()
        return time_invariant(at_least_float32(x), decay.log(), read, state)


def moving_average_params(width: int, dims: int) -> int:
    return 4 * width * dims
