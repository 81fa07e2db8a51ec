"""Mixture of heads: a router weights attention's heads (MoH; Jin et al., arXiv 2410.11842)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.letters import BTD

BALANCE_WEIGHT = 0.01
"""Of the balancing loss (section 3.3)."""


def router_rows(heads: int, active: int, shared: int) -> tuple[int, int, int]:
    """Outputs of the router: the routed heads, the shared ones, both kinds' balance.

    A single shared head has weight 1 among the shared whatever a router says: no row for it.
    """
    if not active:
        return 0, 0, 0
    return heads - shared, shared if shared > 1 else 0, 2 if shared else 0


class HeadRouter(nn.Module):
    """The weights of heads (equations 5 to 9), of which the first `shared` are always on.

    A shared head's is a_1 softmax(W_s x), that of the `active` best of the others a_2 softmax(
    W_r x), the rest have 0; (a_1, a_2) = softmax(W_h x), and a_2 = 1 where no head is shared. All
    heads are computed: a head's keys and values must be there for later queries, and one token's
    choice is not another's.
    """

    def __init__(self, heads: int, active: int, shared: int, width: int) -> None:
        super().__init__()
        self.active, self.shared = active, shared
        self.rows = router_rows(heads, active, shared)
        self.router = nn.Linear(width, sum(self.rows), bias=False)
        self._loss: Tensor | None = None
        self._load: Tensor | None = None

    def route(self, x: BTD) -> Tensor:
        """The weight of every head (B, T, H), in float32 at least."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.to(dtype), self.router.weight.to(dtype))
        routed, shared, kinds = torch.split(logits, list(self.rows), -1)
        scores = routed.softmax(-1)
        # A stable sort: ties go to the lowest index in every batch size.
        order = torch.sort(routed.detach(), dim=-1, descending=True, stable=True).indices
        chosen = torch.zeros_like(scores).scatter(-1, order[..., : self.active], 1.0)
        if self.training:
            self._load = chosen.flatten(0, -2).mean(0)
            self._loss = BALANCE_WEIGHT * (self._load * scores.flatten(0, -2).mean(0)).sum()
        weights: Tensor = scores * chosen
        if not self.shared:
            return weights
        share = kinds.softmax(-1)
        always = shared.softmax(-1) if self.shared > 1 else torch.ones_like(weights[..., :1])
        return torch.cat((share[..., :1] * always, share[..., 1:] * weights), -1)

    def auxiliary_loss(self) -> Tensor | None:
        """The weighted balancing loss of the last training call, once: the sum over routed heads of
        the share of tokens that chose it times its mean score. None if there was no such call."""
        loss, self._loss = self._loss, None
        return loss

    def load(self) -> list[float]:
        """The share of tokens that chose each routed head in the last training call."""
        if self._load is None:
            return [0.0] * self.rows[0]
        return [float(share) for share in self._load.tolist()]
