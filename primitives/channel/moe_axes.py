"""Axes and named points of the mixture of experts, and the way from genes to its config."""

from __future__ import annotations

from collections.abc import Mapping

from ..base import Axis, Gene, GeneError, Liv, Primitive, Site
from ..genes import choice, flag, number, only, whole
from .balance import BalanceConfig
from .experts import ExpertsConfig
from .mlp import ACTIVATION, ACTIVATIONS, EXPANSION, GATED, MlpConfig, inner_width
from .moe import MoeConfig
from .moe_points import POINTS
from .router import BALANCE_RATE, RouterConfig
from .special import SpecialConfig

NEUTRAL: dict[str, Gene] = {
    "router_bias": False,
    "router_residual": False,
    "noise": "none",
    "groups": 1,
    "zero": 0,
    "copy": 0,
    "constant": 0,
}
"""What a hash, and experts that choose, have no use for."""


def configure(site: Site, genes: Mapping[str, Gene]) -> MoeConfig:
    experts, top_k, who = whole(genes, "experts"), whole(genes, "top_k"), choice(genes, "choice")
    special = SpecialConfig(
        site.width, experts, whole(genes, "zero"), whole(genes, "copy"), whole(genes, "constant")
    )
    shared, activation = whole(genes, "shared"), choice(genes, "activation")
    capacity, gated, bias = number(genes, "capacity"), flag(genes, "gated"), flag(genes, "bias")
    if who != "token":
        only(genes, "choice", NEUTRAL)
    if who == "expert":
        if flag(genes, "causal"):
            raise GeneError("choice=expert reads later tokens: it goes with causal=false")
        if capacity == 0:
            raise GeneError("choice=expert needs a capacity, the experts per token on average")
        only(genes, "choice", {"aux": "none"})
    elif not flag(genes, "causal"):
        raise GeneError(f"choice={who} reads no later tokens: it goes with causal=true")
    elif top_k > special.count + experts:
        held = f"experts={experts}" + (f" and {special.count} special" if special.count else "")
        raise GeneError(f"top_k={top_k} is more than {held}")
    if who == "hash":
        only(genes, "choice", {"capacity": 0.0, "aux": "none", "z_weight": 0.0})
    if activation == "clamped" and (not gated or shared):
        raise GeneError("activation=clamped goes with gated=true and shared=0")
    if flag(genes, "shared_gate") and not shared:
        raise GeneError("shared_gate=true goes with shared of at least 1")
    inside = choice(genes, "weigh") == "input"
    if inside:
        only(genes, "weigh", {"bias": False, "constant": 0})
    _check_groups(genes, experts + special.count, top_k)
    if choice(genes, "noise") == "random-second" and top_k < 2:
        raise GeneError("noise=random-second goes with top_k of at least 2")
    inner = inner_width(site.width, number(genes, "expansion"))
    moving = choice(genes, "balance") if who == "token" else "none"
    computed = number(genes, "computed") or top_k * experts / (experts + special.count)
    if computed > min(top_k, experts):
        raise GeneError(f"computed={computed:g} is more than top_k={top_k} of experts={experts}")
    device, sent = number(genes, "device_weight"), number(genes, "sent_weight")
    groups, top_groups = whole(genes, "groups"), whole(genes, "top_groups")
    if (device or sent) and groups == 1:
        raise GeneError("device_weight and sent_weight go with groups of at least 2")
    aux = choice(genes, "aux")
    # What has no effect here is set to one value, so that equal layers have equal configs.
    limited = top_groups < groups
    uneven = special.count and (aux != "none" or capacity)
    return MoeConfig(
        width=site.width,
        router=RouterConfig(
            width=site.width,
            experts=experts,
            special=special.count,
            choice=who,
            top_k=1 if who == "expert" else top_k,
            score="softmax" if who == "hash" else choice(genes, "score"),
            # With one expert the quotient is 1 whatever the router says: it would never learn.
            renormalise=flag(genes, "renormalise") and top_k > 1 and who == "token",
            scale=number(genes, "scale"),
            bias=flag(genes, "router_bias"),
            balance=moving,
            bias_rate=number(genes, "bias_rate") if moving != "none" else 0.0,
            computed=computed if moving == "proportional" else 0.0,
            noise=choice(genes, "noise"),
            groups=groups if limited else 1,
            top_groups=top_groups if limited else 1,
            group_score=choice(genes, "group_score") if limited else "max",
            capacity=capacity,
            special_load=number(genes, "special_load") if uneven else 1.0,
            residual=flag(genes, "router_residual"),
        ),
        experts=ExpertsConfig(site.width, experts, inner, activation, gated, bias, inside),
        special=special,
        shared=MlpConfig(site.width, shared * inner, activation, gated, bias) if shared else None,
        shared_gate=flag(genes, "shared_gate"),
        balance=BalanceConfig(
            aux,
            number(genes, "aux_weight") if aux != "none" else 0.0,
            number(genes, "z_weight"),
            device,
            sent,
            groups=groups if device or sent else 1,
            top_groups=min(top_groups, groups) if device or sent else 1,
        ),
    )


def _check_groups(genes: Mapping[str, Gene], outputs: int, top_k: int) -> None:
    groups, top_groups = whole(genes, "groups"), whole(genes, "top_groups")
    if groups == 1:
        return
    if outputs % groups:
        raise GeneError(f"groups={groups} does not divide the {outputs} experts")
    size = outputs // groups
    if top_groups < groups and top_k > top_groups * size:
        raise GeneError(f"top_k={top_k} is more than top_groups={top_groups} groups of {size} have")
    if choice(genes, "group_score") == "top2" and size < 2:
        raise GeneError("group_score=top2 needs groups of at least 2 experts")


AXES = (
    Axis("experts", 8, "routed experts", low=1.0, high=4096.0, search=(4, 8, 16)),
    Axis("top_k", 2, "experts per token", low=1.0, high=256.0, search=(1, 2, 4)),
    Axis(
        "expansion",
        1.0,
        "inner width of one expert as a multiple of the width, rounded to a multiple of 8",
        low=EXPANSION.low,
        high=EXPANSION.high,
        search=(0.5, 1.0, 2.0),
    ),
    Axis("shared", 0, "experts that are always on", low=0.0, high=64.0, search=(0, 1)),
    Axis(
        "shared_gate",
        False,
        "a sigmoid gate per token on the shared experts",
        options=(False, True),
    ),
    Axis(
        "choice",
        "token",
        "who chooses: token: each token its experts; expert: each expert its tokens, of the whole "
        "sequence; hash: a fixed function of the token's id",
        options=("token", "expert", "hash"),
        search=("token", "hash"),
    ),
    Axis("causal", True, "read no later tokens; false with choice=expert", options=(False, True)),
    Axis(
        "score",
        "softmax",
        "from the router's logits to scores",
        options=("softmax", "sigmoid"),
        search=("softmax", "sigmoid"),
    ),
    Axis(
        "renormalise",
        True,
        "divide the chosen experts' scores by their sum, where top_k is more than 1",
        options=(False, True),
    ),
    Axis("scale", 1.0, "factor on the routed experts' output", low=0.0, high=100.0),
    Axis(
        "weigh",
        "output",
        "where a token's weight stands: on what an expert gives, or on what it reads (Llama 4)",
        options=("output", "input"),
    ),
    Axis("router_bias", False, "a learned bias on the router's logits", options=(False, True)),
    Axis(
        "router_residual",
        False,
        "add a map of the logits of the mixture before (MoE++)",
        options=(False, True),
        search=(False, True),
    ),
    Axis(
        "noise",
        "none",
        "of the router in training: noisy-top-k (Shazeer): learned, on the logits; jitter "
        "(Switch): on its input; random-second (GShard): choices after the first go out at random",
        options=("none", "noisy-top-k", "jitter", "random-second"),
        search=("none", "noisy-top-k"),
    ),
    Axis("groups", 1, "groups that the experts stand in", low=1.0, high=256.0),
    Axis("top_groups", 1, "groups that a token chooses within", low=1.0, high=256.0),
    Axis(
        "group_score",
        "max",
        "a group's score: its best expert's (DeepSeek-V2), or its two best together (V3)",
        options=("max", "top2"),
    ),
    Axis(
        "capacity",
        0.0,
        "tokens of a training sequence that an expert takes, as a multiple of an even share; 0: "
        "any; choice=expert: experts per token on average",
        low=0.0,
        high=64.0,
        search=(0.0, 1.25),
    ),
    Axis("zero", 0, "further experts that give nothing", low=0.0, high=1024.0, search=(0, 1)),
    Axis(
        "copy", 0, "further experts that give the token back", low=0.0, high=1024.0, search=(0, 1)
    ),
    Axis(
        "constant",
        0,
        "further experts that mix the token with a learned vector",
        low=0.0,
        high=1024.0,
        search=(0, 1),
    ),
    Axis(
        "special_load",
        1.0,
        "MoE++'s tau: the load of an expert over that of a zero, copy or constant one, which the "
        "capacity allows and the balancing loss aims at",
        low=0.01,
        high=100.0,
    ),
    Axis(
        "balance",
        "bias",
        "a bias on the selection moves against the load after each step: bias: by a fixed amount "
        "(arXiv 2408.15664); proportional: in proportion to what is missing (LongCat-Flash)",
        options=("none", "bias", "proportional"),
    ),
    Axis(
        "bias_rate",
        BALANCE_RATE,
        "how far a step moves the bias; proportional: its factor on the missing share of choices",
        low=0.0,
        high=100.0,
    ),
    Axis(
        "computed",
        0.0,
        "proportional: experts per token that compute, on average, of top_k; 0: their even share",
        low=0.0,
        high=256.0,
    ),
    Axis(
        "aux",
        "none",
        "a loss that evens the load: over the batch (Switch), within each sequence (DeepSeek), of "
        "first choices within each sequence (GShard), of summed weights (Shazeer)",
        options=("none", "batch", "sequence", "first", "importance"),
        search=("none", "batch"),
    ),
    Axis("aux_weight", 0.01, "of the balancing loss", low=0.0, high=10.0),
    Axis(
        "device_weight",
        0.0,
        "of DeepSeek-V2's loss that evens the load of groups, as of devices",
        low=0.0,
        high=10.0,
    ),
    Axis(
        "sent_weight",
        0.0,
        "of DeepSeek-V2's loss that evens the tokens sent to groups, as to devices",
        low=0.0,
        high=10.0,
    ),
    Axis("z_weight", 0.0, "of the router's z-loss (ST-MoE)", low=0.0, high=10.0),
    Axis(
        "activation",
        "silu",
        "the nonlinearity (of the gate, where there is one); clamped: gpt-oss' gated unit",
        options=(*ACTIVATIONS, "clamped"),
        search=ACTIVATION.search,
    ),
    GATED,
    Axis("bias", False, "biases of the experts", options=(False, True)),
)

MOE = Primitive(
    name="moe",
    kind="channel",
    summary="a mixture of experts: every token picks its top k, or is picked",
    source="Shazeer et al., arXiv 1701.06538; DeepSeekMoE, arXiv 2401.06066",
    liv=Liv("dense, routed", "diagonal", "none", "swish", "dense"),
    axes=AXES,
    configure=configure,
    points=POINTS,
)
