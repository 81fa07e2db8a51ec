"""Experts that compute nothing, or next to nothing: zero, copy and constant ones.

zero(x) = 0; copy(x) = x (MoE++, Jin et al., arXiv 2410.07348; LongCat-Flash, 2509.01322);
constant(x) = a_1 x + a_2 v with a = softmax(W_c x) and a learned vector v (MoE++). A router chooses
among them as among the others, behind which they stand in this order, so an easy token can leave
the layer with less computed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .router import Routing


@dataclass(frozen=True)
class SpecialConfig:
    """How many there are of each kind, behind `experts` others."""

    width: int
    experts: int
    zero: int
    copy: int
    constant: int

    @property
    def count(self) -> int:
        return self.zero + self.copy + self.constant

    @property
    def params(self) -> int:
        """A constant expert's vector, and the two rows that weight it: 3 D."""
        return 3 * self.constant * self.width

    @property
    def products(self) -> int:
        """Multiply-adds per token: the constants' rows and vectors are read for every token."""
        return 3 * self.constant * self.width


class Special(nn.Module):
    """See the module."""

    def __init__(self, config: SpecialConfig) -> None:
        super().__init__()
        self.config = config
        self.mix: nn.Parameter | None = None
        self.vectors: nn.Parameter | None = None
        if config.constant:
            bound = config.width**-0.5
            self.mix = nn.Parameter(
                torch.empty(2 * config.constant, config.width).uniform_(-bound, bound)
            )
            self.vectors = nn.Parameter(torch.randn(config.constant, config.width))

    def stream_weights(self) -> dict[str, int]:
        """The axis of each weight that lies along the residual stream (see `sphere.py`)."""
        return {} if self.mix is None else {"mix": 1, "vectors": 1}

    def forward(self, rows: Tensor, routing: Routing) -> Tensor | None:
        """What they add to rows (N, D); None where all are zero experts."""
        config = self.config
        if not config.copy and not config.constant:
            return None
        weights = routing.weights
        if routing.kept is not None:
            weights = weights.masked_fill(~routing.kept, 0.0)
        own = routing.experts - config.experts
        weights = weights.masked_fill(own < 0, 0.0)
        # Of each special expert: a token chooses none twice.
        spread = torch.zeros_like(weights[:, :1]).expand(-1, config.count)
        spread = spread.scatter_add(1, own.clamp_min(0), weights)[:, config.zero :]
        copied = spread[:, : config.copy].sum(-1, keepdim=True)
        if self.mix is None or self.vectors is None:
            return rows * copied.to(rows.dtype)
        pairs = F.linear(rows, self.mix.to(rows.dtype)).view(-1, config.constant, 2)
        shares = pairs.to(weights.dtype).softmax(-1) * spread[:, config.copy :].unsqueeze(-1)
        copied = copied + shares[..., 0].sum(-1, keepdim=True)
        constant = shares[..., 1].to(rows.dtype) @ self.vectors.to(rows.dtype)
        added: Tensor = rows * copied.to(rows.dtype) + constant
        return added
