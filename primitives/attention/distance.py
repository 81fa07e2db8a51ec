"""Position encodings that stand in the scores: a bias by distance, with or without the query."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..position import alibi_bias, alibi_slopes, sinusoids


@dataclass(frozen=True)
class DistanceForm:
    """Final numbers of a bias by distance."""

    kind: str
    """alibi, t5 or xl."""
    width: int
    heads: int
    head_dim: int
    buckets: int = 0
    """T5's buckets; 0 for the others."""
    reach: int = 0
    """T5: the distance from which on all share the last bucket."""

    @property
    def inner(self) -> int:
        return self.heads * self.head_dim

    @property
    def params(self) -> int:
        if self.kind == "xl":
            return self.inner * (self.width + 2)
        return self.buckets * self.heads

    def flops(self, seen: float) -> float:
        """Per decoded token that sees so many keys."""
        if self.kind == "xl":
            return 2.0 * self.width * (self.inner + self.heads * seen)
        return 0.0

    def build(self) -> DistanceBias:
        kinds = {"alibi": Alibi, "t5": T5Buckets, "xl": TransformerXl}
        return kinds[self.kind](self)


class DistanceBias(nn.Module):
    """What is added to the scores by distance; patterns call it for every block of queries."""

    def __init__(self, form: DistanceForm) -> None:
        super().__init__()
        self.form = form

    def queries(self, q: Tensor) -> Tensor:
        """The queries (B, T, H, K) of the content's scores."""
        return q

    def forward(self, distance: Tensor, q: Tensor) -> Tensor:
        """The biases (1 or B, H, T, S) at `distance` (T, S), query minus key position.

        q (B, H, T, K) are what `queries` returned. A negative distance is one that the caller
        hides; its bias is finite.
        """
        raise NotImplementedError


class Alibi(DistanceBias):
    """-m_h * distance, fixed slopes (Press et al., arXiv 2108.12409)."""

    slopes: Tensor

    def __init__(self, form: DistanceForm) -> None:
        super().__init__(form)
        self.register_buffer("slopes", torch.tensor(alibi_slopes(form.heads)), persistent=False)

    def forward(self, distance: Tensor, q: Tensor) -> Tensor:
        return alibi_bias(self.slopes, distance)[None]


class T5Buckets(DistanceBias):
    """One learned bias per head and bucket of distances (Raffel et al., arXiv 1910.10683, 2.1).

    Half of the buckets hold one distance each, the others grow logarithmically up to `reach`.
    """

    def __init__(self, form: DistanceForm) -> None:
        super().__init__(form)
        self.table = nn.Parameter(torch.randn(form.buckets, form.heads) * form.width**-0.5)

    def buckets(self, distance: Tensor) -> Tensor:
        """The bucket of every distance; a negative one is in that of 0."""
        near = distance.clamp_min(0)
        exact = self.form.buckets // 2
        grown = (near.clamp_min(1) / exact).log() / math.log(self.form.reach / exact)
        far = exact + (grown * (self.form.buckets - exact)).long()
        return torch.where(near < exact, near, far.clamp_max(self.form.buckets - 1))

    def forward(self, distance: Tensor, q: Tensor) -> Tensor:
        return F.embedding(self.buckets(distance), self.table).permute(2, 0, 1)[None]


class TransformerXl(DistanceBias):
    """The relative encoding of Transformer-XL (Dai et al., arXiv 1901.02860, 3.3).

    score = ((q + u) k + (q + v) W_r R_distance) / sqrt(K): R the sinusoids of the distance at the
    model's width, W_r learned, u and v learned per head. One query multiplies W_r first, which
    needs no projected R for every distance that it sees; many queries share the projected ones.
    """

    def __init__(self, form: DistanceForm) -> None:
        super().__init__(form)
        self.content = nn.Parameter(torch.zeros(form.heads, form.head_dim))
        self.position = nn.Parameter(torch.zeros(form.heads, form.head_dim))
        self.relative = nn.Linear(form.width, form.inner, bias=False)

    def queries(self, q: Tensor) -> Tensor:
        return q + self.content

    def forward(self, distance: Tensor, q: Tensor) -> Tensor:
        heads, width = self.form.heads, self.form.head_dim
        q = (q - (self.content - self.position)[:, None]) * width**-0.5
        distance = distance.clamp_min(0)
        table = sinusoids(int(distance.max()) + 1, self.form.width, q.dtype, q.device)
        if q.shape[2] == 1:
            weight = self.relative.weight.reshape(heads, width, -1)
            scores: Tensor = (q @ weight).flatten(1, 2) @ table[distance[0]].mT
            return scores.unsqueeze(2)
        relative = self.relative(table).reshape(-1, heads, width)
        scores = q @ relative.permute(1, 2, 0)
        return scores.gather(3, distance.expand(*q.shape[:2], -1, -1))
