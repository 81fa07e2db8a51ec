"""What the readers of several families share: layers, attention, MLPs, Mamba-2."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

from ...primitives.base import Gene
from ...primitives.channel.mlp import inner_width
from ...primitives.recurrence.matrix_axes import HEAD_TARGET
from ...primitives.recurrent_parts import EPS, auto_heads
from ..genome import Op, Slot
from ..header import MAX_SLOTS
from .fields import ConfigurationError, Fields, op

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

WINDOWS = {"full_attention": "full", "sliding_attention": "sliding"}
MIXERS = {
    "mamba": "mamba",
    "linear_attention": "mamba",
    "attention": "attention",
    "full_attention": "attention",
}
"""Layers' kinds in older files and in newer ones."""

INPUT_BIAS: Mapping[str, Gene] = {"bias": True, "bias_at": "inputs"}
"""Biases on queries, keys and values alone."""
UNTIED = "the library's class has a head of its own, whatever it says"


def layer_count(f: Fields) -> int:
    """`num_hidden_layers`."""
    count = f.whole("num_hidden_layers")
    if count > MAX_SLOTS:
        raise ConfigurationError(
            f"num_hidden_layers={count}: a genome has at most {MAX_SLOTS} slots"
        )
    return count


def layers(
    f: Fields,
    kinds: Mapping[str, str],
    otherwise: Callable[[int], str],
    name: str = "layer_types",
) -> list[str]:
    """The kind of every layer, in the words of `kinds`' values: as the file lists them, else by
    their numbers."""
    count = layer_count(f)
    listed = f.layers(name, kinds)
    if listed is not None and len(listed) != count:
        raise ConfigurationError(f"{name} has {len(listed)} layers where num_hidden_layers={count}")
    return [otherwise(i) for i in range(count)] if listed is None else listed


def stack(mixers: Iterable[Op | Slot], channels: Op | Slot | Sequence[Op | Slot]) -> list[Slot]:
    """Layers of a mixer and a channel mixer: one for all of them, or each its own."""
    mixers = list(mixers)
    if isinstance(channels, Op | Slot):
        channels = [channels] * len(mixers)
    pairs = zip(mixers, channels, strict=True)
    return [one if isinstance(one, Slot) else Slot((one,)) for pair in pairs for one in pair]


def activation(f: Fields, name: str = "hidden_act") -> str:
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


def attentions(
    f: Fields,
    kinds: Sequence[str],
    own: Mapping[str, Mapping[str, Gene]] | None = None,
    /,
    **genes: Gene,
) -> list[Op]:
    """Attention for every layer, with the window where its kind is sliding; `own` are further
    genes of a kind."""

    def one(kind: str) -> Op:
        local = window(f) if kind == "sliding" else {}
        return attention(f, **genes, **local, **(own or {}).get(kind, {}))

    made = {kind: one(kind) for kind in dict.fromkeys(kinds)}
    return [made[kind] for kind in kinds]


def conv_bias(f: Fields, name: str) -> None:
    """Refuses Mamba without a bias on its convolution."""
    f.always(name, why="a genome's Mamba has a bias on the convolution")


def mamba2(
    f: Fields,
    *,
    inner: int,
    heads: str = "mamba_n_heads",
    head_dim: str = "mamba_d_head",
    state: str = "mamba_d_state",
    groups: str = "mamba_n_groups",
    taps: str = "mamba_d_conv",
    norm: str = "gated-rmsnorm",
) -> Op:
    """Mamba-2 from the names of its fields and its inner width; `auto` heads are as wide as it
    takes."""
    if norm != "none":
        f.inner_epsilon = EPS
    count = f.whole(heads)
    wide = inner // count if f.get(head_dim) == "auto" else f.whole(head_dim)
    if count * wide != inner:
        raise ConfigurationError(
            f"{heads}={count} heads of {head_dim}={wide} are not the inner width {inner}"
        )
    if not _unlimited(f.get("time_step_limit")):
        f.note("limits of the step size (time_step_limit)")
    return mamba2_heads(f, inner, heads, state, groups, taps, norm=norm)


def mamba2_heads(
    f: Fields, inner: int, heads: str, state: str, groups: str, taps: str, **genes: Gene
) -> Op:
    """Mamba-2 of an inner width, from the names of its fields; heads are as wide as their number
    makes them."""
    count, shared = f.whole(heads), f.whole(groups)
    if inner % count:
        raise ConfigurationError(f"{heads}={count} does not divide the inner width {inner}")
    if count % shared:
        raise ConfigurationError(f"{groups}={shared} does not divide {heads}={count}")
    return op(
        "mamba2",
        heads=0 if count == auto_heads(inner, HEAD_TARGET) else count,
        expand=inner / f.whole("hidden_size"),
        key_dim=f.whole(state),
        groups=shared,
        conv=f.whole(taps),
        **genes,
    )


def _unlimited(limit: object) -> bool:
    """A step size from 0 to infinity, which version 5 of the library writes as a mapping."""
    return limit in (None, [0, math.inf], (0, math.inf), [0, {"__float__": "Infinity"}])
