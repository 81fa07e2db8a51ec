"""A recurrent layer that reads the whole sequence: one reads it forward, one backward.

y_t = forward(x)_t + backward(reversed x)_{T+1-t} (Schuster and Paliwal 1997). Each direction has
weights of its own, its projection back to the model's width included, so this sum is the projection
of both directions' outputs laid side by side.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.letters import BTD
from .base import Axis, BidirectionalError, Cost, Operator, State


def causal_axis() -> Axis:
    """The axis of the recurrences that can also read the whole sequence."""
    return Axis(
        "causal",
        True,
        "false: a second recurrence with its own weights reads the sequence backward, and the two"
        " outputs are summed; not for language models, which see no later token",
        options=(True, False),
    )


def two_directions(one: Cost) -> Cost:
    """The cost of both directions from that of one; what reads to the end carries no state."""
    return Cost(2 * one.params, 2 * one.active_params, 2 * one.flops_per_token, 0)


class Bidirectional(Operator):
    """Two causal operators of one kind, the second over the reversed sequence."""

    def __init__(self, forward: Operator, backward: Operator) -> None:
        super().__init__()
        self.ahead = forward
        self.back = backward

    def forward(self, x: BTD, state: State | None = None) -> tuple[BTD, State | None]:
        if state is not None:
            raise BidirectionalError
        y: Tensor = self.ahead(x)[0] + self.back(x.flip(1))[0].flip(1)
        return y, None

    def init_state(
        self, batch: int, context: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> State:
        raise BidirectionalError
