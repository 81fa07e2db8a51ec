"""A span that every head learns (Adaptive Attention Span)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .patterns import Window
from .weigh import Biases


class AdaptiveSpan(nn.Module):
    """The soft mask of a learned span (Sukhbaatar et al., arXiv 1905.07799, equations 4 and 5).

    Weights are multiplied by m(x) = clamp((R + z - x) / R, 0, 1) at distance x before they are
    normalised, which is log m(x) added to the scores. z = S * share, the share being learned per
    head within 0..1 and 0 before training, S the pattern's window. A cache and a step cover the
    whole window whatever the spans are: they are what a design costs, not one training's result.
    """

    def __init__(self, pattern: Window, heads: int) -> None:
        super().__init__()
        assert pattern.window is not None
        assert pattern.span is not None
        self.longest = pattern.window
        self.form = pattern.span
        self.share = nn.Parameter(torch.zeros(heads))

    def spans(self) -> Tensor:
        """z, (H,), in tokens."""
        return self.longest * self.share.clamp(0.0, 1.0)

    def penalty(self) -> Tensor:
        """lambda * mean z (the paper's equation 6, for one layer)."""
        return self.form.penalty * self.spans().mean()

    def beside(self, position: nn.Module | None) -> Biases:
        """The mask's logarithm, added to the biases of a position: a function as `DistanceBias`."""

        def biases(distance: Tensor, q: Tensor) -> Tensor:
            mask = self.log_mask(distance)
            return mask if position is None else position(distance, q) + mask

        return biases

    def log_mask(self, distance: Tensor) -> Tensor:
        """log m at `distance` (T, S), as (1, H, T, S)."""
        # A share that a step has carried out of bounds counts as the bound, but keeps its gradient,
        # by which it comes back; the authors set it to the bound after every step.
        share = self.share + (self.share.clamp(0.0, 1.0) - self.share).detach()
        ramp = self.form.ramp
        dtype = torch.promote_types(share.dtype, torch.float32)
        spans = (self.longest * share).to(dtype)[:, None, None]
        mask = ((ramp + spans - distance.clamp_min(0)) / ramp).clamp(0.0, 1.0)
        # Not log(0), whose gradient is not a number.
        inside = mask > 0
        return torch.where(inside, mask.where(inside, 1.0).log(), -torch.inf)[None]
