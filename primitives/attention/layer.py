"""Softmax attention with axes for heads, pattern, position, norm of queries and keys, gate.

The equations (Vaswani et al., arXiv 1706.03762), per head: o_t = sum_s softmax_s(q_t . k_s /
sqrt(K)) v_s over the s that the pattern lets t see; y_t = W_o concat(o_t). Grouped key-value heads:
arXiv 2305.13245 (one for all: 1911.02150).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...kernels.letters import BTD
from ...kernels.short_conv import short_conv
from ..base import Axis, Cost, Gene, GeneError, Liv, Operator, Point, Primitive, Site, State
from ..genes import choice, flag, number, whole
from ..norm import make_norm
from ..position import Rotary, alibi_slopes
from .keyvalues import KeyValues, capacity, extend, init_cache
from .scores import attend


@dataclass(frozen=True)
class AttentionConfig:
    """Final numbers of an attention operator."""

    width: int
    heads: int
    kv_heads: int
    head_dim: int
    window: int | None
    """Tokens that a query sees, itself included; None for all."""
    position: str
    """rope, alibi or none."""
    rope_theta: float
    """0 where the position is not rope."""
    qk_norm: bool
    gate: str
    bias: bool
    conv: int
    """Taps of the short convolution on queries, keys and values; 0 for none."""
    borrows: bool
    """No keys and values of its own: they come from an earlier slot."""

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

    def cost(self, context: int, dtype: torch.dtype) -> Cost:
        entry = self.mixed_width + self.gate_width
        products = self.width * (entry + self.query_width)
        conv = self.conv * self.mixed_width
        params = products + conv
        if self.bias:
            params += entry + self.width
        if self.qk_norm:
            params += self.head_dim if self.borrows else 2 * self.head_dim
        scores = 2 * self.query_width * seen_on_average(context, self.window)
        cached = self.kv_width * capacity(context, self.window)
        taps = max(self.conv - 1, 0) * self.mixed_width
        return Cost(
            params, params, 2.0 * (products + conv + scores), (cached + taps) * dtype.itemsize
        )

    def build(self) -> Attention | BorrowingAttention:
        return BorrowingAttention(self) if self.borrows else Attention(self)


def seen_on_average(context: int, window: int | None) -> float:
    """The tokens that a query sees, on average over the positions 1..context."""
    near = context if window is None else min(context, window)
    return (near * (near + 1) / 2 + (context - near) * near) / context


class _Common(nn.Module):
    """What attention has with keys and values of its own or another's: queries, scores, output."""

    slopes: Tensor | None

    def __init__(self, config: AttentionConfig) -> None:
        super().__init__()
        self.config = config
        entry = config.mixed_width + config.gate_width
        # One product for queries, keys, values and the gate, in this order.
        self.entry = nn.Linear(config.width, entry, bias=config.bias)
        self.exit = nn.Linear(config.query_width, config.width, bias=config.bias)
        self.q_norm = make_norm("rmsnorm", config.head_dim) if config.qk_norm else None
        rope = config.position == "rope"
        self.rotary = Rotary(config.head_dim, config.rope_theta) if rope else None
        slopes = torch.tensor(alibi_slopes(config.heads)) if config.position == "alibi" else None
        self.register_buffer("slopes", slopes, persistent=False)

    def _project(self, x: BTD) -> tuple[Tensor, Tensor | None]:
        """Queries, keys and values (B, T, mixed_width), and the gate's input."""
        mixed = self.entry(x)
        if self.config.gate == "none":
            return mixed, None
        mixed, gate = torch.split(mixed, [self.config.mixed_width, self.config.gate_width], -1)
        return mixed, gate

    def _output(self, q: Tensor, kv: KeyValues, gate: Tensor | None) -> BTD:
        """q is (B, T, H, K), normed and turned."""
        out = attend(q.transpose(1, 2), kv, self.config.window, self.slopes)
        out = out.transpose(1, 2).flatten(2)
        if gate is not None:
            out = out * torch.sigmoid(gate)
        return self.exit(out)  # type: ignore[no-any-return]


class Attention(_Common, Operator):
    """Causal attention over the sequence's own keys and values.

    Its state is a cache of keys (turned already, with RoPE) and values. Decoding writes into it in
    place, so run it without gradients, or without a backward pass through more than one call.
    """

    def __init__(self, config: AttentionConfig) -> None:
        super().__init__(config)
        self.k_norm = make_norm("rmsnorm", config.head_dim) if config.qk_norm else None
        self.taps: nn.Parameter | None = None
        if config.conv:
            self.taps = nn.Parameter(torch.empty(config.mixed_width, config.conv))
            nn.init.uniform_(self.taps, -(config.conv**-0.5), config.conv**-0.5)

    def forward(self, x: BTD, state: State | None = None) -> tuple[BTD, State | None]:
        y, state, _ = self.forward_lending(x, state)
        return y, state

    def forward_lending(
        self, x: BTD, state: State | None = None
    ) -> tuple[BTD, State | None, KeyValues]:
        """As `forward`, and the keys and values that later slots may use in the same call.

        Raises ContextError where the tokens do not fit in the state's cache.
        """
        config = self.config
        mixed, gate = self._project(x)
        tensors = {} if state is None else dict(state.tensors)
        if self.taps is not None:
            mixed, past = short_conv(mixed, self.taps, None, tensors.get("conv"))
            if state is not None:
                tensors["conv"] = past
        heads = mixed.reshape(*x.shape[:2], -1, config.head_dim)
        counts = [config.heads, config.kv_heads, config.kv_heads]
        if self.q_norm is not None and self.k_norm is not None:
            q, k, v = torch.split(heads, counts, 2)
            qk = torch.cat((self.q_norm(q), self.k_norm(k)), 2)
        else:
            qk, v = torch.split(heads, [sum(counts[:2]), config.kv_heads], 2)
        if self.rotary is not None:
            qk = self.rotary(qk, 0 if state is None else state.length)
        q, k = torch.split(qk, counts[:2], 2)
        kv = KeyValues(k.transpose(1, 2), v.transpose(1, 2))
        if state is not None:
            kv = KeyValues(kv.keys, kv.values, state.length)
            kv = extend(state, kv, config.window)
            state = State(state.length + x.shape[1], tensors)
        return self._output(q, kv, gate), state, kv

    def init_state(
        self, batch: int, context: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> State:
        """A cache for `context` tokens; sliding attention keeps a ring of its window."""
        config = self.config
        size = capacity(context, config.window)
        tensors = init_cache(batch, config.kv_heads, config.head_dim, size, dtype, device)
        if config.conv:
            past = (batch, config.mixed_width, config.conv - 1)
            tensors["conv"] = torch.zeros(past, dtype=dtype, device=device)
        return State(0, tensors)


class BorrowingAttention(_Common):
    """Causal attention over the keys and values of an earlier slot (arXiv 2405.12981)."""

    def forward_borrowing(self, x: BTD, kv: KeyValues) -> BTD:
        """x (B, T, D) are the tokens of the call in which `kv` was lent."""
        mixed, gate = self._project(x)
        q = mixed.reshape(*x.shape[:2], -1, self.config.head_dim)
        if self.q_norm is not None:
            q = self.q_norm(q)
        if self.rotary is not None:
            q = self.rotary(q, kv.end - x.shape[1])
        return self._output(q, kv, gate)


def lending_problem(lender: object, borrower: object) -> str | None:
    """Why `borrower` cannot use the keys and values of `lender`, in a sentence; None if it can.

    Both are configs.
    """
    for role, config in (("lends", lender), ("borrows", borrower)):
        if not isinstance(config, AttentionConfig):
            return f"only attention {role} keys and values"
    assert isinstance(lender, AttentionConfig)
    assert isinstance(borrower, AttentionConfig)
    for name in ("kv_heads", "head_dim", "position", "rope_theta"):
        theirs, ours = getattr(lender, name), getattr(borrower, name)
        if theirs != ours:
            return f"the lender has {name}={theirs} and the borrower {name}={ours}; they must agree"
    if lender.window is not None and (borrower.window is None or borrower.window > lender.window):
        sees = "every token" if borrower.window is None else f"{borrower.window} tokens"
        return f"the borrower sees {sees} and the lender keeps {lender.window}"
    return None


def configure(site: Site, genes: Mapping[str, Gene]) -> AttentionConfig:
    heads, head_dim = whole(genes, "heads"), whole(genes, "head_dim")
    kv_heads = whole(genes, "kv_heads") or heads
    if heads % kv_heads:
        raise GeneError(f"kv_heads={kv_heads} does not divide heads={heads}")
    if head_dim == 0:
        if site.width % heads:
            raise GeneError(
                f"heads={heads} does not divide the width {site.width}; set head_dim as well"
            )
        head_dim = site.width // heads
    position = choice(genes, "position")
    if position == "inherit":
        # A learned table is added to the embeddings: nothing is left to do inside.
        position = "none" if site.position == "learned" else site.position
    if position == "rope" and head_dim % 2:
        raise GeneError(f"head_dim={head_dim} is odd, and rope turns pairs of channels")
    return AttentionConfig(
        width=site.width,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        window=whole(genes, "window") if choice(genes, "pattern") == "sliding" else None,
        position=position,
        rope_theta=number(genes, "rope_theta") if position == "rope" else 0.0,
        qk_norm=flag(genes, "qk_norm"),
        gate=choice(genes, "gate"),
        bias=flag(genes, "bias"),
        conv=0 if site.borrows else whole(genes, "conv"),
        borrows=site.borrows,
    )


ATTENTION = Primitive(
    name="attention",
    kind="mixer",
    summary="softmax attention over all earlier tokens or a window of them",
    source="Vaswani et al., Attention Is All You Need, arXiv 1706.03762",
    liv=Liv("dense", "low-rank", "none", "softmax", "grouped"),
    axes=(
        Axis("heads", 4, "query heads", low=1.0, high=1024.0, search=(1, 2, 4, 8)),
        Axis(
            "kv_heads",
            0,
            "key-value heads, a divisor of heads; 0 for as many as heads",
            low=0.0,
            high=1024.0,
            search=(0, 1, 2),
        ),
        Axis("head_dim", 0, "width of a head; 0 for width / heads", low=0.0, high=1024.0),
        Axis(
            "pattern",
            "full",
            "which earlier tokens a token sees",
            options=("full", "sliding"),
            search=("full", "sliding"),
        ),
        Axis(
            "window",
            128,
            "tokens that sliding attention sees, the token itself included",
            low=1.0,
            search=(32, 64, 128, 256),
        ),
        Axis(
            "position",
            "inherit",
            "position encoding inside; inherit takes the backbone's (learned: none inside)",
            options=("inherit", "rope", "alibi", "none"),
        ),
        Axis("rope_theta", 10000.0, "base of RoPE's wavelengths", low=1.0),
        Axis(
            "qk_norm",
            False,
            "RMSNorm on every head's queries and keys, as in Qwen3 (arXiv 2505.09388)",
            options=(False, True),
            search=(False, True),
        ),
        Axis(
            "gate",
            "none",
            "gate on the heads' outputs before the last projection (arXiv 2505.06708)",
            options=("none", "sigmoid"),
            search=("none", "sigmoid"),
        ),
        Axis("bias", False, "biases on the projections", options=(False, True)),
        Axis(
            "conv",
            0,
            "taps of a short convolution on queries, keys and values (STAR's SA-2, arXiv "
            "2411.17800), 0 for none; an operator that borrows its keys and values has none",
            low=0.0,
            high=16.0,
            search=(0, 3, 4),
        ),
    ),
    configure=configure,
    points=(
        Point("mha", {"kv_heads": 0}, "Vaswani et al., arXiv 1706.03762"),
        Point("gqa", {"kv_heads": 2}, "Ainslie et al., arXiv 2305.13245"),
        Point("mqa", {"kv_heads": 1}, "Shazeer, arXiv 1911.02150"),
        Point("swa", {"pattern": "sliding"}, "Longformer 2004.05150; Mistral 2310.06825"),
    ),
    lends=True,
    lending_problem=lending_problem,
)
