"""Axes and points of the low-rank and synthetic forms: each has a layer of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ..base import Axis, Config, Gene, Point, Site
from .linformer import configure_linformer
from .nystrom import configure_nystrom
from .synthesizer import configure_synthesizer

LOW_RANK_FORMS: dict[str, Callable[[Site, Mapping[str, Gene]], Config]] = {
    "linformer": configure_linformer,
    "nystrom": configure_nystrom,
    "synthesizer-dense": configure_synthesizer,
    "synthesizer-random": configure_synthesizer,
}

LOW_RANK_AXES = (
    Axis(
        "landmarks",
        16,
        "linformer: rows that keys and values are projected to along the sequence; nystrom: the"
        " most segments whose means stand for queries and keys",
        low=1.0,
        high=4096.0,
        search=(8, 16),
    ),
    Axis(
        "max_length",
        1024,
        "linformer, nystrom (causal), synthesizer: the longest sequence, in tokens; a longer one is"
        " refused",
        low=1.0,
        high=1e6,
    ),
    Axis(
        "value_taps",
        0,
        "nystrom: taps of the depthwise convolution of the values beside; 0 for none",
        low=0.0,
        high=1023.0,
    ),
    Axis(
        "table",
        "learned",
        "synthesizer-random: weights that are learned or stay as they were drawn",
        options=("learned", "fixed"),
    ),
    Axis(
        "table_rank",
        0,
        "synthesizer-random: width of two tables whose product the weights are; 0: one whole table",
        low=0.0,
        high=65536.0,
    ),
)

LOW_RANK_POINTS = (
    Point(
        "linformer",
        {"pattern": "linformer"},
        "Wang et al., arXiv 2006.04768",
        "The causal form: E and F project the blocks before a token's own, which it sees exactly.",
    ),
    Point(
        "linformer-bidirectional",
        {"pattern": "linformer", "causal": False},
        "Wang et al., arXiv 2006.04768",
        "E and F are shared by the heads.",
    ),
    Point(
        "nystromformer",
        {"pattern": "nystrom", "max_length": 512},
        "Xiong et al., arXiv 2102.03902",
        "The causal form: landmarks of the segments before a token's own, which it sees exactly.",
    ),
    Point(
        "nystromformer-bidirectional",
        {"pattern": "nystrom", "causal": False, "value_taps": 33},
        "Xiong et al., arXiv 2102.03902",
    ),
    Point(
        "synthesizer-dense",
        {"pattern": "synthesizer-dense"},
        "Tay et al., arXiv 2005.00743",
    ),
    Point(
        "synthesizer-random",
        {"pattern": "synthesizer-random", "max_length": 256},
        "Tay et al., arXiv 2005.00743",
    ),
)
