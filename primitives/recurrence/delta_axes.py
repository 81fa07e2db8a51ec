"""The row of the delta rule: its axes, and its config from them."""

from __future__ import annotations

from collections.abc import Mapping

from ..base import Axis, Gene, Liv, Primitive, Site
from ..genes import choice, flag, number, whole
from ..recurrent_parts import GATES, group_count, head_count, inner_width, taps_axis
from .delta import DeltaConfig
from .delta_points import POINTS

HEAD_TARGET = 128


def configure(site: Site, genes: Mapping[str, Gene]) -> DeltaConfig:
    name = "delta"
    inner = inner_width(name, site.width, number(genes, "expand"))
    heads = head_count(name, inner, whole(genes, "heads"), HEAD_TARGET)
    key_dim = whole(genes, "key_dim") or max(1, round(site.width / heads))
    decay, gate = choice(genes, "decay"), choice(genes, "gate")
    low_rank_gate = gate != "none" and choice(genes, "gate_map") == "low-rank"
    return DeltaConfig(
        width=site.width,
        heads=heads,
        groups=group_count(name, heads, whole(genes, "groups")),
        key_dim=key_dim,
        value_dim=inner // heads,
        conv=whole(genes, "conv"),
        activation=choice(genes, "activation"),
        decay=decay,
        decay_rank=key_dim if decay == "vector" else 0,
        steps=whole(genes, "steps"),
        negative_eigenvalues=flag(genes, "negative_eigenvalues"),
        qk_norm=choice(genes, "qk_norm"),
        gate=gate,
        gate_rank=inner // heads if low_rank_gate else 0,
        norm=choice(genes, "norm"),
    )


DELTA = Primitive(
    name="delta",
    kind="mixer",
    summary="delta rule: a matrix state that overwrites what a key held (DeltaNet, gated)",
    source="DeltaNet (arXiv 2102.11174, 2406.06484), Gated DeltaNet (arXiv 2412.06464)",
    liv=Liv("qkv and beta with gate", "semi-separable", "none", "none", "grouped"),
    axes=(
        Axis(
            "heads",
            0,
            "heads; 0 takes heads of 128 value channels, or four where the width has no room",
            low=0.0,
            search=(0, 2, 4, 8),
            grows="heads",
        ),
        Axis(
            "key_dim",
            0,
            "key width of a head, the state's first axis; 0 is the model's width over the heads",
            low=0.0,
            high=256.0,
            search=(0, 16, 32, 64),
            grows="head",
        ),
        Axis(
            "groups",
            0,
            "different queries and keys, each shared by heads/groups heads; 0 is one per head",
            low=0.0,
            search=(0, 1),
            grows="shares",
        ),
        Axis(
            "expand",
            1.0,
            "width of all values over the model's width",
            low=0.25,
            high=8.0,
            search=(1.0, 2.0),
        ),
        taps_axis(4),
        Axis(
            "activation",
            "silu",
            "of queries, keys and values, after the convolution",
            options=("none", "silu"),
            search=("none", "silu"),
        ),
        Axis(
            "decay",
            "none",
            "none; from the input, as in Mamba-2: scalar, one per head and token; vector, one per"
            " key channel and token, made of as many numbers as a head has key channels (Kimi Delta"
            " Attention)",
            options=("none", "scalar", "vector"),
            search=("none", "scalar", "vector"),
        ),
        Axis(
            "steps",
            1,
            "writes per token, each with a key, value and beta of its own (DeltaProduct)",
            low=1.0,
            high=4.0,
            search=(1, 2),
        ),
        Axis(
            "negative_eigenvalues",
            False,
            "beta in 0..2 instead of 0..1, so that a write can flip a direction (arXiv 2411.12537)",
            options=(False, True),
            search=(False, True),
        ),
        Axis(
            "qk_norm",
            "l2",
            "queries and keys are divided by this norm, per head; l1 is the first DeltaNet's"
            " (arXiv 2102.11174)",
            options=("l2", "l1"),
            search=("l2",),
        ),
        Axis(
            "gate",
            "none",
            "of the normalised read-out, computed from the input",
            options=GATES,
            search=("none", "silu"),
        ),
        Axis(
            "gate_map",
            "dense",
            "how the gate comes from the input: dense, or low-rank, through as many numbers as a"
            " head has value channels",
            options=("dense", "low-rank"),
            search=("dense", "low-rank"),
        ),
        Axis(
            "norm",
            "rmsnorm",
            "of the read-out, per head, before the gate",
            options=("none", "rmsnorm", "groupnorm"),
            search=("rmsnorm",),
        ),
    ),
    configure=configure,
    points=POINTS,
)
