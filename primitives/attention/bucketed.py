"""Attention within buckets that every token finds by itself: what hashing and clustering share.

Queries and keys are one vector per token (the papers' shared QK). A token's bucket depends on its
own vector alone, and it sees its bucket's latest tokens: a function of the past, equal whether it
is computed over a sequence or token by token. The cache holds keys, values and bucket numbers of
all tokens, because a token stays in sight until enough later ones have come to its bucket, which
may never happen.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels.letters import BTD
from ..base import BidirectionalError, Cost, State
from ..position import ContextError
from .buckets import attend_in_buckets, attend_latest, seen
from .heads import HeadsConfig, HeadsOperator


def number_dtype(buckets: int) -> torch.dtype:
    """The narrowest dtype for bucket numbers."""
    return torch.uint8 if buckets <= 256 else torch.int16 if buckets <= 2**15 else torch.int32


@dataclass(frozen=True)
class BucketedConfig(HeadsConfig):
    """What hashing and clustering share; keys have as many heads as queries."""

    buckets: int
    size: int
    """Tokens of its bucket that a token sees, see `reach`."""
    causal: bool

    rounds = 1
    """Buckets of a token, each of which it attends in."""
    alone = False
    """A token sees itself only where it sees no other."""

    @property
    def reach(self) -> int:
        """The tokens of its bucket before it that a token sees."""
        raise NotImplementedError

    def assigning(self) -> int:
        """Multiply-adds that find the buckets of one token, all heads."""
        return self.heads * self.head_dim * self.buckets

    def cost(self, context: int, dtype: torch.dtype) -> Cost:
        """See base.Config."""
        params, products = self.linear(2 * self.query_width)
        scores = 2 * self.query_width * self.rounds * seen(context, self.reach)
        keys = 2 * self.query_width * dtype.itemsize
        numbers = self.heads * self.rounds * number_dtype(self.buckets).itemsize
        flops = 2.0 * (products + self.assigning() + scores)
        return Cost(params, params, flops, context * (keys + numbers))


class BucketedAttention(HeadsOperator):
    """The causal form. Subclasses say how a vector becomes query, key and bucket."""

    config: BucketedConfig

    def vectors(self, shared: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys from the shared vectors, all (B, H, T, K)."""
        raise NotImplementedError

    def route(self, keys: Tensor) -> Tensor:
        """The buckets (B, H, R, T) of int64 of keys (B, H, T, K), in float32 at least."""
        raise NotImplementedError

    def forward(self, x: BTD, state: State | None = None) -> tuple[BTD, State | None]:
        config, tokens = self.config, x.shape[1]
        (shared, values), gate = self.project(x)
        q, k = self.vectors(self.turn(shared, 0 if state is None else state.length))
        v = values.transpose(1, 2)
        bucket = self.route(k)
        if state is None:
            return self.output(self._attend(q, k, v, bucket), gate), None
        start, end = state.length, state.length + tokens
        size = state.tensors["keys"].shape[2]
        if end > size:
            raise ContextError(f"the cache of attention holds {size} tokens; this call needs {end}")
        for name, new in (("keys", k), ("values", v)):
            state.tensors[name][:, :, start:end] = new
        state.tensors["buckets"][..., start:end] = bucket
        if start > 0 or tokens == 1:
            k, v = (state.tensors[name][:, :, :end].to(q.dtype) for name in ("keys", "values"))
            bucket = state.tensors["buckets"][..., :end].long()
            if tokens > 1:
                # Tokens of earlier calls have keys and no query.
                q = torch.cat((q.new_zeros(*q.shape[:2], start, config.head_dim), q), 2)
        out = self._attend(q, k, v, bucket)[:, :, -tokens:]
        return self.output(out, gate), State(end, state.tensors)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, bucket: Tensor) -> Tensor:
        """(B, H, T, K), for one query or one per key."""
        config = self.config
        batch, heads, rounds, tokens = bucket.shape

        def per_round(t: Tensor) -> Tensor:
            return t.unsqueeze(2).expand(-1, -1, rounds, -1, -1).flatten(0, 2)

        q, k, v, bucket = per_round(q), per_round(k), per_round(v), bucket.flatten(0, 2)
        if q.shape[1] == 1 and tokens > 1:
            out, total = attend_latest(q, k, v, bucket, bucket[:, -1:], config.reach, config.alone)
        elif tokens == 1:
            out, total = attend_latest(q, k, v, bucket, bucket, config.reach, config.alone)
        else:
            out, total = attend_in_buckets(
                q, k, v, bucket, config.buckets, config.reach, config.alone
            )
        return join_rounds(
            out.view(batch, heads, rounds, -1, config.head_dim),
            total.view(batch, heads, rounds, -1),
        )

    def init_state(
        self, batch: int, context: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> State:
        """See the module: keys and values (B, H, S, K), bucket numbers (B, H, R, S)."""
        config = self.config
        if not config.causal:
            raise BidirectionalError
        heads = (batch, config.heads)
        tensors = {
            name: torch.zeros(*heads, context, config.head_dim, dtype=dtype, device=device)
            for name in ("keys", "values")
        }
        numbers = number_dtype(config.buckets)
        tensors["buckets"] = torch.zeros(
            *heads, config.rounds, context, dtype=numbers, device=device
        )
        return State(0, tensors)


def join_rounds(out: Tensor, total: Tensor) -> Tensor:
    """Rounds weighed by their softmax' denominators, (B, H, R, T, K) and (B, H, R, T) to
    (B, H, T, K): one softmax over all rounds, in which a key counts once per round that shows it.
    """
    if out.shape[2] == 1:
        return out[:, :, 0]
    weights = total.softmax(2).unsqueeze(-1).to(out.dtype)
    return (out * weights).sum(2)
