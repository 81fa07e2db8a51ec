"""SPARSEK attention: a window, and the k best of what has left it (arXiv 2406.16747).

A linear scorer gives every token one score per key-value head, u_t = w . x_t + slope * t, that does
not depend on the query. A query attends to its window of w tokens and, of the tokens before, to the
k with the largest u, in one softmax; the values of those k are multiplied by their gates in
SPARSEK(u, k), through which the scorer learns (Lou et al., with a sliding window). A token that is
not among the best is never again, so it is forgotten: the cache holds the window, the k best, and
of older tokens no more than their scores.

The slope of the position is learned here and begins at zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.letters import BTD
from ..base import Cost, Gene, Site, State, state_dtype
from ..genes import only, whole
from ..position import ContextError
from .buckets import attend_in_buckets, seen, take
from .heads import HeadsConfig, HeadsOperator, heads_config
from .running_topk import Best, Held, running_best

HIDDEN = -1e30
"""The score of a place that holds no key: finite, so that a row of such has gradients."""

NAMES = ("keys", "values", "scores")


@dataclass(frozen=True)
class SparseKConfig(HeadsConfig):
    """Final numbers."""

    window: int
    selected: int
    """k."""

    def older(self, context: int) -> int:
        """Tokens that have left the window at the sequence's end."""
        return max(context - self.window, 0)

    def cost(self, context: int, dtype: torch.dtype) -> Cost:
        """See base.Config."""
        params, products = self.linear(self.query_width + 2 * self.kv_width)
        scorer = self.width * self.kv_heads
        older = self.older(context)
        far = seen(older, self.selected - 1) * older / context if older else 0.0
        scores = 2 * self.query_width * (seen(context, self.window - 1) + far)
        near, best = min(self.window, context), min(self.selected, older)
        keys = 2 * self.kv_width * (near + best) * dtype.itemsize
        numbers = self.kv_heads * (near + best + older) * state_dtype(dtype).itemsize
        total = params + scorer + self.kv_heads
        return Cost(total, total, 2.0 * (products + scorer + scores), keys + numbers)

    def build(self) -> SparseKAttention:
        """See base.Config."""
        return SparseKAttention(self)


class SparseKAttention(HeadsOperator):
    """See the module. `entry` makes queries, keys and values."""

    def __init__(self, config: SparseKConfig) -> None:
        super().__init__(config, [config.query_width, config.kv_width, config.kv_width])
        self.config = config
        self.scorer = nn.Linear(config.width, config.kv_heads, bias=False)
        self.slope = nn.Parameter(torch.zeros(config.kv_heads))

    def rank(self, x: BTD, start: int) -> Tensor:
        """u, (B, G, T), in float32 at least."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            scores = F.linear(x.to(dtype), self.scorer.weight.to(dtype)).mT
        at = torch.arange(start, start + x.shape[1], device=x.device, dtype=dtype)
        return scores + self.slope.to(dtype)[:, None] * at

    def forward(self, x: BTD, state: State | None = None) -> tuple[BTD, State | None]:
        config, tokens = self.config, x.shape[1]
        start = 0 if state is None else state.length
        (q, k, v), gate = self.project(x)
        queries, keys, values = self.turn(q, start), self.turn(k, start), v.transpose(1, 2)
        scores = self.rank(x, start)
        if state is None:
            context = tokens
            ring: dict[str, Tensor] = {}
        else:
            context, ring = _room(state), state.tensors
            if start + tokens > context:
                raise ContextError(
                    f"the cache of attention holds {context} tokens; this call needs "
                    f"{start + tokens}"
                )
        near, best = min(config.window, start), min(config.selected, config.older(context))
        own = keys
        if state is not None:
            # The best so far, the window before this call, the call.
            at = torch.arange(start - near, start, device=x.device) % ring["near_keys"].shape[2]
            past = {name: ring["near_" + name].index_select(2, at) for name in NAMES}
            keys = torch.cat((ring["keys"].to(own.dtype), past["keys"].to(own.dtype), own), 2)
            values = torch.cat(
                (ring["values"].to(own.dtype), past["values"].to(own.dtype), values), 2
            )
            scores = torch.cat((past["scores"].to(scores.dtype), scores), 2)
        first = 0 if state is None else best
        out, total = self._near(queries, keys[:, :, first:], values[:, :, first:])
        if config.older(start + tokens) > 0:
            chosen, held = self.choose(scores, ring, near, tokens, first, best)
            out = _join(out, total, *self._far(queries, keys, values, chosen))
            if state is not None:
                _keep_best(ring, held, keys, values)
        if state is not None:
            _keep_near(ring, start, own, values[:, :, -tokens:], scores[:, :, -tokens:])
            state = State(start + tokens, state.tensors)
        return self.output(out, gate), state

    def _near(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The window: the last T of the keys (B, G, S, K) belong to the queries (B, H, T, K)."""
        config, tokens = self.config, q.shape[2]
        q = q * config.head_dim**-0.5
        if tokens == 1:
            near = slice(-min(config.window, k.shape[2]), None)
            grouped = q.reshape(*k.shape[:2], -1, config.head_dim)
            scores = grouped @ k[:, :, near].mT
            scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
            out = scores.softmax(-1).to(v.dtype) @ v[:, :, near]
            return out.reshape(q.shape), scores.logsumexp(-1).reshape(q.shape[:3])
        groups = config.heads // config.kv_heads
        k, v = (t.repeat_interleave(groups, 1).flatten(0, 1) for t in (k, v))
        shape = q.shape
        q = F.pad(q, (0, 0, k.shape[1] - tokens, 0)).flatten(0, 1)
        everyone = torch.zeros(q.shape[:2], dtype=torch.int64, device=q.device)
        out, total = attend_in_buckets(q, k, v, everyone, 1, config.window - 1, False)
        return out[:, -tokens:].reshape(shape), total[:, -tokens:].reshape(shape[:3])

    def choose(
        self, scores: Tensor, ring: dict[str, Tensor], near: int, tokens: int, first: int, best: int
    ) -> tuple[Best, Held]:
        """What each of the call's queries sees beyond its window, as indices of its keys.

        `scores` (B, G, near + T) are those of the window before the call and of the call, whose
        keys stand from index `first` on. Rows are pairs of batch and key-value head.
        """
        window = self.config.window
        rows = scores.flatten(0, 1)
        # The token that leaves the window at each query; none where the sequence is too short.
        leaving = F.pad(rows[:, : near + tokens - window], (window - near, 0), value=-torch.inf)
        index = torch.arange(tokens, device=rows.device) + (near - window + first)
        index = index.expand(len(rows), -1)
        if "support" in ring:
            support = ring["support"].flatten(0, 1).to(rows.dtype)
            alive = int((support > -torch.inf).sum(-1).max())
            held = Held(
                support[:, :alive],
                ring["scores"].flatten(0, 1).to(rows.dtype),
                torch.arange(best, device=rows.device).expand(len(rows), -1),
            )
        else:
            none = rows.new_full((len(rows), best), -torch.inf)
            held = Held(none[:, :0], none, none.to(torch.int64).fill_(-1))
        return running_best(leaving, index, held, self.config.selected)

    def _far(self, q: Tensor, keys: Tensor, values: Tensor, best: Best) -> tuple[Tensor, Tensor]:
        """Every query over the keys chosen for it, with gates on the values."""
        config, tokens = self.config, q.shape[2]
        filled = int((best.name >= 0).sum(-1).max())
        index, gate = best.name[:, :, :filled], best.gate[:, :, :filled]
        place = index.clamp_min(0).flatten(1)
        shape = (*index.shape, config.head_dim)
        k, v = (take(t.flatten(0, 1), place).view(shape) for t in (keys, values))
        grouped = q.reshape(len(index), -1, tokens, config.head_dim).transpose(1, 2)
        scores = (grouped * config.head_dim**-0.5) @ k.mT
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        scores = scores.masked_fill(index[:, :, None] < 0, HIDDEN)
        weights = scores.softmax(-1) * gate[:, :, None]
        out = (weights.to(v.dtype) @ v).transpose(1, 2).reshape(q.shape)
        return out, scores.logsumexp(-1).transpose(1, 2).reshape(q.shape[:3])

    def init_state(
        self, batch: int, context: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> State:
        """The window's ring `near_*` (B, G, w, K) with its scores, the k best with theirs, and the
        scores that may still have gates, `support`, -inf for none."""
        config = self.config
        near, older = min(config.window, context), config.older(context)
        best = min(config.selected, older)
        heads, single = (batch, config.kv_heads), state_dtype(dtype)
        tensors = {}
        for prefix, size in (("near_", near), ("", best)):
            for name in ("keys", "values"):
                shape = (*heads, size, config.head_dim)
                tensors[prefix + name] = torch.zeros(shape, dtype=dtype, device=device)
            empty = torch.full((*heads, size), -torch.inf, dtype=single, device=device)
            tensors[prefix + "scores"] = empty
        tensors["support"] = torch.full((*heads, older), -torch.inf, dtype=single, device=device)
        return State(0, tensors)


def _room(state: State) -> int:
    """The context that a state was made for."""
    return state.tensors["near_keys"].shape[2] + state.tensors["support"].shape[2]


def _join(near: Tensor, near_total: Tensor, far: Tensor, far_total: Tensor) -> Tensor:
    """One softmax over two sets of keys, from each one's own."""
    share = torch.sigmoid(far_total - near_total).unsqueeze(-1).to(near.dtype)
    return near + share * (far - near)


def _keep_best(ring: dict[str, Tensor], held: Held, keys: Tensor, values: Tensor) -> None:
    heads = keys.shape[:2]
    place = held.name.clamp_min(0)
    for name, source in (("keys", keys), ("values", values)):
        ring[name].copy_(take(source.flatten(0, 1), place).view_as(ring[name]))
    ring["scores"].copy_(held.scores.view(*heads, -1))
    ring["support"].fill_(-torch.inf)
    ring["support"][:, :, : held.support.shape[1]] = held.support.view(*heads, -1)


def _keep_near(
    ring: dict[str, Tensor], start: int, keys: Tensor, values: Tensor, scores: Tensor
) -> None:
    size, tokens = ring["near_keys"].shape[2], keys.shape[2]
    kept = min(size, tokens)
    at = torch.arange(start + tokens - kept, start + tokens, device=keys.device) % size
    for name, new in (("near_keys", keys), ("near_values", values), ("near_scores", scores)):
        ring[name].index_copy_(2, at, new[:, :, tokens - kept :].to(ring[name].dtype))


def configure_sparsek(site: Site, genes: Mapping[str, Gene]) -> SparseKConfig:
    """The config of pattern=sparsek. Raises GeneError."""
    only(genes, "pattern", {"causal": True})
    return SparseKConfig(
        **heads_config("sparsek", site, genes),
        window=whole(genes, "window"),
        selected=whole(genes, "selected"),
    )
