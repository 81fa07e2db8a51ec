"""The row of the matrix-state recurrence: its axes, and its config from them."""

from __future__ import annotations

from collections.abc import Mapping

from ..base import Axis, Gene, GeneError, Liv, Primitive, Site
from ..decays import FORMS, slope_share
from ..genes import choice, flag, number, whole
from ..recurrent_parts import GATES, NORMS, group_count, head_count, inner_width, taps_axis
from ..token_shift import SHIFTS
from .features import FEATURES, KEEPS_WIDTH, POSITIVE, TAYLOR_MOST
from .matrix_points import POINTS
from .matrix_state import RecurrenceConfig

HEAD_TARGET = 64
DECAYS = ("none", "fixed", "slopes", "learned", "scalar", "vector")


def configure(site: Site, genes: Mapping[str, Gene]) -> RecurrenceConfig:
    name = "recurrence"
    inner = inner_width(name, site.width, number(genes, "expand"))
    heads = head_count(name, inner, whole(genes, "heads"), HEAD_TARGET)
    keys = site.width * number(genes, "key_expand") / heads
    key_dim = whole(genes, "key_dim") or 2 * max(1, round(keys / 2))
    rotary, decay = flag(genes, "rotary"), choice(genes, "decay")
    feature, normaliser = choice(genes, "feature"), flag(genes, "normaliser")
    if rotary and feature not in KEEPS_WIDTH:
        raise GeneError(
            f"{name}: rotary turns pairs of key channels, which feature={feature} does not keep; "
            f"{', '.join(KEEPS_WIDTH)} do"
        )
    if rotary and key_dim % 2:
        raise GeneError(f"{name}: rotary turns pairs of channels; key_dim={key_dim} is odd")
    bonus = flag(genes, "bonus")
    if normaliser and (feature not in POSITIVE or rotary or bonus):
        raise GeneError(
            f"{name}: the normaliser divides by a sum of products of queries and keys, which must "
            f"be positive: it needs feature={' or '.join(POSITIVE)}, rotary=false and bonus=false"
        )
    if decay in ("vector", "learned") and feature not in KEEPS_WIDTH:
        raise GeneError(
            f"{name}: decay={decay} is one per key channel, which feature={feature} does not keep; "
            f"{', '.join(KEEPS_WIDTH)} do"
        )
    if feature == "taylor" and key_dim > TAYLOR_MOST:
        raise GeneError(
            f"{name}: feature=taylor has 1 + K + K^2 features; key_dim={key_dim} is above "
            f"{TAYLOR_MOST}"
        )
    form = choice(genes, "decay_form") if decay in ("scalar", "vector") else ""
    return RecurrenceConfig(
        width=site.width,
        heads=heads,
        groups=group_count(name, heads, whole(genes, "groups")),
        key_dim=key_dim,
        value_dim=inner // heads,
        decay=decay,
        decay_form=form,
        decay_rank=whole(genes, "decay_rank") if decay == "vector" else 0,
        slope=slope_share(site.layer, site.depth) if decay == "slopes" else 0.0,
        bound=site.layer / site.depth if form == "complement" else 0.0,
        rotary=rotary,
        shift=choice(genes, "shift"),
        conv=whole(genes, "conv"),
        activation=choice(genes, "activation"),
        feature=feature,
        normaliser=normaliser,
        bonus=bonus,
        skip=flag(genes, "skip"),
        gate=choice(genes, "gate"),
        norm=choice(genes, "norm"),
    )


RECURRENCE = Primitive(
    name="recurrence",
    kind="mixer",
    summary="linear recurrence with a matrix state (linear attention, RetNet, Mamba-2, GLA, RWKV)",
    source="arXiv 2006.16236 (linear attention), 2307.08621 (RetNet), 2405.21060 (Mamba-2)",
    liv=Liv("qkv with gate", "semi-separable", "none", "none", "grouped"),
    axes=(
        Axis(
            "heads",
            0,
            "heads; 0 takes heads of 64 value channels, or four where the width has no room",
            low=0.0,
            search=(0, 2, 4, 8),
            grows="heads",
        ),
        Axis(
            "key_dim",
            0,
            "key width of a head; 0 is key_expand times the model's width over the heads",
            low=0.0,
            high=256.0,
            search=(0, 16, 32, 64),
            grows="head",
        ),
        Axis(
            "key_expand",
            1.0,
            "width of all keys over the model's width, where key_dim is 0 and groups is 0",
            low=0.125,
            high=4.0,
            search=(0.5, 1.0),
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
            2.0,
            "width of all values over the model's width",
            low=0.25,
            high=8.0,
            search=(1.0, 2.0),
        ),
        Axis(
            "decay",
            "scalar",
            "none; fixed per head (RetNet); slopes: fixed per head and layer (Lightning attention);"
            " learned: one per key channel (RWKV-5); from the input: scalar, one per head and"
            " token, or vector, one per key channel and token (GLA)",
            options=DECAYS,
            search=DECAYS,
        ),
        Axis(
            "decay_form",
            "dt",
            "how a decay comes from the input: dt, exp(-softplus(x + b) exp(A_log)), a scalar one"
            " also scaling the keys by the softplus (Mamba-2); sigmoid, sigmoid(x + b)^(1/16)"
            " (GLA); complement, f = l + (1 - l) sigmoid(x), writing with 1 - f, which a vector has"
            " for keys (HGRN2); exp, exp(-exp(x + b)) (RWKV-6)",
            options=FORMS,
            search=FORMS,
        ),
        Axis(
            "decay_rank",
            16,
            "numbers that a vector decay is made of; 0 makes it by one dense map",
            low=0.0,
            high=256.0,
            search=(0, 16),
            grows="width",
        ),
        Axis(
            "rotary",
            False,
            "rotate queries and keys by their position, as RetNet does",
            options=(False, True),
            search=(False, True),
        ),
        Axis(
            "shift",
            "none",
            "mix each token with the one before it, for every projection by itself: static, a"
            " learned share per channel (RWKV-5); dynamic, a share from the input too (RWKV-6)",
            options=SHIFTS,
            search=SHIFTS,
        ),
        taps_axis(0),
        Axis(
            "activation",
            "none",
            "after the convolution, of queries, keys and values (silu) or queries only (silu-q)",
            options=("none", "silu", "silu-q"),
            search=("none", "silu"),
        ),
        Axis(
            "feature",
            "none",
            "feature map of queries and keys: elu+1 (linear attention), softmax over channels,"
            " taylor (Based), favor (Performer's random features), hedgehog (learned)",
            options=FEATURES,
            search=FEATURES,
        ),
        Axis(
            "normaliser",
            False,
            "divide the read-out by the sum of its weights, which costs a column of the state",
            options=(False, True),
            search=(False,),
        ),
        Axis(
            "bonus",
            False,
            "read before writing, the token itself weighted by a learned bonus per key channel"
            " (RWKV-5 and 6)",
            options=(False, True),
            search=(False, True),
        ),
        Axis(
            "skip",
            False,
            "add the values, scaled per head, to the read-out (Mamba-2's D)",
            options=(False, True),
            search=(False, True),
        ),
        Axis(
            "gate",
            "silu",
            "of the read-out, computed from the input",
            options=GATES,
            search=("none", "silu"),
        ),
        Axis(
            "norm",
            "rmsnorm",
            "of the read-out: per head before the gate (rmsnorm, groupnorm), over all heads before"
            " it (rmsnorm-all), or over each group after it (gated-rmsnorm)",
            options=NORMS,
            search=("rmsnorm", "gated-rmsnorm"),
        ),
    ),
    configure=configure,
    points=POINTS,
)
