"""Attention's axes and points for positions, and their rules."""

from __future__ import annotations

from collections.abc import Mapping

from ..base import Axis, Gene, GeneError, Point, Site
from ..genes import choice, flag, number, whole
from ..position import ADDED
from ..rope import PLAIN, RopeForm
from .distance import DistanceForm

ROTARY = ("rope", "rope3d")

POSITION_AXES: tuple[Axis, ...] = (
    Axis(
        "position",
        "inherit",
        "position encoding inside; inherit takes the backbone's (learned, sinusoidal: none "
        "inside); rope3d turns by frame, row and column of patches in row-major order",
        options=("inherit", "rope", "rope3d", "alibi", "t5", "xl", "none"),
    ),
    Axis("rope_theta", 10000.0, "base of RoPE's wavelengths", low=1.0),
    Axis(
        "rope_fraction",
        1.0,
        "share of a head's channels that RoPE turns, rounded down to pairs, as in GPT-J and "
        "GPT-NeoX (arXiv 2204.06745)",
        low=0.0,
        high=1.0,
    ),
    Axis(
        "rope_scaling",
        "none",
        "RoPE for contexts beyond those trained on: linear (arXiv 2306.15595), ntk and yarn "
        "(arXiv 2309.00071)",
        options=("none", "linear", "ntk", "yarn"),
    ),
    Axis("rope_factor", 4.0, "how much longer rope_scaling makes the context", low=1.0, high=1e4),
    Axis("rope_original", 2048, "tokens of the context that yarn starts from", low=8.0, high=1e8),
    Axis(
        "rope_rounded",
        True,
        "yarn: the ramp from kept to interpolated pairs ends at whole pairs, as in the authors' "
        "code; false where its formula does, as in gpt-oss (arXiv 2508.10925)",
        options=(True, False),
    ),
    Axis("grid_height", 8, "rope3d: rows of patches in a frame", low=1.0, high=65536.0),
    Axis("grid_width", 8, "rope3d: patches in a row", low=1.0, high=65536.0),
    Axis("t5_buckets", 32, "t5: buckets of distances, each with a bias", low=2.0, high=4096.0),
    Axis("t5_reach", 128, "t5: distance from which on all share a bucket", low=2.0, high=1e8),
)

POSITION_POINTS: tuple[Point, ...] = (
    Point("alibi-attention", {"position": "alibi"}, "Press et al., arXiv 2108.12409"),
    Point(
        "t5-attention",
        {"position": "t5"},
        "Raffel et al., T5, arXiv 1910.10683",
        "scores are divided by sqrt(K), which T5 leaves to the weights' start",
    ),
    Point("xl-attention", {"position": "xl"}, "Dai et al., Transformer-XL, arXiv 1901.02860"),
    Point(
        "neox-attention",
        {"position": "rope", "rope_fraction": 0.25, "bias": True},
        "Black et al., GPT-NeoX-20B, arXiv 2204.06745",
    ),
    Point(
        "pi-attention",
        {"position": "rope", "rope_scaling": "linear"},
        "Chen et al., position interpolation, arXiv 2306.15595",
    ),
    Point(
        "ntk-attention",
        {"position": "rope", "rope_scaling": "ntk"},
        "NTK-aware scaling, in Peng et al., arXiv 2309.00071, 3.1",
    ),
    Point(
        "yarn-attention",
        {"position": "rope", "rope_scaling": "yarn"},
        "Peng et al., YaRN, arXiv 2309.00071",
    ),
    Point(
        "rope3d-attention",
        {"position": "rope3d"},
        "Wang et al., Qwen2-VL, M-RoPE, arXiv 2409.12191",
        "over patches alone: the position follows from the index of the token",
    ),
)


def position_of(site: Site, genes: Mapping[str, Gene]) -> str:
    """The encoding inside an operator: its own, or the backbone's where that is inside."""
    position = choice(genes, "position")
    if position == "inherit":
        return "none" if site.position in ADDED else site.position
    return position


def rope_of(genes: Mapping[str, Gene], position: str, head_dim: int) -> tuple[int, float, RopeForm]:
    """The channels turned, theta and the form; 0, 0 and PLAIN where the position is not rotary."""
    if position not in ROTARY:
        return 0, 0.0, PLAIN
    fraction, theta = number(genes, "rope_fraction"), number(genes, "rope_theta")
    scaling, factor = choice(genes, "rope_scaling"), number(genes, "rope_factor")
    if fraction == 1.0 and head_dim % 2:
        raise GeneError(f"head_dim={head_dim} is odd, and rope turns pairs of channels")
    channels = 2 * int(head_dim * fraction / 2)
    if channels == 0:
        raise GeneError(
            f"rope_fraction={fraction:g} of head_dim={head_dim} is no pair of channels; "
            "position=none turns none"
        )
    if scaling == "yarn" and theta == 1.0:
        raise GeneError(
            "rope_scaling=yarn tells wavelengths apart, and with rope_theta=1 all agree"
        )
    grid = (0, 0)
    if position == "rope3d":
        grid = whole(genes, "grid_height"), whole(genes, "grid_width")
        if channels < 8:
            raise GeneError(
                f"rope3d splits a head's channels over frame, row and column; it needs 8 of them, "
                f"not {channels}"
            )
    if scaling == "none" or factor == 1.0:
        return channels, theta, RopeForm(grid=grid)
    yarn = scaling == "yarn"
    original = whole(genes, "rope_original") if yarn else 0
    rounded = flag(genes, "rope_rounded") or not yarn
    return channels, theta, RopeForm(scaling, factor, original, grid, rounded)


def distance_of(
    genes: Mapping[str, Gene], position: str, width: int, heads: int, head_dim: int
) -> DistanceForm | None:
    """The biases of alibi, t5 and xl; None for the others."""
    if position == "alibi":
        return DistanceForm("alibi", width, heads, head_dim)
    if position == "xl":
        return DistanceForm("xl", width, heads, head_dim)
    if position != "t5":
        return None
    buckets, reach = whole(genes, "t5_buckets"), whole(genes, "t5_reach")
    if reach <= buckets // 2:
        raise GeneError(
            f"t5_reach={reach} lies among the {buckets // 2} distances that t5_buckets={buckets} "
            "tells apart one by one"
        )
    return DistanceForm("t5", width, heads, head_dim, buckets, reach)
