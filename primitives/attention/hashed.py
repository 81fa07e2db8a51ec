"""Reformer's attention within hashed buckets (Kitaev et al., arXiv 2001.04451).

A token's query q_t and key k_t = q_t / |q_t| come from one vector. A round of hashing draws a
random matrix R and puts a vector into the bucket argmax([x R; -x R]) (angular hashing). Tokens
attend within their bucket, and to themselves only where they see nothing else; the rounds' results
are weighed by their softmax' denominators (equation 8, with a key that n rounds show counted n
times, as in the reference that the tests compare with, rather than divided by n).

The published form (`causal=false` here) sorts the tokens by bucket, then time, cuts the sorted
sequence into chunks of `size` and lets a token see its chunk and the one before, whatever their
buckets. Even with later tokens masked, which neighbours share a chunk then depends on how many
later tokens came to lower buckets, so a decoder could not repeat what training did. The causal form
sees what every position of the chunks' borders leaves to a token: the `size` tokens before it in
its own bucket.

The random matrices are drawn once with the module; the paper draws new ones in every call.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...kernels.letters import BTD
from ..base import BidirectionalError, Cost, Gene, GeneError, Site, State
from ..genes import flag, whole
from .bucketed import BucketedAttention, BucketedConfig, join_rounds
from .buckets import ALONE, take
from .heads import heads_config

EPS = 1e-6
HIDDEN = -1e9
"""The score of a key that a query does not see: finite, and below ALONE."""


@dataclass(frozen=True)
class HashedConfig(BucketedConfig):
    """Final numbers; `size` is the chunk's length."""

    rounds: int = 1
    alone = True

    @property
    def reach(self) -> int:
        return self.size

    def assigning(self) -> int:
        return self.heads * self.head_dim * self.rounds * self.buckets // 2

    def cost(self, context: int, dtype: torch.dtype) -> Cost:
        """See base.Config."""
        if self.causal:
            return super().cost(context, dtype)
        params, products = self.linear(2 * self.query_width)
        if context <= self.size:
            scores, hashing = context * context, 0
        else:
            chunks = -(-context // self.size)
            scores = self.rounds * chunks * 2 * self.size**2
            hashing = self.assigning()
        flops = 2.0 * (products + hashing + 2 * self.query_width * scores / context)
        return Cost(params, params, flops, 0)

    def build(self) -> HashedAttention:
        """See base.Config."""
        return HashedAttention(self)


class HashedAttention(BucketedAttention):
    """See the module. `entry` makes the shared vectors, then the values."""

    rotations: Tensor

    def __init__(self, config: HashedConfig) -> None:
        super().__init__(config, [config.query_width] * 2)
        self.config: HashedConfig = config
        shape = (config.heads, config.head_dim, config.rounds * config.buckets // 2)
        self.register_buffer("rotations", torch.randn(shape))

    def vectors(self, shared: Tensor) -> tuple[Tensor, Tensor]:
        norm = torch.rsqrt(shared.square().mean(-1, keepdim=True) + EPS)
        return shared, shared * (norm * shared.shape[-1] ** -0.5)

    @torch.no_grad()
    def route(self, keys: Tensor) -> Tensor:
        dtype = torch.promote_types(keys.dtype, torch.float32)
        with torch.autocast(keys.device.type, enabled=False):
            turned = keys.to(dtype) @ self.rotations.to(dtype)
        turned = turned.view(*turned.shape[:3], self.config.rounds, -1)
        return torch.cat((turned, -turned), -1).argmax(-1).movedim(-1, 2)

    def forward(self, x: BTD, state: State | None = None) -> tuple[BTD, State | None]:
        if self.config.causal:
            return super().forward(x, state)
        if state is not None:
            raise BidirectionalError
        (shared, values), gate = self.project(x)
        q, k = self.vectors(self.turn(shared, 0))
        v = values.transpose(1, 2)
        if x.shape[1] <= self.config.size:
            return self.output(_attend_all(q, k, v), gate), None
        bucket = self.route(k)
        heads = bucket.shape[:2]
        out, total = attend_in_chunks(
            q.flatten(0, 1),
            k.flatten(0, 1),
            v.flatten(0, 1),
            bucket.flatten(0, 1),
            self.config.buckets,
            self.config.size,
        )
        joined = join_rounds(out.view(*heads, *out.shape[1:]), total.view(*heads, *total.shape[1:]))
        return self.output(joined, gate), None


def _attend_all(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What is no longer than a chunk is not hashed."""
    scores = q @ k.mT
    own = torch.eye(q.shape[2], dtype=torch.bool, device=q.device)
    return scores.masked_fill(own, ALONE).softmax(-1).to(v.dtype) @ v


def attend_in_chunks(
    q: Tensor, k: Tensor, v: Tensor, bucket: Tensor, buckets: int, size: int
) -> tuple[Tensor, Tensor]:
    """The published form: q, k and v (N, T, K) and `bucket` (N, R, T) to outputs (N, R, T, K) and
    the logarithms of the softmax' denominators (N, R, T).

    The rounds stand one after the other, and the first chunk looks back at the last one, as in the
    authors' code. A sequence that fills no whole chunks is filled up with tokens that none sees.
    """
    rows, rounds, tokens = bucket.shape
    full = -(-tokens // size) * size
    # The fill stands in a bucket of its own at the end of each round.
    bucket = nn.functional.pad(bucket, (0, full - tokens), value=buckets)
    bucket = bucket + torch.arange(rounds, device=q.device)[:, None] * (buckets + 1)
    order = torch.argsort(bucket.flatten(1), dim=-1, stable=True)
    token = order % full
    place = token.clamp_max(tokens - 1)

    def chunks(t: Tensor) -> Tensor:
        return t.view(rows, -1, size, *t.shape[2:])

    def with_previous(t: Tensor) -> Tensor:
        return torch.cat((t.roll(1, 1), t), 2)

    scores = chunks(take(q, place)) @ with_previous(chunks(take(k, place))).mT
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    query, key = chunks(token), with_previous(chunks(token))
    scores = scores.masked_fill(key[:, :, None] >= tokens, HIDDEN)
    scores = torch.where(query[..., None] == key[:, :, None], ALONE, scores)
    total = scores.logsumexp(-1, keepdim=True)
    out = (scores - total).exp().to(v.dtype) @ with_previous(chunks(take(v, place)))
    back = torch.empty_like(order)
    back.scatter_(1, order, torch.arange(rounds * full, device=q.device).expand(rows, -1))
    out = take(out.flatten(1, 2), back).view(rows, rounds, full, -1)
    logs = total.flatten(1).gather(1, back).view(rows, rounds, full)
    return out[:, :, :tokens], logs[:, :, :tokens]


def configure_hashed(site: Site, genes: Mapping[str, Gene]) -> HashedConfig:
    """The config of pattern=lsh. Raises GeneError."""
    fields = heads_config("lsh", site, genes)
    if fields["kv_heads"] != fields["heads"]:
        raise GeneError(
            "pattern=lsh has one vector for query and key: "
            f"kv_heads={fields['kv_heads']} is not heads={fields['heads']}"
        )
    buckets = whole(genes, "buckets")
    if buckets % 2:
        raise GeneError(f"buckets={buckets} is odd, and angular hashing makes pairs of buckets")
    return HashedConfig(
        **fields,
        buckets=buckets,
        size=whole(genes, "bucket_size"),
        causal=flag(genes, "causal"),
        rounds=whole(genes, "hashes"),
    )
