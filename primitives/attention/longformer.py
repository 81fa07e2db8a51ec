"""Longformer's attention in both directions: a window, and global tokens with projections of their
own."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.letters import BTD
from ..base import BidirectionalError, Cost, GeneError, Operator, State
from ..position import Rotary
from ..rope import RopeForm
from .layer import AttentionConfig
from .patterns import Window
from .score import ScoreForm
from .tables import attend_tabled, pairs, table_of
from .weigh import Score, weigh


@dataclass(frozen=True)
class LongformerConfig:
    """Final numbers of Longformer's attention."""

    width: int
    heads: int
    head_dim: int
    pattern: Window
    """Not causal; its sinks are the global tokens."""
    rope_theta: float
    rope_channels: int
    rope_form: RopeForm
    bias: bool
    causal: bool = False

    @property
    def inner(self) -> int:
        return self.heads * self.head_dim

    def cost(self, context: int, dtype: torch.dtype) -> Cost:
        params = 7 * self.width * self.inner
        if self.bias:
            params += 6 * self.inner + self.width
        first = min(self.pattern.sinks, context)
        # Everything but the global queries is computed for every token.
        products = (6 + first / context) * self.width * self.inner
        table = table_of(self.pattern, context)
        local = pairs(self.pattern, context) - (0 if table is None else sum(table.ends) * context)
        seen = local / context + first
        return Cost(params, params, 2.0 * (products + 2 * self.inner * seen), 0)

    def build(self) -> Longformer:
        return Longformer(self)


class Longformer(Operator):
    """Beltagy et al., arXiv 2004.05150, 3.1: every token sees a window around itself and the global
    tokens, by one softmax; a global token sees every token, by queries, keys and values that other
    projections make. The global tokens are the first ones."""

    def __init__(self, config: LongformerConfig) -> None:
        super().__init__()
        self.config = config
        # Queries, keys, values, in this order.
        self.entry = nn.Linear(config.width, 3 * config.inner, bias=config.bias)
        self.across = nn.Linear(config.width, 3 * config.inner, bias=config.bias)
        self.exit = nn.Linear(config.inner, config.width, bias=config.bias)
        self.rotary: Rotary | None = None
        if config.rope_channels:
            self.rotary = Rotary(config.rope_channels, config.rope_theta, config.rope_form)

    def forward(self, x: BTD, state: State | None = None) -> tuple[BTD, State | None]:
        if state is not None:
            raise BidirectionalError
        config = self.config
        q, k, v = torch.split(self._heads(self.entry(x), 2), [config.heads] * 3, 1)
        local = self._local(q, k, v)
        first = config.pattern.sinks
        weight, bias = self.across.weight, self.across.bias
        cut = config.inner
        ours, others = (None, None) if bias is None else (bias[:cut], bias[cut:])
        asked = F.linear(x[:, :first], weight[:cut], ours)
        held = F.linear(x, weight[cut:], others)
        k, v = torch.split(self._heads(held, 1), [config.heads] * 2, 1)
        across = weigh(self._heads(asked, 1), k, v, None, Score())
        out = torch.cat((across, local[:, :, first:]), 2)
        return self.exit(out.transpose(1, 2).flatten(2)), None

    def _heads(self, mixed: Tensor, turned: int) -> Tensor:
        """(B, T, n * inner) to (B, n * H, T, K), the first `turned` * H heads turned by RoPE."""
        config = self.config
        heads = mixed.reshape(*mixed.shape[:2], -1, config.head_dim)
        if self.rotary is not None:
            cut = turned * config.heads
            heads = torch.cat((self.rotary(heads[:, :, :cut], 0), heads[:, :, cut:]), 2)
        return heads.transpose(1, 2)

    def _local(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The outputs of all tokens as if none of them were global to itself."""
        pattern, tokens = self.config.pattern, q.shape[2]
        table = table_of(pattern, tokens)
        if table is not None:
            return attend_tabled(q, k, v, pattern, table, Score())
        at = torch.arange(tokens, device=q.device)
        hidden = ~pattern.sees(at, at, tokens)
        bias = torch.zeros(hidden.shape, dtype=q.dtype, device=q.device)
        return weigh(q, k, v, bias.masked_fill(hidden, -torch.inf)[None, None], Score())

    def init_state(
        self, batch: int, context: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> State:
        raise BidirectionalError


def longformer(plain: AttentionConfig) -> LongformerConfig:
    """From the config of the same genes without projections for global tokens; raises GeneError
    where they ask for what Longformer does not have."""
    absent = {
        "kv_heads": plain.kv_heads != plain.heads,
        "qk_norm": plain.qk_norm,
        "gate": plain.gate != "none",
        "score": plain.score != ScoreForm(),
        "features": plain.borrows,
        "biases on some projections only": plain.entry_bias != plain.exit_bias,
        "the normalised backbone": plain.normalised,
    }
    for name, asked in absent.items():
        if asked:
            raise GeneError(
                f"pattern=global with causal=false has the projections of Longformer, without"
                f" {name} (arXiv 2004.05150); pattern=sliding with sinks has none of its own"
            )
    assert isinstance(plain.pattern, Window)
    return LongformerConfig(
        plain.width,
        plain.heads,
        plain.head_dim,
        plain.pattern,
        plain.rope_theta,
        plain.rope_channels,
        plain.rope_form,
        plain.entry_bias,
    )
