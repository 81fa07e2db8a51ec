"""Attention's row of the catalogue: axes, named points, and which of them go together."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ..base import Axis, Config, Gene, Liv, Point, Primitive, Site
from ..genes import choice, flag, only, whole
from .chosen_axes import CHOSEN_AXES, CHOSEN_FORMS, CHOSEN_POINTS
from .heads import head_counts
from .latent import (
    LATENT_AXES,
    LATENT_POINTS,
    LatentConfig,
    configure_latent,
    latent_lending_problem,
)
from .layer import AttentionConfig
from .longformer import longformer
from .low_rank_axes import LOW_RANK_AXES, LOW_RANK_FORMS, LOW_RANK_POINTS
from .memory_axes import MEMORY_AXES, MEMORY_POINTS, memory_pattern, with_memory
from .pattern_axes import PATTERN_AXES, PATTERN_POINTS, pattern_of
from .patterns import Pattern, pattern_problem
from .position_axes import POSITION_AXES, POSITION_POINTS, distance_of, position_of, rope_of
from .score_axes import SCORE_AXES, SCORE_POINTS, score_form


def lending_problem(lender: object, borrower: object) -> str | None:
    """Why `borrower` cannot use the keys and values of `lender`, in a sentence; None if it can.

    Both are configs.
    """
    if isinstance(lender, LatentConfig) and isinstance(borrower, LatentConfig):
        return latent_lending_problem(lender, borrower)
    for role, config in (("lends", lender), ("borrows", borrower)):
        if isinstance(config, LatentConfig):
            return f"kv=latent {role} latents, and the other one has keys and values"
        if not isinstance(config, AttentionConfig):
            return f"only attention {role} keys and values"
    assert isinstance(lender, AttentionConfig)
    assert isinstance(borrower, AttentionConfig)
    for name in ("kv_heads", "head_dim", "position", "rope_theta", "rope_channels", "rope_form"):
        theirs, ours = getattr(lender, name), getattr(borrower, name)
        if theirs != ours:
            return f"the lender has {name}={theirs} and the borrower {name}={ours}; they must agree"
    return pattern_problem(lender.pattern, borrower.pattern)


FORMS: dict[str, Callable[[Site, Mapping[str, Gene]], Config]] = {**CHOSEN_FORMS, **LOW_RANK_FORMS}
"""Patterns whose layer is another module than `layer.py`'s: what makes their configs."""


def configure(site: Site, genes: Mapping[str, Gene]) -> Config:
    form = FORMS.get(choice(genes, "pattern"))
    if choice(genes, "kv") == "latent":
        only(genes, "kv", {"bias_at": "all"})
        return configure_latent(site, genes)
    if form is None:
        memory = memory_pattern(genes)
        plain = configure_plain(site, genes, memory)
        if memory is not None:
            return with_memory(plain, genes)
        if choice(genes, "pattern") == "global" and not plain.causal:
            return longformer(plain)
        return plain
    # Their layers weigh by a softmax of their own.
    only(genes, "pattern", {axis.name: axis.default for axis in SCORE_AXES} | {"bias_at": "all"})
    return form(site, genes)


def configure_plain(
    site: Site, genes: Mapping[str, Gene], pattern: Pattern | None = None
) -> AttentionConfig:
    """Attention over keys and values of heads, by a pattern that positions alone decide: the given
    one, or the genes'."""
    heads, kv_heads, head_dim = head_counts(site, genes)
    position = position_of(site, genes)
    channels, theta, form = rope_of(genes, position, head_dim)
    # nGPT has a norm of queries and keys of its own.
    normed = flag(genes, "qk_norm") and not site.normalised
    return AttentionConfig(
        width=site.width,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        pattern=pattern_of(genes, kv_heads, position) if pattern is None else pattern,
        score=score_form(site, genes, heads, kv_heads),
        position=position,
        rope_theta=theta,
        rope_channels=channels,
        rope_form=form,
        distance=distance_of(genes, position, site.width, heads, head_dim),
        qk_norm=normed,
        norm_over=choice(genes, "norm_over") if normed else "head",
        norm_scales=flag(genes, "norm_scales") or not normed,
        gate=choice(genes, "gate"),
        entry_bias=flag(genes, "bias") and choice(genes, "bias_at") != "output",
        exit_bias=flag(genes, "bias") and choice(genes, "bias_at") != "inputs",
        conv=0 if site.borrows else whole(genes, "conv"),
        borrows=site.borrows,
        normalised=site.normalised,
    )


ATTENTION = Primitive(
    name="attention",
    kind="mixer",
    summary="softmax attention over all earlier tokens or those that a pattern shows",
    source="Vaswani et al., Attention Is All You Need, arXiv 1706.03762",
    liv=Liv("dense", "low-rank", "none", "softmax", "grouped"),
    axes=(
        Axis("heads", 4, "query heads", low=1.0, high=1024.0, search=(1, 2, 4, 8), grows="heads"),
        Axis(
            "kv_heads",
            0,
            "key-value heads, a divisor of heads; 0 for as many as heads",
            low=0.0,
            high=1024.0,
            search=(0, 1, 2),
            grows="shares",
        ),
        Axis(
            "head_dim",
            0,
            "width of a head; 0 for width / heads",
            low=0.0,
            high=1024.0,
            grows="head",
        ),
        *LATENT_AXES,
        *PATTERN_AXES,
        *MEMORY_AXES,
        *LOW_RANK_AXES,
        *CHOSEN_AXES,
        *POSITION_AXES,
        Axis(
            "qk_norm",
            False,
            "RMSNorm on every head's queries and keys, as in Qwen3 (arXiv 2505.09388)",
            options=(False, True),
            search=(False, True),
        ),
        Axis(
            "norm_over",
            "head",
            "qk_norm: over the channels of every head by itself, or of all heads together (OLMoE,"
            " arXiv 2409.02060)",
            options=("head", "all"),
        ),
        Axis(
            "norm_scales",
            True,
            "qk_norm: learned scales; Llama 4's norm has none",
            options=(True, False),
        ),
        Axis(
            "gate",
            "none",
            "gate on the heads' outputs before the last projection (arXiv 2505.06708)",
            options=("none", "sigmoid"),
            search=("none", "sigmoid"),
        ),
        *SCORE_AXES,
        Axis("bias", False, "biases on the projections", options=(False, True)),
        Axis(
            "bias_at",
            "all",
            "bias: on which projections; inputs, those of queries, keys and values (Qwen2, arXiv"
            " 2407.10671), or output, the last (RecurrentGemma, arXiv 2404.07839)",
            options=("all", "inputs", "output"),
        ),
        Axis(
            "conv",
            0,
            "taps of a short convolution on queries, keys and values (STAR's SA-2, arXiv "
            "2411.17800), 0 for none; an operator that borrows its keys and values has none",
            low=0.0,
            high=16.0,
            search=(0, 3, 4),
        ),
    ),
    configure=configure,
    points=(
        Point("mha", {"kv_heads": 0}, "Vaswani et al., arXiv 1706.03762"),
        Point("gqa", {"kv_heads": 2}, "Ainslie et al., arXiv 2305.13245"),
        Point("mqa", {"kv_heads": 1}, "Shazeer, arXiv 1911.02150"),
        *LATENT_POINTS,
        *PATTERN_POINTS,
        *MEMORY_POINTS,
        *LOW_RANK_POINTS,
        *CHOSEN_POINTS,
        *SCORE_POINTS,
        *POSITION_POINTS,
    ),
    lends=True,
    lending_problem=lending_problem,
)
