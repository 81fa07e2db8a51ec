"""Axes and points of the patterns that the data decide: each has a layer of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ..base import Axis, Config, Gene, Point, Site
from .hashed import configure_hashed
from .native_sparse import configure_native_sparse
from .routing import configure_routing
from .sparsek import configure_sparsek

CHOSEN_FORMS: dict[str, Callable[[Site, Mapping[str, Gene]], Config]] = {
    "lsh": configure_hashed,
    "routing": configure_routing,
    "sparsek": configure_sparsek,
    "native-sparse": configure_native_sparse,
}

CHOSEN_AXES = (
    Axis("hashes", 2, "lsh: rounds of hashing", low=1.0, high=64.0, search=(1, 2, 4)),
    Axis(
        "buckets",
        8,
        "lsh: buckets of a round, an even number; routing: clusters",
        low=1.0,
        high=65536.0,
        search=(4, 8, 16),
    ),
    Axis(
        "bucket_size",
        32,
        "lsh, routing: the latest tokens of its own bucket that a token sees; lsh with"
        " causal=false: the length of a chunk",
        low=1.0,
        high=1e6,
        search=(16, 32, 64),
    ),
    Axis(
        "selected",
        16,
        "sparsek: tokens before the window that a token sees; native-sparse: blocks that it reads"
        " token by token",
        low=1.0,
        high=65536.0,
        search=(8, 16, 32),
    ),
    Axis(
        "compress",
        8,
        "native-sparse: tokens of a block that is compressed to one key and one value",
        low=1.0,
        high=65536.0,
        search=(8, 16),
    ),
    Axis(
        "compress_stride",
        4,
        "native-sparse: tokens from one compressed block to the next, a divisor of compress and of"
        " block",
        low=1.0,
        high=65536.0,
        search=(4, 8),
    ),
)

CHOSEN_POINTS = (
    Point(
        "reformer-lsh",
        {"pattern": "lsh"},
        "Kitaev et al., Reformer, arXiv 2001.04451",
        "The causal form sees the latest tokens of a token's own buckets, where the published one"
        " sees chunks whose borders depend on later tokens; that one is causal=false. The hashes"
        " are drawn once.",
    ),
    Point(
        "routing-attention",
        {"pattern": "routing"},
        "Roy et al., Routing Transformer, arXiv 2003.05997",
        "The causal form puts a token into its nearest cluster, where the published one lets each"
        " cluster take its best tokens of the whole sequence; that one is causal=false. All heads"
        " route; the paper's are half local.",
    ),
    Point(
        "nsa",
        {"pattern": "native-sparse", "kv_heads": 1, "window": 32, "block": 16, "selected": 4},
        "Yuan et al., Native Sparse Attention, arXiv 2502.11089",
        "The paper's sizes, smaller: it has blocks of 64 of which 16 are selected, blocks of 32"
        " compressed every 16, and a window of 512.",
    ),
    Point(
        "sparsek",
        {"pattern": "sparsek", "window": 16, "selected": 8},
        "Lou et al., SPARSEK, arXiv 2406.16747",
        "Window and selection for short contexts; the slope of the position in the scores is"
        " learned.",
    ),
)
