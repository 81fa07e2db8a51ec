"""The row of the memory beside attention (see beside.py): axes, config, points."""

from __future__ import annotations

from collections.abc import Mapping

from ..base import Axis, Gene, GeneError, Liv, Point, Primitive, Site, View
from ..genes import choice, number, whole
from ..recurrent_parts import head_count
from .axes import HEAD_TARGET, LEARNING_AXES, memory_config
from .beside import BesideConfig
from .points import TITANS


def configure(site: Site, genes: Mapping[str, Gene]) -> BesideConfig:
    name = "memory-attention"
    heads = head_count(name, site.width, whole(genes, "attention_heads"), HEAD_TARGET)
    position = choice(genes, "position")
    if position == "inherit":
        # What else a backbone may have is added to its embeddings or to scores of its own.
        position = "rope" if site.position == "rope" else "none"
    if position == "rope" and site.width // heads % 2:
        raise GeneError(
            f"{name}: rope turns pairs of channels, and a head of attention has "
            f"{site.width // heads}; position=none or other attention_heads"
        )
    return BesideConfig(
        memory=memory_config(name, site, genes),
        arrangement=choice(genes, "arrangement"),
        heads=heads,
        window=whole(genes, "window"),
        persistent=whole(genes, "persistent"),
        rope_theta=number(genes, "rope_theta") if position == "rope" else 0.0,
    )


MEMORY_ATTENTION = Primitive(
    name="memory-attention",
    kind="mixer",
    summary="attention near by and a memory trained at test time for the rest (Titans MAG, MAC)",
    source="Titans (arXiv 2501.00663)",
    liv=Liv("qkv, and those and rates of the memory", "low-rank", "banded", "softmax", "grouped"),
    axes=(
        Axis(
            "arrangement",
            "gate",
            "gate: attention in a sliding window, gated by the memory; context: segments of"
            " mini_batch tokens attend to what the memory recalls for them and to themselves",
            options=("gate", "context"),
            search=("gate", "context"),
        ),
        Axis(
            "attention_heads",
            0,
            "heads of attention; 0 takes 64 channels each, or four where the width has no room",
            low=0.0,
            search=(0, 2),
            grows="heads",
        ),
        Axis(
            "window",
            128,
            "tokens that the gate's attention sees, the token itself included",
            low=1.0,
            search=(32, 128),
        ),
        Axis(
            "persistent",
            4,
            "learned tokens that attention always sees; the gate's memory is taught them first",
            low=0.0,
            high=256.0,
            search=(0, 4),
        ),
        Axis(
            "position",
            "inherit",
            "position encoding of attention; inherit takes the backbone's where it is rope",
            options=("inherit", "rope", "none"),
        ),
        Axis("rope_theta", 10000.0, "base of RoPE's wavelengths", low=1.0),
        *LEARNING_AXES,
    ),
    configure=configure,
    points=(
        Point(
            "titans-mag",
            TITANS | {"arrangement": "gate", "heads": 1, "persistent": 4},
            "Titans (arXiv 2501.00663)",
            "memory as a gate: sliding-window attention, o = norm(y) sigmoid(norm(M(x)))",
            view=View(
                "S = eta_t S - theta_t grad l(M_b; k_t, v_t), M = (1-alpha_t) M + S, and a window",
                "the last tokens as they are; an MLP from keys to values of all of them",
                "tokens beyond the window leave attention; the memory decays as the token chooses",
                "|M(k) - v|^2, gradient descent with momentum and weight decay",
            ),
        ),
        Point(
            "titans-mac",
            TITANS | {"arrangement": "context", "heads": 1, "persistent": 4, "mini_batch": 32},
            "Titans (arXiv 2501.00663)",
            "memory as a context, causal: a token sees what was recalled for tokens up to itself",
            view=View(
                "y = Attn([p || M_b(q) || x]), S = eta_t S - theta_t grad l(M_b; y_t),"
                " M = (1-alpha_t) M + S",
                "the segment's tokens; an MLP from keys to values of attention's output",
                "tokens leave attention with their segment; the memory decays as the token chooses",
                "|M(k(y)) - v(y)|^2, gradient descent with momentum and weight decay",
            ),
        ),
    ),
)
