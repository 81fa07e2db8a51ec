"""Softmax attention with axes for heads, pattern, position, norm of queries and keys, gate.

The equations (Vaswani et al., arXiv 1706.03762), per head: o_t = sum_s softmax_s(q_t . k_s /
sqrt(K)) v_s over the s that the pattern lets t see; y_t = W_o concat(o_t). Grouped key-value heads:
arXiv 2305.13245 (one for all: 1911.02150).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...kernels.letters import BTD
from ...kernels.short_conv import short_conv
from ..base import BidirectionalError, Carry, Cost, Operator, State
from ..norm import HeadsNorm, UnscaledNorm, make_norm
from ..position import Rotary
from ..rope import RopeForm
from ..sphere import Scale, unit
from .attend import attend
from .distance import DistanceForm
from .keyvalues import HeadedKeyValues, KeyValues, extend, init_cache
from .patterns import Pattern, Span, Window
from .score import ScoreForm, Scoring
from .span import AdaptiveSpan
from .tables import pairs


@dataclass(frozen=True)
class AttentionConfig:
    """Final numbers of an attention operator."""

    width: int
    heads: int
    kv_heads: int
    head_dim: int
    pattern: Pattern
    score: ScoreForm
    position: str
    """rope, rope3d, alibi, t5, xl or none."""
    rope_theta: float
    """0 where the position is not rope."""
    rope_channels: int
    """The channels of a head that are turned; 0 where the position is not rope."""
    rope_form: RopeForm
    distance: DistanceForm | None
    """The biases of alibi, t5 and xl."""
    qk_norm: bool
    norm_over: str
    """What the norm of queries and keys is over: the channels of one head, or of all together."""
    norm_scales: bool
    gate: str
    entry_bias: bool
    exit_bias: bool
    conv: int
    """Taps of the short convolution on queries, keys and values; 0 for none."""
    borrows: bool
    """No keys and values of its own: they come from an earlier slot."""
    normalised: bool = False
    """Queries and keys have length 1 and nGPT's learned scalings (arXiv 2410.01131)."""

    @property
    def query_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Channels of keys and values together that the operator computes itself."""
        return 0 if self.borrows else 2 * self.kv_heads * self.head_dim

    @property
    def mixed_width(self) -> int:
        """Channels of the queries, keys and values that one product makes."""
        return self.query_width + self.kv_width

    @property
    def gate_width(self) -> int:
        return self.query_width if self.gate == "sigmoid" else 0

    @property
    def causal(self) -> bool:
        return self.pattern.causal

    @property
    def span(self) -> Span | None:
        """The learned span of the pattern."""
        return self.pattern.span if isinstance(self.pattern, Window) else None

    @property
    def carries(self) -> str | None:
        """Raw scores can be added where heads and pattern agree."""
        return f"scores {self.heads} {self.pattern}" if self.score.residual else None

    def cost(self, context: int, dtype: torch.dtype) -> Cost:
        entry = self.mixed_width + self.gate_width
        products = self.width * (entry + self.query_width)
        conv = self.conv * self.mixed_width
        params = products + conv
        params += entry if self.entry_bias else 0
        params += self.width if self.exit_bias else 0
        params += self._normed(self.heads) + (0 if self.borrows else self._normed(self.kv_heads))
        if self.normalised:
            params += self.kv_heads * self.head_dim
        params += self.score.params(self.heads, self.head_dim, self.width)
        if self.span is not None:
            params += self.heads
        seen = self.pattern.seen(context) if self.causal else self._read(context)
        flops = 2.0 * (products + conv + 2 * self.query_width * seen)
        flops += self.score.flops(self.heads, self.width, seen)
        if self.distance is not None:
            params += self.distance.params
            flops += self.distance.flops(seen)
        cached = 0 if self.borrows else 2 * self.head_dim * self._cached(context)
        taps = max(self.conv - 1, 0) * self.mixed_width
        return Cost(params, params, flops, (cached + taps) * dtype.itemsize)

    def _normed(self, heads: int) -> int:
        """Scales of the norm of queries or keys."""
        if not (self.qk_norm and self.norm_scales):
            return 0
        return self.head_dim * (heads if self.norm_over == "all" else 1)

    def norm(self, heads: int) -> nn.Module | None:
        """The norm of queries or keys (..., heads, K), where there is one."""
        if not self.qk_norm:
            return None
        together = self.norm_over == "all"
        if not self.norm_scales:
            return UnscaledNorm(2 if together else 1)
        return HeadsNorm(heads, self.head_dim) if together else make_norm("rmsnorm", self.head_dim)

    def _cached(self, context: int) -> int:
        return self.pattern.cached(self.kv_heads, context)

    def _read(self, context: int) -> float:
        """The keys that a query of a whole pass multiplies, on average over heads too."""
        parts = self.pattern.parts(self.kv_heads)
        return sum(n * pairs(part, context) for n, part in parts) / (self.kv_heads * context)

    def build(self) -> Attention | BorrowingAttention:
        return BorrowingAttention(self) if self.borrows else Attention(self)


class _Common(nn.Module):
    """What attention has with keys and values of its own or another's: queries, scores, output."""

    def __init__(self, config: AttentionConfig) -> None:
        super().__init__()
        self.config = config
        entry = config.mixed_width + config.gate_width
        # One product for queries, keys, values and the gate, in this order.
        self.entry = nn.Linear(config.width, entry, bias=config.entry_bias)
        self.exit = nn.Linear(config.query_width, config.width, bias=config.exit_bias)
        self.q_norm = config.norm(config.heads)
        self.qk_scale: Scale | None = None
        if config.normalised:
            shape = (config.kv_heads, config.head_dim)
            self.qk_scale = Scale(shape, 1.0, config.width**-0.5)
        self.rotary: Rotary | None = None
        if config.rope_channels:
            self.rotary = Rotary(config.rope_channels, config.rope_theta, config.rope_form)
        self.position = None if config.distance is None else config.distance.build()
        self.span: AdaptiveSpan | None = None
        if config.span is not None:
            assert isinstance(config.pattern, Window)
            self.span = AdaptiveSpan(config.pattern, config.heads)
        self.scoring = Scoring(config.score, config.heads, config.head_dim, config.width)

    def _project(self, x: BTD) -> tuple[Tensor, Tensor | None]:
        """Queries, keys and values (B, T, mixed_width), and the gate's input."""
        mixed = self.entry(x)
        if self.config.gate == "none":
            return mixed, None
        mixed, gate = torch.split(mixed, [self.config.mixed_width, self.config.gate_width], -1)
        return mixed, gate

    def _rescaled(self, qk: Tensor) -> Tensor:
        """nGPT's unit(q) s_qk and unit(k) s_qk (eq. 15, 16), after RoPE; qk (B, T, H or H + G, K).

        Every head has its s_qk; queries that share a key-value head share its. The score
        has the factor sqrt(K) there and 1/sqrt(K) here, so both are multiplied by sqrt(K) too.
        """
        if self.qk_scale is None:
            return qk
        config = self.config
        scale = self.qk_scale() * config.head_dim**0.5
        queries = scale.repeat_interleave(config.heads // config.kv_heads, 0)
        scales = torch.cat((queries, scale))[: qk.shape[2]]
        return unit(qk) * scales.to(qk.dtype)

    def _attended(
        self,
        x: BTD,
        q: Tensor,
        kv: KeyValues | HeadedKeyValues,
        gate: Tensor | None,
        carry: Carry | None,
    ) -> Tensor:
        """What the heads make, (B, T, H K), before the last product; x are the call's tokens, q is
        (B, T, H, K), normed and turned."""
        if self.position is not None:
            q = self.position.queries(q)
        score = self.scoring.begin(carry)
        biases = self.position if self.span is None else self.span.beside(self.position)
        out = attend(q.transpose(1, 2), kv, self.config.pattern, score, biases)
        out = self.scoring.finish(out.transpose(1, 2), x).flatten(2)
        if gate is not None:
            out = out * torch.sigmoid(gate)
        return out

    def auxiliary_loss(self) -> Tensor | None:
        """What training adds to the loss: the balance of routed heads of the last training call,
        the penalty on learned spans; None where there is neither."""
        router = self.scoring.heads
        loss = None if router is None else router.auxiliary_loss()
        if self.span is None:
            return loss
        return self.span.penalty() if loss is None else loss + self.span.penalty()

    def statistics(self) -> dict[str, list[float]]:
        """`head_load`: the share of tokens that chose each routed head, where heads are routed."""
        router = self.scoring.heads
        return {} if router is None else {"head_load": router.load()}


class Attention(_Common, Operator):
    """Attention over the sequence's own keys and values.

    Its state is a cache of keys (turned already, with RoPE) and values. Decoding writes into it in
    place, so run it without gradients, or without a backward pass through more than one call.
    """

    def __init__(self, config: AttentionConfig) -> None:
        super().__init__(config)
        self.k_norm = config.norm(config.kv_heads)
        self.taps: nn.Parameter | None = None
        if config.conv:
            self.taps = nn.Parameter(torch.empty(config.mixed_width, config.conv))
            nn.init.uniform_(self.taps, -(config.conv**-0.5), config.conv**-0.5)

    def forward(
        self, x: BTD, state: State | None = None, carry: Carry | None = None
    ) -> tuple[BTD, State | None]:
        y, state, _ = self.forward_lending(x, state, carry)
        return y, state

    def forward_lending(
        self, x: BTD, state: State | None = None, carry: Carry | None = None
    ) -> tuple[BTD, State | None, KeyValues | HeadedKeyValues]:
        """As `forward`, and the keys and values that later slots may use in the same call.

        Raises as `forward_heads`.
        """
        out, state, kv = self.forward_heads(x, state, carry)
        return self.exit(out), state, kv

    def forward_heads(
        self,
        x: BTD,
        state: State | None = None,
        carry: Carry | None = None,
        added: Tensor | None = None,
    ) -> tuple[Tensor, State | None, KeyValues | HeadedKeyValues]:
        """As `forward_lending`, with what the heads make, (B, T, H K), before the last product.

        `added` (B, T, mixed_width) is what an adapter adds to queries, keys and values.

        Raises ContextError where the tokens do not fit in the state's cache, BidirectionalError for
        a state where the pattern is not causal.
        """
        config = self.config
        if state is not None and not config.causal:
            raise BidirectionalError
        mixed, gate = self._project(x)
        mixed = mixed if added is None else mixed + added
        tensors = {} if state is None else dict(state.tensors)
        if self.taps is not None:
            mixed, past = short_conv(mixed, self.taps, None, tensors.get("conv"))
            if state is not None:
                tensors["conv"] = past
        q, own = self._heads(mixed, 0 if state is None else state.length)
        kv: KeyValues | HeadedKeyValues = own
        if state is not None:
            kv = extend(state, own, config.pattern)
            state = State(state.length + x.shape[1], tensors)
        return self._attended(x, q, kv, gate, carry), state, kv

    def _heads(self, mixed: Tensor, start: int) -> tuple[Tensor, KeyValues]:
        """Queries (B, T, H, K) and keys and values from their product (B, T, mixed_width), normed
        and turned; the first token's position is `start`."""
        config = self.config
        heads = mixed.unflatten(-1, (-1, config.head_dim))  # type: ignore[no-untyped-call]
        counts = [config.heads, config.kv_heads, config.kv_heads]
        if self.q_norm is not None and self.k_norm is not None:
            q, k, v = torch.split(heads, counts, 2)
            qk = torch.cat((self.q_norm(q), self.k_norm(k)), 2)
        else:
            qk, v = torch.split(heads, [sum(counts[:2]), config.kv_heads], 2)
        if self.rotary is not None:
            qk = self.rotary(qk, start)
        q, k = torch.split(self._rescaled(qk), counts[:2], 2)
        stop = start + mixed.shape[1] if start else None
        return q, KeyValues(k.transpose(1, 2), v.transpose(1, 2), stop)

    def init_state(
        self, batch: int, context: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> State:
        """A cache of what the pattern needs of `context` tokens."""
        config = self.config
        if not config.causal:
            raise BidirectionalError
        pattern, heads, width = config.pattern, config.kv_heads, config.head_dim
        tensors = init_cache(pattern, batch, heads, width, context, dtype, device)
        if config.conv:
            past = (batch, config.mixed_width, config.conv - 1)
            tensors["conv"] = torch.zeros(past, dtype=dtype, device=device)
        return State(0, tensors)


class BorrowingAttention(_Common):
    """Causal attention over the keys and values of an earlier slot (arXiv 2405.12981)."""

    def forward_borrowing(self, x: BTD, kv: KeyValues | HeadedKeyValues) -> BTD:
        """x (B, T, D) are the tokens of the call in which `kv` was lent."""
        mixed, gate = self._project(x)
        q = mixed.reshape(*x.shape[:2], -1, self.config.head_dim)
        if self.q_norm is not None:
            q = self.q_norm(q)
        if self.rotary is not None:
            q = self.rotary(q, kv.end - x.shape[1])
        return self.exit(self._attended(x, self._rescaled(q), kv, gate, None))  # type: ignore[no-any-return]
