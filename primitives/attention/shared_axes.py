"""The row of Zamba's block in the catalogue."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ..base import Axis, Gene, GeneError, Liv, Point, Primitive, Site
from ..channel.mlp import ACTIVATION, EXPANSION, GATED, MlpConfig, inner_width
from ..genes import choice, flag, number, whole
from .axes import ATTENTION, configure_plain
from .shared_block import ADAPTERS, SharedBlockConfig

_TAKEN = ("heads", "kv_heads", "head_dim", "position", "rope_theta", "qk_norm")
"""The axes of attention that the block has; the others keep their defaults in it."""


def configure(site: Site, genes: Mapping[str, Gene]) -> SharedBlockConfig:
    if site.borrows:
        raise GeneError("shared-block makes keys and values of its own: it borrows none")
    adapters, rank = choice(genes, "adapters"), whole(genes, "rank") or -(-site.width // 16)
    reads = 2 * site.width if flag(genes, "embedding") else site.width
    inside = ATTENTION.complete({name: genes[name] for name in _TAKEN})
    return SharedBlockConfig(
        width=site.width,
        attention=configure_plain(replace(site, width=reads), inside),
        mlp=MlpConfig(
            width=site.width,
            inner=inner_width(site.width, number(genes, "expansion")),
            activation=choice(genes, "activation"),
            gated=flag(genes, "gated"),
            bias=False,
            normalised=site.normalised,
        ),
        adapters=adapters,
        rank=0 if adapters == "none" else rank,
    )


SHARED_BLOCK = Primitive(
    name="shared-block",
    kind="mixer",
    summary="attention and an MLP in a row, to be shared over the depth with parts of each place",
    source="Glorioso et al., Zamba, arXiv 2405.16712; Zamba2, arXiv 2411.15242",
    liv=Liv("dense", "low-rank", "none", "softmax", "grouped"),
    axes=(
        Axis(
            "embedding",
            True,
            "read what the embedding made of the token beside the stream",
            options=(True, False),
            search=(True, False),
        ),
        *(ATTENTION.axis(name) for name in _TAKEN),
        replace(EXPANSION, default=4.0),
        replace(ACTIVATION, default="gelu"),
        GATED,
        Axis(
            "adapters",
            "mlp",
            "maps of low rank that each place has of its own: none, on the MLP's first product, or"
            " on queries, keys and values too",
            options=ADAPTERS,
            search=ADAPTERS,
        ),
        Axis(
            "rank",
            0,
            "rank of the adapters; 0 for a sixteenth of the width, rounded up",
            low=0.0,
            high=4096.0,
            search=(0, 2, 8),
            grows="width",
        ),
    ),
    configure=configure,
    points=(
        Point(
            "zamba-block",
            {"adapters": "none", "position": "none"},
            "Glorioso et al., Zamba, arXiv 2405.16712",
            "scores are divided by sqrt(K), not sqrt(K / 2)",
        ),
        Point(
            "zamba2-block",
            {"adapters": "mlp"},
            "Glorioso et al., Zamba2, arXiv 2411.15242",
            "scores are divided by sqrt(K), not sqrt(K / 2)",
        ),
    ),
)
