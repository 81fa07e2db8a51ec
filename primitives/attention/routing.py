"""Routing Transformer's attention within clusters (Roy et al., arXiv 2003.05997).

Queries and keys are one vector per token, normalised to length sqrt(K) (a LayerNorm without
parameters). Centroids mu cluster them by spherical k-means: they take no gradient, and move after
each training step, mu <- decay * mu + (1 - decay) * mean of the vectors nearest to mu.

The published form (`causal=false` here) lets every cluster take the w vectors with the largest
mu . q of the whole sequence; a token in several clusters gets the sum of what they give, one in
none gets zero. The w best are known at the sequence's end only. The causal form puts every token
into the cluster of its largest mu . q and shows it the last w tokens of that cluster, itself
included, so clusters are no longer of equal size, and no token is left out. Without causality
queries and keys are two vectors, and a cluster takes w of each.

Here a centroid moves towards the mean of its vectors, where the paper's update adds them up, and is
normalised again; one without vectors stays.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels.letters import BTD
from ..base import BidirectionalError, Cost, Gene, GeneError, Site, State
from ..genes import flag, whole
from .bucketed import BucketedAttention, BucketedConfig
from .buckets import take
from .heads import heads_config

DECAY = 0.999
"""Of the centroids' moving average (arXiv 2003.05997, algorithm 1)."""


@dataclass(frozen=True)
class RoutingConfig(BucketedConfig):
    """Final numbers; `size` is w, the tokens of a cluster that one sees, itself included."""

    @property
    def reach(self) -> int:
        return self.size - 1

    def cost(self, context: int, dtype: torch.dtype) -> Cost:
        """See base.Config."""
        if self.causal:
            return super().cost(context, dtype)
        params, products = self.linear(3 * self.query_width)
        members = min(self.size, context)
        scores = 2 * self.query_width * self.buckets * members**2 / context
        return Cost(params, params, 2.0 * (products + 2 * self.assigning() + scores), 0)

    def build(self) -> RoutingAttention:
        """See base.Config."""
        return RoutingAttention(self)


class RoutingAttention(BucketedAttention):
    """See the module. `entry` makes the shared vectors (or queries and keys), then the values."""

    centroids: Tensor
    sums: Tensor
    counts: Tensor

    def __init__(self, config: RoutingConfig) -> None:
        super().__init__(config, [config.query_width] * (2 if config.causal else 3))
        self.config: RoutingConfig = config
        shape = (config.heads, config.buckets, config.head_dim)
        self.register_buffer("centroids", _on_sphere(torch.randn(shape)))
        # Since the last `balance`.
        self.register_buffer("sums", torch.zeros(shape))
        self.register_buffer("counts", torch.zeros(shape[:2], dtype=torch.int64))

    def vectors(self, shared: Tensor) -> tuple[Tensor, Tensor]:
        keys = F.layer_norm(shared, shared.shape[-1:])
        return keys * keys.shape[-1] ** -0.5, keys

    def nearness(self, vectors: Tensor) -> Tensor:
        """mu . q, (B, H, T, clusters) of vectors (B, H, T, K), without gradient."""
        dtype = torch.promote_types(vectors.dtype, torch.float32)
        with torch.no_grad(), torch.autocast(vectors.device.type, enabled=False):
            products: Tensor = vectors.detach().to(dtype) @ self.centroids.to(dtype).mT
        return products

    def route(self, keys: Tensor) -> Tensor:
        nearest = self.nearness(keys).argmax(-1)
        self._count(keys, nearest)
        return nearest.unsqueeze(2)

    @torch.no_grad()
    def _count(self, vectors: Tensor, nearest: Tensor) -> None:
        """Add vectors (B, H, T, K) to their clusters' sums."""
        if not self.training:
            return
        rows, place = vectors.transpose(0, 1).flatten(1, 2), nearest.transpose(0, 1).flatten(1)
        index = place[..., None].expand_as(rows)
        self.sums.scatter_add_(1, index, rows.to(self.sums.dtype))
        self.counts.scatter_add_(1, place, torch.ones_like(place))

    @torch.no_grad()
    def balance(self) -> None:
        """Close a training step: the centroids move."""
        mean = self.sums / self.counts.clamp_min(1).unsqueeze(-1)
        moved = _on_sphere(DECAY * self.centroids + (1 - DECAY) * mean)
        self.centroids.copy_(torch.where(self.counts.unsqueeze(-1) > 0, moved, self.centroids))
        self.sums.zero_()
        self.counts.zero_()

    def forward(self, x: BTD, state: State | None = None) -> tuple[BTD, State | None]:
        if self.config.causal:
            return super().forward(x, state)
        if state is not None:
            raise BidirectionalError
        (queries, keys, values), gate = self.project(x)
        q, k = (F.layer_norm(self.turn(t, 0), (self.head_dim,)) for t in (queries, keys))
        return self.output(self._attend_best(q, k, values.transpose(1, 2)), gate), None

    def _attend_best(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Every cluster's w best queries over its w best keys, added up: (B, H, T, K)."""
        batch, heads, tokens, width = q.shape
        members = min(self.config.size, tokens)
        chosen = []
        for vectors in (q, k):
            near = self.nearness(vectors)
            self._count(vectors, near.argmax(-1))
            best = torch.sort(near, dim=2, descending=True, stable=True).indices[:, :, :members]
            chosen.append(best.sort(dim=2).values.transpose(2, 3).flatten(2).flatten(0, 1))
        q, k, v = (t.flatten(0, 1) for t in (q, k, v))

        def of_cluster(t: Tensor, index: Tensor) -> Tensor:
            return take(t, index).view(len(index), -1, members, width)

        scores = (of_cluster(q, chosen[0]) * width**-0.5) @ of_cluster(k, chosen[1]).mT
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        out = scores.softmax(-1).to(v.dtype) @ of_cluster(v, chosen[1])
        total = torch.zeros_like(v)
        total = total.scatter_add(1, chosen[0][..., None].expand(-1, -1, width), out.flatten(1, 2))
        return total.view(batch, heads, tokens, width)


def _on_sphere(vectors: Tensor) -> Tensor:
    """Vectors (..., K) at length sqrt(K)."""
    unit: Tensor = F.normalize(vectors, dim=-1)
    return unit * math.sqrt(vectors.shape[-1])


def configure_routing(site: Site, genes: Mapping[str, Gene]) -> RoutingConfig:
    """The config of pattern=routing. Raises GeneError."""
    fields = heads_config("routing", site, genes)
    if fields["kv_heads"] != fields["heads"]:
        raise GeneError(
            "pattern=routing clusters each head's queries with its own keys: "
            f"kv_heads={fields['kv_heads']} is not heads={fields['heads']}"
        )
    return RoutingConfig(
        **fields,
        buckets=whole(genes, "buckets"),
        size=whole(genes, "bucket_size"),
        causal=flag(genes, "causal"),
    )
