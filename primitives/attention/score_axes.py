"""Attention's axes and points for what stands between scores and output, and their rules."""

from __future__ import annotations

from collections.abc import Mapping

from ..base import Axis, Gene, GeneError, Point, Site
from ..genes import choice, flag, number, whole
from .score import ScoreForm, lambda_init

SCORE_AXES: tuple[Axis, ...] = (
    Axis(
        "score",
        "softmax",
        "from scores to weights: softmax; sigmoid minus the log of the number of keys seen (arXiv "
        "2409.04431); differential, one softmax minus lambda times another (arXiv 2410.05258)",
        options=("softmax", "sigmoid", "differential"),
        search=("softmax", "differential"),
    ),
    Axis(
        "logit_cap",
        0.0,
        "scores are cap * tanh(score / cap), as in Gemma 2 (arXiv 2408.00118); 0 for none",
        low=0.0,
        high=1e4,
    ),
    Axis(
        "sink_logits",
        False,
        "a learned score per head in the softmax's denominator, as in gpt-oss (arXiv 2508.10925)",
        options=(False, True),
        search=(False, True),
    ),
    Axis(
        "talking_heads",
        False,
        "heads are mixed before and after the softmax (arXiv 2003.02436)",
        options=(False, True),
    ),
    Axis(
        "residual_scores",
        False,
        "raw scores of the nearest earlier slot with this gene, the same heads and the same pattern"
        " are added (RealFormer, arXiv 2012.11747); where there is none this slot begins anew",
        options=(False, True),
    ),
    Axis(
        "active_heads",
        0,
        "heads per token that a router chooses (MoH, arXiv 2410.11842); 0: all heads, no router",
        low=0.0,
        high=1024.0,
        grows="shares",
    ),
    Axis(
        "shared_heads",
        0,
        "with active_heads: the first heads, which are always on",
        low=0.0,
        high=1024.0,
        grows="shares",
    ),
)

SCORE_POINTS: tuple[Point, ...] = (
    Point(
        "diff-attention",
        {"score": "differential"},
        "Ye et al., Differential Transformer, arXiv 2410.05258",
        "a layer of the paper's depth is two slots",
    ),
    Point(
        "sigmoid-attention",
        {"score": "sigmoid"},
        "Ramapuram et al., arXiv 2409.04431",
        "n of the bias -log n is the number of keys that a query sees, not the sequence's length",
    ),
    Point("gemma2-attention", {"kv_heads": 2, "logit_cap": 50.0}, "Gemma 2, arXiv 2408.00118"),
    Point(
        "gpt-oss-attention",
        {
            "kv_heads": 1,
            "pattern": "sliding",
            "window": 128,
            "sink_logits": True,
            "bias": True,
            "rope_theta": 150000.0,
        },
        "OpenAI, gpt-oss-120b and gpt-oss-20b, arXiv 2508.10925",
        "the layers with a window; every second one has pattern=full",
    ),
    Point("talking-heads", {"talking_heads": True}, "Shazeer et al., arXiv 2003.02436"),
    Point("realformer", {"residual_scores": True}, "He et al., RealFormer, arXiv 2012.11747"),
    Point(
        "moh",
        {"heads": 8, "active_heads": 4, "shared_heads": 2},
        "Jin et al., Mixture-of-Head Attention, arXiv 2410.11842",
    ),
)


def score_form(site: Site, genes: Mapping[str, Gene], heads: int, kv_heads: int) -> ScoreForm:
    """The numbers of the score's axes; raises GeneError where they do not go together."""
    kind = choice(genes, "score")
    active, shared = whole(genes, "active_heads"), whole(genes, "shared_heads")
    form = ScoreForm(
        kind=kind,
        cap=number(genes, "logit_cap"),
        sinks=flag(genes, "sink_logits"),
        talking=flag(genes, "talking_heads"),
        residual=flag(genes, "residual_scores"),
        # A layer of the paper is an attention and an MLP, so two slots.
        lambda_init=lambda_init(site.layer // 2) if kind == "differential" else 0.0,
        active=active,
        shared=shared if active else 0,
    )
    if kind == "sigmoid" and form.sinks:
        raise GeneError(
            "sink_logits takes a share of a softmax, and the weights of score=sigmoid share nothing"
        )
    if kind == "differential":
        _check_pairs(form, heads, kv_heads)
    if form.talking and heads == 1:
        raise GeneError("talking_heads mixes heads, and heads=1 has nothing to mix")
    if form.residual and site.borrows:
        raise GeneError(
            "residual_scores adds scores over the same cache, and an operator that borrows keys "
            "and values has none of its own"
        )
    if active and shared >= heads - 1:
        raise GeneError(f"shared_heads={shared} of heads={heads} leaves no two heads to route")
    if active > heads - form.shared:
        raise GeneError(
            f"active_heads={active} is more than the {heads - form.shared} heads that are routed"
        )
    return form


def _check_pairs(form: ScoreForm, heads: int, kv_heads: int) -> None:
    for name, count in (("heads", heads), ("kv_heads", kv_heads)):
        if count % 2:
            raise GeneError(f"score=differential takes heads in pairs, and {name}={count} is odd")
    if form.talking:
        raise GeneError(
            "score=differential subtracts pairs of heads that talking_heads would mix: choose one"
        )
    if form.active:
        raise GeneError(
            "score=differential subtracts pairs of heads, and active_heads routes them one by one"
        )
