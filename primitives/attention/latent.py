"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1 and equations 37 to 47).

c_t = norm(W_DKV x_t) is the latent from which every head's keys and values are made, k_t = [W_UK
c_t; r_t] and v_t = W_UV c_t, and r_t = rope(W_KR x_t) is one rotary key for all heads. Queries
[q; rope(q')] come from x_t, or from a latent of their own, norm(W_DQ x_t). Scores are divided by
sqrt(K + R), for K channels of a head and R rotary ones.

The training form makes keys and values; the decode form puts W_UK into the query and W_UV behind
the weighted sum, so that all heads attend to one cache of (c_t, r_t), which is all that is stored.

RoPE turns pairs (i, i + R/2), where DeepSeek's weights have them at (2i, 2i + 1): the same function
after a permutation of the rows that make r_t and q'. Without RoPE r_t is a plain key for all heads,
as in Kimi Linear (arXiv 2510.26692).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.letters import BTD
from ..base import Axis, Cost, Gene, GeneError, Operator, Point, Site, State
from ..genes import choice, flag, whole
from ..norm import make_norm
from ..position import Rotary
from ..rope import RopeForm
from .attend import attend
from .heads import head_counts
from .keyvalues import HeadedKeyValues, KeyValues, extend
from .pattern_axes import pattern_of
from .patterns import Pattern, pattern_problem
from .position_axes import ROTARY, position_of, rope_of
from .score import ScoreForm, Scoring
from .score_axes import score_form

LATENT_PATTERNS = ("full", "sliding", "global", "dilated", "chunked", "bigbird")
"""Those that show all heads the same tokens, by positions alone: one cache serves all heads."""


@dataclass(frozen=True)
class LatentConfig:
    """Final numbers."""

    width: int
    heads: int
    head_dim: int
    """K: a head's query and key channels that are made from latents."""
    value_dim: int
    latent: int
    rope_dim: int
    """R: a head's query channels that meet the rotary key."""
    q_rank: int
    """0: queries come from the input."""
    pattern: Pattern
    score: ScoreForm
    rope_theta: float
    rope_channels: int
    """Of the R channels those that are turned; 0 for none."""
    rope_form: RopeForm
    gate: str
    bias: bool
    borrows: bool
    """No latents of its own: they come from an earlier slot."""

    @property
    def query_dim(self) -> int:
        """Channels of a head's queries and keys."""
        return self.head_dim + self.rope_dim

    @property
    def cached(self) -> int:
        """Channels of one token in the cache."""
        return self.latent + self.rope_dim

    @property
    def output_width(self) -> int:
        return self.heads * self.value_dim

    def parts(self) -> list[int]:
        """Channels that the first product makes: queries or their latent, latents and rotary key,
        gate."""
        queries = self.q_rank or self.heads * self.query_dim
        own = 0 if self.borrows else self.cached
        return [queries, own, self.output_width if self.gate == "sigmoid" else 0]

    def _products(self) -> int:
        """Weights of the projections, which both forms use once per token."""
        products = self.width * (sum(self.parts()) + self.output_width)
        products += self.q_rank * self.heads * self.query_dim
        return products + self.latent * self.heads * (self.head_dim + self.value_dim)

    def _flops(self, channels: int, context: int) -> float:
        """Per token, with scores and sums over so many channels of a head."""
        seen = self.pattern.seen(context)
        own = self.score.flops(self.heads, self.width, seen)
        return 2.0 * (self._products() + self.heads * channels * seen) + own

    def training_flops(self, context: int) -> float:
        """See base.training_flops: keys and values of all heads are made."""
        return self._flops(self.query_dim + self.value_dim, context)

    def cost(self, context: int, dtype: torch.dtype) -> Cost:
        """See base.Config; decoding is counted in the form that does not make keys and values."""
        entry = sum(self.parts())
        params = self._products() + self.q_rank + (0 if self.borrows else self.latent)
        params += entry + self.width if self.bias else 0
        params += self.score.params(self.heads, self.value_dim, self.width)
        flops = self._flops(self.cached + self.latent, context)
        kept = 0 if self.borrows else self.cached * self.pattern.cached(1, context)
        return Cost(params, params, flops, kept * dtype.itemsize)

    def build(self) -> LatentAttention | BorrowingLatentAttention:
        """See base.Config."""
        return BorrowingLatentAttention(self) if self.borrows else LatentAttention(self)


class _Common(nn.Module):
    """What there is with latents of its own or another's."""

    def __init__(self, config: LatentConfig) -> None:
        super().__init__()
        c = self.config = config
        self.entry = nn.Linear(c.width, sum(c.parts()), bias=c.bias)
        self.q_norm = make_norm("rmsnorm", c.q_rank) if c.q_rank else None
        self.q_up: nn.Linear | None = None
        if c.q_rank:
            self.q_up = nn.Linear(c.q_rank, c.heads * c.query_dim, bias=False)
        # Per head the rows of its keys, then those of its values.
        self.kv_up = nn.Linear(c.latent, c.heads * (c.head_dim + c.value_dim), bias=False)
        self.exit = nn.Linear(c.output_width, c.width, bias=c.bias)
        self.rotary: Rotary | None = None
        if c.rope_channels:
            self.rotary = Rotary(c.rope_channels, c.rope_theta, c.rope_form)
        self.scoring = Scoring(c.score, c.heads, c.value_dim, c.width)

    def _queries(self, made: Tensor, start: int) -> Tensor:
        """What `entry` made for queries, (B, T, .), to (B, T, H, K + R), turned."""
        c = self.config
        if self.q_up is not None and self.q_norm is not None:
            made = self.q_up(self.q_norm(made))
        q = made.reshape(*made.shape[:2], c.heads, c.query_dim)
        if self.rotary is None:
            return q
        plain, turned = torch.split(q, [c.head_dim, c.rope_dim], -1)
        return torch.cat((plain, self.rotary(turned, start)), -1)

    def _output(self, x: BTD, q: Tensor, kv: KeyValues, gate: Tensor) -> BTD:
        """q (B, T, H, K + R); the keys of `kv` are latents and rotary keys, (B, 1, S, L + R)."""
        fresh = kv.tokens == kv.end == x.shape[1] > 1
        form = self._expanded if fresh else self._absorbed
        out = self.scoring.finish(form(q.transpose(1, 2), kv).transpose(1, 2), x).flatten(2)
        if self.config.gate == "sigmoid":
            out = out * torch.sigmoid(gate)
        return self.exit(out)  # type: ignore[no-any-return]

    def _expanded(self, q: Tensor, kv: KeyValues) -> Tensor:
        """The training form: keys and values of every head, (B, H, T, V)."""
        c = self.config
        latents, turned = torch.split(kv.keys[:, 0].to(q.dtype), [c.latent, c.rope_dim], -1)
        made = self.kv_up(latents).reshape(*latents.shape[:2], c.heads, -1).transpose(1, 2)
        keys, values = torch.split(made, [c.head_dim, c.value_dim], -1)
        keys = torch.cat((keys, turned.unsqueeze(1).expand(-1, c.heads, -1, -1)), -1)
        # Torch's quick kernels want values as wide as keys.
        values = F.pad(values, (0, max(c.query_dim - c.value_dim, 0)))
        out = attend(q, KeyValues(keys, values), c.pattern, self.scoring.begin(None), None)
        return out[..., : c.value_dim]

    def _absorbed(self, q: Tensor, kv: KeyValues) -> Tensor:
        """The decode form: all heads attend to the latents themselves, (B, H, T, V)."""
        c = self.config
        weight = self.kv_up.weight.view(c.heads, -1, c.latent).to(q.dtype)
        up_keys, up_values = torch.split(weight, [c.head_dim, c.value_dim], 1)
        plain, turned = torch.split(q, [c.head_dim, c.rope_dim], -1)
        # `attend` divides by the root of the width that it sees.
        scale = (c.cached / c.query_dim) ** 0.5
        q = torch.cat((plain @ up_keys, turned), -1) * scale
        cache = replace(kv, values=kv.keys[..., : c.latent])
        out = attend(q, cache, c.pattern, self.scoring.begin(None), None)
        return out @ up_values.mT

    def auxiliary_loss(self) -> Tensor | None:
        """What training adds to the loss; None where no head is routed."""
        router = self.scoring.heads
        return None if router is None else router.auxiliary_loss()

    def statistics(self) -> dict[str, list[float]]:
        """As plain attention's."""
        router = self.scoring.heads
        return {} if router is None else {"head_load": router.load()}


class LatentAttention(_Common, Operator):
    """See the module. Its state is `keys` (B, 1, S, L + R): latents, normed, and rotary keys."""

    def __init__(self, config: LatentConfig) -> None:
        super().__init__(config)
        self.kv_norm = make_norm("rmsnorm", config.latent)

    def forward(self, x: BTD, state: State | None = None) -> tuple[BTD, State | None]:
        y, state, _ = self.forward_lending(x, state)
        return y, state

    def forward_lending(
        self, x: BTD, state: State | None = None
    ) -> tuple[BTD, State | None, KeyValues]:
        """As `forward`, and the latents that later slots may use in the same call.

        Raises ContextError where the tokens do not fit in the state's cache.
        """
        c = self.config
        start = 0 if state is None else state.length
        queries, made, gate = torch.split(self.entry(x), c.parts(), -1)
        latents, turned = torch.split(made, [c.latent, c.rope_dim], -1)
        if self.rotary is not None:
            turned = self.rotary(turned.unsqueeze(2), start).squeeze(2)
        keys = torch.cat((self.kv_norm(latents), turned), -1).unsqueeze(1)
        end = start + x.shape[1]
        # Values are part of the keys: here they have no channels, and nor has their cache.
        kv = KeyValues(keys, keys.new_empty(*keys.shape[:3], 0), end)
        if state is not None:
            held = state.tensors["keys"]
            cache = {"keys": held, "values": held.new_empty(*held.shape[:3], 0)}
            seen = extend(State(start, cache), kv, c.pattern)
            assert isinstance(seen, KeyValues)
            kv, state = seen, State(end, state.tensors)
        return self._output(x, self._queries(queries, start), kv, gate), state, kv

    def init_state(
        self, batch: int, context: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> State:
        """A cache of what the pattern needs of `context` tokens."""
        c = self.config
        shape = (batch, 1, c.pattern.cached(1, context), c.cached)
        return State(0, {"keys": torch.zeros(shape, dtype=dtype, device=device)})


class BorrowingLatentAttention(_Common):
    """Latent attention over the latents and rotary keys of an earlier slot, with its own W_UK and
    W_UV."""

    def forward_borrowing(self, x: BTD, kv: KeyValues | HeadedKeyValues) -> BTD:
        """x (B, T, D) are the tokens of the call in which `kv` was lent."""
        assert isinstance(kv, KeyValues)
        queries, _, gate = torch.split(self.entry(x), self.config.parts(), -1)
        return self._output(x, self._queries(queries, kv.end - x.shape[1]), kv, gate)


def latent_lending_problem(lender: LatentConfig, borrower: LatentConfig) -> str | None:
    """Why the borrower cannot use the lender's latents, in a sentence; None if it can."""
    for name in ("latent", "rope_dim", "rope_theta", "rope_channels", "rope_form"):
        theirs, ours = getattr(lender, name), getattr(borrower, name)
        if theirs != ours:
            return f"the lender has {name}={theirs} and the borrower {name}={ours}; they must agree"
    return pattern_problem(lender.pattern, borrower.pattern)


def configure_latent(site: Site, genes: Mapping[str, Gene]) -> LatentConfig:
    """The config of kv=latent. Raises GeneError."""
    name, position = choice(genes, "pattern"), position_of(site, genes)
    if name not in LATENT_PATTERNS or not flag(genes, "causal"):
        shown = name if flag(genes, "causal") else "causal=false"
        raise GeneError(
            "kv=latent has one cache for all heads, of earlier tokens, and goes with pattern="
            f"{', '.join(LATENT_PATTERNS)}, not {shown}"
        )
    if position not in (*ROTARY, "none"):
        raise GeneError(f"kv=latent goes with position=rope, rope3d or none, not {position}")
    if whole(genes, "kv_heads") or flag(genes, "qk_norm") or whole(genes, "conv"):
        raise GeneError(
            "kv=latent makes the keys and values of all heads from one normed latent: it goes with"
            " kv_heads=0, qk_norm=false and conv=0"
        )
    heads, _, head_dim = head_counts(site, genes)
    rope_dim = whole(genes, "rope_dim")
    if rope_dim == 0 and position in ROTARY:
        # Half of a head, in whole pairs.
        rope_dim = max(2, (head_dim + 2) // 4 * 2)
    channels, theta, form = rope_of(genes, position, rope_dim) if rope_dim else (0, 0.0, RopeForm())
    if form.scaling == "yarn":
        raise GeneError(
            "kv=latent goes with rope_scaling=none, linear or ntk: yarn here warms the channels"
            " that it turns, which are only a part of these queries and keys"
        )
    score = score_form(site, genes, heads, heads)
    if score.kind == "differential" or score.residual:
        raise GeneError("kv=latent has a score=softmax or sigmoid, and no residual_scores")
    return LatentConfig(
        width=site.width,
        heads=heads,
        head_dim=head_dim,
        value_dim=whole(genes, "value_dim") or head_dim,
        latent=whole(genes, "latent") or 4 * head_dim,
        rope_dim=rope_dim,
        q_rank=whole(genes, "q_rank"),
        pattern=pattern_of(genes, 1, position),
        score=score,
        rope_theta=theta,
        rope_channels=channels,
        rope_form=form,
        gate=choice(genes, "gate"),
        bias=flag(genes, "bias"),
        borrows=site.borrows,
    )


LATENT_AXES = (
    Axis(
        "kv",
        "heads",
        "what keys and values are made from and what is cached: heads, each its own; latent, one"
        " low-rank vector per token and a rotary key for all heads (MLA, arXiv 2405.04434)",
        options=("heads", "latent"),
    ),
    Axis(
        "latent",
        0,
        "kv=latent: channels of the latent; 0 for 4 * head_dim, as in DeepSeek-V2",
        low=0.0,
        high=65536.0,
        grows="head",
    ),
    Axis(
        "rope_dim",
        0,
        "kv=latent: channels of the key that all heads share, which RoPE turns where the position"
        " is rope; 0 for half of head_dim with rope, for no such key without",
        low=0.0,
        high=1024.0,
        grows="head",
    ),
    Axis(
        "q_rank",
        0,
        "kv=latent: channels of the latent of the queries; 0 for none",
        low=0.0,
        high=65536.0,
        grows="width",
    ),
    Axis(
        "value_dim",
        0,
        "kv=latent: a head's values; 0 for head_dim",
        low=0.0,
        high=1024.0,
        grows="head",
    ),
)

LATENT_POINTS = (
    Point(
        "mla",
        {"kv": "latent"},
        "DeepSeek-V2, arXiv 2405.04434",
        "q_rank compresses the queries, as the large DeepSeek models do and V2-Lite does not",
    ),
)
