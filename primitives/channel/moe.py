"""A mixture of experts on every token: a router, experts, experts that are always on, a balance.

y = sum_{e in K} g_e expert_e(x) + shared(x), where K and g are the router's (`router.py`), an
expert is an MLP (`experts.py`) or hardly computes (`special.py`), and the load is evened by losses,
a bias, both or nothing (`balance.py`). The shared experts (DeepSeekMoE, arXiv 2401.06066) have a
gate sigmoid(w x) where `shared_gate` (Qwen2-MoE, 2407.10671).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.letters import BTD
from ..base import TOKENS, BidirectionalError, Carry, Cost, Operator, State
from .balance import BalanceConfig, Ledger, losses
from .experts import Experts, ExpertsConfig
from .mlp import MlpConfig, passed
from .router import Router, RouterConfig
from .special import Special, SpecialConfig


@dataclass(frozen=True)
class MoeConfig:
    """Final numbers of a mixture of experts."""

    width: int
    router: RouterConfig
    experts: ExpertsConfig
    special: SpecialConfig
    shared: MlpConfig | None
    """The shared experts: side by side they are one MLP of their summed inner width."""
    shared_gate: bool
    balance: BalanceConfig

    @property
    def causal(self) -> bool:
        return self.router.choice != "expert"

    @property
    def carries(self) -> str | None:
        """Token ids for hashes; logits, where both mixtures have as many."""
        if self.router.choice == "hash":
            return TOKENS
        return f"router logits {self.router.outputs}" if self.router.residual else None

    def pairs(self, context: int) -> float:
        """Experts that compute per token: the most that a token can choose, or the average of
        `context` tokens where experts choose."""
        if self.causal:
            return min(self.router.top_k, self.experts.experts)
        return self.experts.experts * self.router.taken(context) / context

    def cost(self, context: int, dtype: torch.dtype) -> Cost:
        """A token that takes special experts computes less than what is counted: the most. Noise
        and the capacity belong to training; they are not counted."""
        shared = self.shared.cost(context, dtype) if self.shared else Cost()
        gate = self.width if self.shared_gate else 0
        always = self.special.params + shared.params + gate
        pairs = self.pairs(context)
        return Cost(
            self.router.params + self.experts.experts * self.experts.params + always,
            self.router.active_params + round(pairs * self.experts.params) + always,
            2.0 * (self.router.products + pairs * self.experts.products)
            + 2.0 * (self.special.products + gate)
            + shared.flops_per_token,
        )

    def build(self) -> Moe:
        return Moe(self)


class Moe(Operator):
    """A mixture of experts over the width of every token by itself; it carries no state.

    Outside training, and in training with a state, a token's experts depend on that token alone, so
    decoding does what a whole pass does, whatever else is in the batch. In the training form the
    router may add noise and drop pairs beyond the capacity. Where experts choose, the whole
    sequence is read, and there is no state. Where nobody hands on token ids, a hash takes a token's
    position in the sequence for its id.
    """

    def __init__(self, config: MoeConfig) -> None:
        super().__init__()
        self.config = config
        self.router = Router(config.router)
        self.experts = Experts(config.experts)
        self.special = Special(config.special) if config.special.count else None
        self.shared = config.shared.build() if config.shared else None
        self.shared_gate: nn.Parameter | None = None
        if config.shared_gate:
            bound = config.width**-0.5
            self.shared_gate = nn.Parameter(torch.empty(1, config.width).uniform_(-bound, bound))
        self.ledger = Ledger(config.router.outputs)
        self._loss: Tensor | None = None

    def forward(
        self, x: BTD, state: State | None = None, carry: Carry | None = None
    ) -> tuple[BTD, State | None]:
        y = self._by_choice(x, state) if not self.config.causal else self._routed(x, state, carry)
        if self.shared is not None:
            always = self.shared(x)[0]
            if self.shared_gate is not None:
                always = always * torch.sigmoid(F.linear(x, self.shared_gate))
            y = y + always
        return y.to(x.dtype), passed(state, x)

    def init_state(
        self, batch: int, context: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> State:
        if not self.config.causal:
            raise BidirectionalError
        return State()

    def _routed(self, x: BTD, state: State | None, carry: Carry | None) -> Tensor:
        """The experts' sum where tokens choose."""
        earlier = None if carry is None or not carry.earlier else carry.earlier[0]
        if self.config.router.choice == "hash":
            if earlier is None:
                start = 0 if state is None else state.length
                earlier = torch.arange(start, start + x.shape[1], device=x.device)
            wide = torch.promote_types(x.dtype, torch.float32)
            routing = self.router.hashed(earlier.expand(x.shape[:2]), wide)
        else:
            routing = self.router.route(x, self.training and state is None, earlier)
            if carry is not None and self.config.router.residual:
                assert routing.logits is not None
                carry.later = [routing.logits.view(*x.shape[:2], -1)]
        if self.training:
            self.ledger.record(routing)
            self._loss = losses(self.config.balance, self.router, routing, x.shape[0])
        rows = x.flatten(0, 1)
        y = self.experts(rows, routing)
        if self.special is not None:
            added = self.special(rows, routing)
            y = y if added is None else y + added
        return y.view(x.shape)  # type: ignore[no-any-return]

    def _by_choice(self, x: BTD, state: State | None) -> Tensor:
        """The experts' sum where experts choose."""
        if state is not None:
            raise BidirectionalError
        tokens, weights, routing = self.router.chosen(x)
        if self.training:
            self.ledger.record_choice(tokens, routing, x.shape[1])
            self._loss = losses(self.config.balance, self.router, routing, x.shape[0])
        return self.experts.of_tokens(x, tokens, weights)

    def auxiliary_loss(self) -> Tensor | None:
        """The weighted losses of the last training call, once; None if there was no such call."""
        loss, self._loss = self._loss, None
        return loss

    def balance(self) -> None:
        """Close a training step: move the biases, draw new noise, begin a new count."""
        self.router.adjust(self.ledger.counts)
        self.ledger.close()

    def statistics(self) -> dict[str, Any]:
        """See `Ledger.statistics`."""
        return self.ledger.statistics()
