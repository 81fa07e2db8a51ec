"""What the readers of several families share: attention, RoPE, MLPs, experts, Mamba-2."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ...primitives.base import Gene
from ...primitives.channel.mlp import inner_width
from ...primitives.recurrent_parts import EPS
from ..genome import Op
from ..header import MAX_SLOTS
from .fields import ConfigurationError, Fields, op, shown

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "relu2": "relu2",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu-tanh",
    "gelu_new": "gelu-tanh",
}
"""The library's names of activations."""

YARN = {"beta_fast": 32.0, "beta_slow": 1.0}
"""What of YaRN the genome's form has fixed (`primitives/rope.py`)."""


def activation(f: Fields, name: str) -> str:
    """The activation axis from its field."""
    return ACTIVATIONS[f.option(name, ACTIVATIONS)]


def expansion(f: Fields, name: str, inner: int | None = None) -> float:
    """Inner width over width, for the inner width of a field (or one that follows from it)."""
    inner = f.whole(name) if inner is None else inner
    width = f.whole("hidden_size")
    if inner_width(width, inner / width) != inner:
        raise ConfigurationError(
            f"{name} gives an inner width of {inner}: a genome's are multiples of 8"
        )
    return inner / width


def mlp(
    f: Fields,
    act: str = "hidden_act",
    size: str = "intermediate_size",
    inner: int | None = None,
    **genes: Gene,
) -> Op:
    """A gated MLP, of the inner width of a field or one that follows from it."""
    kind = activation(f, act)
    name = {"silu": "swiglu", "gelu": "geglu", "gelu-tanh": "geglu"}.get(kind, "mlp")
    return op(name, expansion=expansion(f, size, inner), activation=kind, **genes)


def heads_of(f: Fields) -> tuple[int, int, int]:
    """Query heads, key-value heads and the width of a head."""
    heads = f.whole("num_attention_heads")
    kv_heads = f.optional("num_key_value_heads") or heads
    if heads % kv_heads:
        raise ConfigurationError(
            f"num_key_value_heads={kv_heads} does not divide num_attention_heads={heads}"
        )
    width = f.whole("hidden_size")
    head_dim = f.optional("head_dim")
    if head_dim is None:
        if width % heads:
            raise ConfigurationError(
                f"num_attention_heads={heads} does not divide hidden_size={width}"
            )
        head_dim = width // heads
    return heads, kv_heads, head_dim


def attention(f: Fields, **genes: Gene) -> Op:
    """Attention over keys and values of heads; genes beside heads are the caller's."""
    heads, kv_heads, head_dim = heads_of(f)
    name = "mha" if kv_heads == heads else "gqa"
    if name == "gqa":
        genes["kv_heads"] = kv_heads
    if heads * head_dim != f.whole("hidden_size"):
        genes["head_dim"] = head_dim
    return op(name, heads=heads, **genes)


def window(f: Fields, name: str = "sliding_window") -> dict[str, Gene]:
    """The genes of a sliding window; none where the field is null. The library's window counts the
    token itself, as the genome's."""
    tokens = f.optional(name)
    return {} if tokens is None else {"pattern": "sliding", "window": tokens}


def rope(
    f: Fields, kind: str | None = None, theta: str = "rope_theta", base: float | None = None
) -> dict[str, Gene]:
    """The genes of RoPE, from version 5's `rope_parameters` or the older fields.

    `kind`: the layers' kind, where `rope_parameters` has one entry for each. `theta`: the older
    field of the base, with its default `base`.
    """
    known = _rope_parameters(f, kind, theta)
    genes: dict[str, Gene] = {"rope_theta": _number(theta, known.get("rope_theta", base))}
    share = known.get("partial_rotary_factor")
    if share is not None:
        genes["rope_fraction"] = _number("partial_rotary_factor", share)
    scaling = known.get("rope_type") or "default"
    if scaling == "linear":
        genes |= {"rope_scaling": "linear", "rope_factor": _number("factor", known.get("factor"))}
    elif scaling == "yarn" and _is_plain_yarn(known):
        genes |= {
            "rope_scaling": "yarn",
            "rope_factor": _number("factor", known.get("factor")),
            "rope_original": known["original_max_position_embeddings"],
            "rope_rounded": known.get("truncate", True),
        }
    elif scaling != "default":
        f.note(f"a scaling of RoPE ({scaling})")
    return genes


def rope_base(f: Fields) -> float:
    """The base of RoPE, for operators that take no scaling; a scaling is noted."""
    known = _rope_parameters(f, None, "rope_theta")
    scaling = known.get("rope_type") or "default"
    if scaling != "default":
        f.note(f"a scaling of RoPE ({scaling})")
    return _number("rope_theta", known.get("rope_theta"))


def _rope_parameters(f: Fields, kind: str | None, theta: str) -> dict[str, Any]:
    known: dict[str, Any] = {}
    for name in ("rope_scaling", "rope_parameters"):
        value = f.mapping(name)
        if kind is not None and name == "rope_parameters":
            own = value.get(kind)
            value = dict(own) if isinstance(own, Mapping) else {}
        elif kind is not None and kind != "full_attention":
            value = {}
        if "type" in value:
            value.setdefault("rope_type", value.pop("type"))
        known |= value
    for name, field in (("rope_theta", theta), ("partial_rotary_factor",) * 2):
        value = f.get(field)
        if value is not None:
            known.setdefault(name, value)
    return known


def _is_plain_yarn(known: Mapping[str, Any]) -> bool:
    original = known.get("original_max_position_embeddings")
    if not isinstance(original, int) or isinstance(original, bool):
        return False
    if any(known.get(name, value) != value for name, value in YARN.items()):
        return False
    extra = ("attention_factor", "mscale", "mscale_all_dim")
    return all(known.get(name) is None for name in extra)


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigurationError(f"{name} is a number, not {shown(value)}")
    return float(value)


def mamba2(
    f: Fields,
    *,
    inner: int,
    heads: str,
    head_dim: str,
    state: str,
    groups: str,
    taps: str,
    epsilon: str,
    norm: str = "gated-rmsnorm",
) -> Op:
    """Mamba-2 from the names of its fields and its inner width; `auto` heads are as wide as it
    takes. `epsilon` is the field that its own norm shares with the layers'."""
    f.epsilon(epsilon, inside=None if norm == "none" else EPS)
    count = f.whole(heads)
    wide = inner // count if f.get(head_dim) == "auto" else f.whole(head_dim)
    if count * wide != inner:
        raise ConfigurationError(
            f"{heads}={count} heads of {head_dim}={wide} are not the inner width {inner}"
        )
    if not _unlimited(f.get("time_step_limit")):
        f.note("limits of the step size (time_step_limit)")
    return op(
        "mamba2",
        heads=0 if wide == 64 else count,
        expand=inner / f.whole("hidden_size"),
        key_dim=f.whole(state),
        groups=f.whole(groups),
        conv=f.whole(taps),
        norm=norm,
    )


def _unlimited(limit: object) -> bool:
    """A step size from 0 to infinity, which version 5 of the library writes as a mapping."""
    return limit in (None, [0, math.inf], (0, math.inf), [0, {"__float__": "Infinity"}])


def without_rope(f: Fields) -> None:
    """Without positions nothing reads the fields of RoPE, which files have all the same."""
    f.known("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor")


def layer_count(f: Fields, layers: list[str] | None, name: str = "layer_types") -> int:
    """`num_hidden_layers`, which a list of layers must have."""
    count = f.whole("num_hidden_layers")
    if count > MAX_SLOTS:
        raise ConfigurationError(
            f"num_hidden_layers={count}: a genome has at most {MAX_SLOTS} slots"
        )
    if layers is not None and len(layers) != count:
        raise ConfigurationError(f"{name} has {len(layers)} layers where num_hidden_layers={count}")
    return count
