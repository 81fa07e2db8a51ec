"""The row of the memory that a sequence trains: its axes, its config from them, its points."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from ...kernels.inner_model import Activation, Form, Inner
from ..base import Axis, Gene, Liv, Primitive, Site
from ..genes import choice, flag, number, whole
from ..recurrent_parts import head_count, inner_width, taps_axis
from .core import MemoryConfig
from .layer import GATES, MemoryLayerConfig
from .points import POINTS

HEAD_TARGET = 64
SAFE = 0.5
"""The learning rate of `rate=0` over that of one token: tokens that are all alike with keys of
length one, gates and momentum half open, take W - 2 theta C / (1 - eta) (W - W*) in a batch, which
overshoots beyond rate * C = 1."""


def memory_config(name: str, site: Site, genes: Mapping[str, Gene]) -> MemoryConfig:
    """The memory of a layer. Raises GeneError where heads or hidden channels are not whole."""
    heads = head_count(name, site.width, whole(genes, "heads"), HEAD_TARGET)
    head_dim = site.width // heads
    depth, batch_tokens = whole(genes, "depth"), whole(genes, "mini_batch")
    hidden = 0
    if depth > 1:
        hidden = inner_width(f"{name} (heads of {head_dim})", head_dim, number(genes, "expand"))
    scale = 1.0 if choice(genes, "loss") == "sum" else 1 / head_dim
    inner = Inner(
        form=cast(Form, choice(genes, "form")),
        activation=cast(Activation, choice(genes, "inner_activation")),
        bias=flag(genes, "bias"),
        scale=scale,
    )
    return MemoryConfig(
        width=site.width,
        heads=heads,
        head_dim=head_dim,
        depth=depth,
        hidden=hidden,
        inner=inner,
        momentum=flag(genes, "momentum"),
        forget=flag(genes, "forget"),
        rate=number(genes, "rate") or SAFE / batch_tokens,
        batch_tokens=batch_tokens,
        conv=whole(genes, "conv"),
        activation=choice(genes, "activation"),
        qk_norm=choice(genes, "qk_norm"),
        v_norm=choice(genes, "v_norm"),
        shared_qk=flag(genes, "shared_qk"),
    )


def configure(site: Site, genes: Mapping[str, Gene]) -> MemoryLayerConfig:
    return MemoryLayerConfig(
        memory=memory_config("learned-memory", site, genes),
        norm=choice(genes, "norm"),
        gate=choice(genes, "gate"),
        persistent=whole(genes, "persistent"),
    )


LEARNING_AXES = (
    Axis(
        "heads",
        0,
        "memories side by side; 0 takes 64 channels each, or four where the width has no room",
        low=0.0,
        search=(0, 1, 4),
        grows="heads",
    ),
    Axis(
        "depth",
        1,
        "matrices of the inner model: 1 is linear, 2 and more an MLP",
        low=1.0,
        high=4.0,
        search=(1, 2),
    ),
    Axis(
        "expand",
        4.0,
        "hidden channels of the inner MLP over those of a head",
        low=0.25,
        high=8.0,
        search=(1.0, 4.0),
    ),
    Axis(
        "form",
        "plain",
        "the inner model f of its MLP: plain; residual, x + MLP(x); residual-norm, x + LN(MLP(x))."
        " A norm with forgetting and momentum makes the weights' path chaotic",
        options=("plain", "residual", "residual-norm"),
    ),
    Axis(
        "inner_activation",
        "silu",
        "between the matrices of the inner MLP",
        options=("gelu", "silu"),
    ),
    Axis("bias", False, "biases in the inner model", options=(False, True)),
    Axis(
        "loss",
        "sum",
        "the inner loss: sum of squares over the channels of a head, or their mean",
        options=("sum", "mean"),
    ),
    Axis(
        "rate",
        0.0,
        "inner learning rate of a token whose gate is open; 0 is 0.5 / mini_batch",
        low=0.0,
        high=10.0,
    ),
    Axis(
        "mini_batch",
        16,
        "tokens whose gradients are taken at the same weights",
        low=1.0,
        high=1024.0,
        search=(4, 16),
    ),
    Axis(
        "momentum",
        False,
        "steps carry momentum, per head at a rate from the input (Titans)",
        options=(False, True),
    ),
    Axis(
        "forget",
        False,
        "weights decay, per head at a rate from the input (Titans)",
        options=(False, True),
    ),
    taps_axis(4),
    Axis(
        "activation",
        "none",
        "of queries, keys and values, after the convolution",
        options=("none", "silu"),
    ),
    Axis(
        "qk_norm",
        "l2",
        "queries and keys have length one",
        options=("none", "l2"),
    ),
    Axis(
        "v_norm",
        "l2",
        "values have length one, which bounds the gradients of a deep memory",
        options=("none", "l2"),
    ),
    Axis(
        "shared_qk",
        False,
        "one projection for queries and keys, told apart by convolutions; the values have none",
        options=(False, True),
    ),
)

LEARNED_MEMORY = Primitive(
    name="learned-memory",
    kind="mixer",
    summary="a linear model or MLP per head that each token trains, and reads (TTT, Titans)",
    source="TTT (arXiv 2407.04620), Titans (arXiv 2501.00663)",
    liv=Liv("qkv, learning rates and gate", "semi-separable", "none", "none", "grouped"),
    axes=(
        *LEARNING_AXES,
        Axis(
            "norm",
            "rmsnorm",
            "of what is read, all heads together, before the gate",
            options=("none", "rmsnorm", "layernorm"),
        ),
        Axis(
            "gate",
            "silu",
            "of what is read, computed from the input",
            options=GATES,
            search=("none", "silu"),
        ),
        Axis(
            "persistent",
            0,
            "learned tokens that the memory is taught before every sequence (Titans)",
            low=0.0,
            high=256.0,
            search=(0, 4),
        ),
    ),
    configure=configure,
    points=POINTS,
)
