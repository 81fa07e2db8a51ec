"""Feature maps of queries and keys: linear attention's stand-ins for the exponential.

A map turns K channels into R, the rows of the state. Those of `POSITIVE` make products of queries
and keys that cannot be negative, which dividing by their sum needs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...kernels.letters import BTGK
from ..recurrent_parts import at_least_float32

FEATURES = ("none", "elu+1", "softmax", "taylor", "favor", "hedgehog")
POSITIVE = ("elu+1", "softmax", "taylor", "favor", "hedgehog")
KEEPS_WIDTH = ("none", "elu+1", "softmax")
TAYLOR_MOST = 32
"""Key channels of the Taylor map at most: its state has 1 + K + K^2 rows."""
FAVOR_PER_CHANNEL = 4
"""Random features per key channel: 256 for heads of 64, Performer's own setting."""
FAVOR_LEAST = 1e-4
"""Added to every random feature, so that none is zero."""
FAVOR_LARGEST = 60.0
"""Keys' random features stay below the exponential of this."""


def feature_rows(feature: str, key_dim: int) -> int:
    """R, the rows of the state."""
    if feature == "taylor":
        return 1 + key_dim + key_dim**2
    return key_dim * {"favor": FAVOR_PER_CHANNEL, "hedgehog": 2}.get(feature, 1)


class FeatureMap(nn.Module):
    """The map of one layer, for queries and for keys, (B, T, G, K) -> (B, T, G, R).

    elu+1: arXiv 2006.16236. softmax: over the channels of a head. taylor: [1, x/K^(1/4),
    (x x^T)/(2K)^(1/2)], the exponential of q.k/K^(1/2) to second order (Based, 2402.18668). favor:
    Performer's positive orthogonal random features (2009.14794), drawn once per layer. hedgehog:
    softmax of a learned map per head and of its negative (2402.04347).
    """

    projection: Tensor

    def __init__(self, feature: str, groups: int, key_dim: int) -> None:
        super().__init__()
        self.feature = feature
        if feature == "hedgehog":
            eye = torch.eye(key_dim).expand(groups, -1, -1)
            self.query_map = nn.Parameter(eye + 0.02 * torch.randn(groups, key_dim, key_dim))
            self.key_map = nn.Parameter(eye + 0.02 * torch.randn(groups, key_dim, key_dim))
        elif feature == "favor":
            rows = orthogonal_rows(feature_rows(feature, key_dim), key_dim)
            self.register_buffer("projection", rows)

    def forward(self, q: BTGK, k: BTGK) -> tuple[Tensor, Tensor]:
        """The features of queries and keys, in their dtypes."""
        feature = self.feature
        if feature == "hedgehog":
            return hedgehog(q, self.query_map), hedgehog(k, self.key_map)
        if feature == "favor":
            return self._favor(q, query=True), self._favor(k, query=False)
        if feature == "taylor":
            return taylor(q), taylor(k)
        # In bf16 the addition of elu+1 would cut every feature to multiples of 1/256.
        wide = (at_least_float32(q), at_least_float32(k))
        if feature == "elu+1":
            a, b = (F.elu(t) + 1 for t in wide)
        else:
            a, b = (torch.softmax(t, -1) for t in wide)
        return a.to(q.dtype), b.to(k.dtype)

    def _favor(self, x: Tensor, *, query: bool) -> Tensor:
        """exp(w.x - |x|^2/2 - c) + eps over sqrt(R), x divided by K^(1/4) first.

        c cancels where the read-out is divided by its sum: for a query its own largest exponent,
        for keys one number that no key passes.
        """
        wide = at_least_float32(x) * x.shape[-1] ** -0.25
        w = self.projection.to(wide.dtype)
        exponent = wide @ w.mT - wide.square().sum(-1, keepdim=True) / 2
        if query:
            c = exponent.amax(-1, keepdim=True).detach()
        else:
            # |w|^2/2 is the largest that w.x - |x|^2/2 can be.
            c = (w.square().sum(-1).amax() / 2 - FAVOR_LARGEST).clamp_min(0)
        y = (torch.exp(exponent - c) + FAVOR_LEAST) / math.sqrt(len(w))
        return y.to(x.dtype)


def taylor(x: Tensor) -> Tensor:
    wide = at_least_float32(x) * x.shape[-1] ** -0.25
    square = (wide[..., :, None] * wide[..., None, :]).flatten(-2) / math.sqrt(2)
    return torch.cat((torch.ones_like(wide[..., :1]), wide, square), -1).to(x.dtype)


def hedgehog(x: Tensor, weight: Tensor) -> Tensor:
    """[softmax(W x), softmax(-W x)], W of (G, K, K)."""
    batch, tokens, groups, width = x.shape
    rows = x.reshape(batch * tokens, groups, width).transpose(0, 1)
    y = at_least_float32(torch.bmm(rows, weight).transpose(0, 1).view(x.shape))
    return torch.cat((torch.softmax(y, -1), torch.softmax(-y, -1)), -1).to(x.dtype)


def orthogonal_rows(count: int, width: int) -> Tensor:
    """Rows of a normal distribution, orthogonal within each block of `width` (2009.14794)."""
    blocks: list[Tensor] = []
    for _ in range(-(-count // width)):
        rotation, upper = torch.linalg.qr(torch.randn(width, width))
        # Without the signs the factor prefers some directions, and the estimate is biased.
        blocks.append((rotation * upper.diagonal().sign()).mT)
    lengths: Tensor = torch.linalg.vector_norm(torch.randn(count, width), dim=-1, keepdim=True)
    return torch.cat(blocks)[:count] * lengths


def feature_params(feature: str, groups: int, key_dim: int) -> int:
    return 2 * groups * key_dim**2 if feature == "hedgehog" else 0


def feature_products(feature: str, groups: int, key_dim: int) -> int:
    """Multiply-adds of a token, for its query and its key."""
    if feature == "hedgehog":
        return 2 * groups * key_dim**2
    return 2 * groups * key_dim * feature_rows(feature, key_dim) if feature == "favor" else 0
