"""Families whose classes stand in flash-linear-attention: RWKV-7 and Samba.

Their defaults are those of that library's classes in August 2026; it is no dependency.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ...primitives.base import Gene
from ...primitives.norm import LAYERNORM_EPS
from ..genome import Genome, Op
from .fields import ConfigurationError, Fields, family, op
from .mamba import mamba1
from .parts import INPUT_BIAS, expansion, layer_count, stack

ATTENTION: Mapping[str, Any] = {
    "num_kv_heads": None,
    "qkv_bias": False,
    "window_size": None,
    "rope_theta": 10000.0,
}
"""Defaults of an entry of `attn`."""

RWKV_MULTIPLE, GLU_MULTIPLE = 32, 256
"""Inner widths that follow from a ratio are rounded up to these."""

RUNNING = (
    *("attn_mode", "fuse_norm", "fuse_swiglu", "fuse_cross_entropy", "fuse_linear_cross_entropy"),
    *("use_l2warp", "elementwise_affine"),
)
"""Fields about kernels and the loss."""


def _common(f: Fields) -> None:
    f.known(*RUNNING)
    f.never("attnres_block_size")


@family(
    "fla.RWKV7Config", base={},
    hidden_size=2048, hidden_ratio=4, num_hidden_layers=24, head_dim=64, decay_low_rank_dim=64,
    gate_low_rank_dim=128, a_low_rank_dim=64, v_low_rank_dim=16, norm_first=True, norm_bias=True,
    norm_eps=1e-5, tie_word_embeddings=False, vocab_size=32000, hidden_act="sqrelu",
)  # fmt: skip
def rwkv7(f: Fields) -> Genome:
    """The first layer's values are mixed into those of later ones."""
    _common(f)
    f.never("attn", why="RWKV-7 is read without attention beside it")
    f.always("norm_bias", why="a genome's LayerNorm has a bias")
    f.neutral("hidden_act", "sqrelu", what="the activation of the channel mixing")
    epsilon = f.number("norm_eps")
    if epsilon != LAYERNORM_EPS:
        f.note(f"the norms' epsilon (norm_eps={epsilon:g})")
    width = f.whole("hidden_size")
    head_dim = f.optional("head_dim") or width // f.whole("num_heads")
    if width % head_dim or f.get("num_heads") not in (None, width // head_dim):
        raise ConfigurationError(f"heads of {head_dim} channels do not make {width} channels")
    if any(n != width for n in f.list_of("value_dim", int, "widths")):
        raise f.refuse("value_dim", f"a genome's values are as wide as the stream, {width}")
    rank = f.whole("decay_low_rank_dim")
    f.same("a_low_rank_dim", rank, f"a genome has one rank for it and decay, {rank}")
    common: dict[str, int] = {"rank": rank, "gate_rank": f.whole("gate_low_rank_dim")}
    if head_dim != 64:
        common["heads"] = width // head_dim
    first = op("rwkv7", value_mix="lend", **common)
    later = op("rwkv7", value_mix="mix", value_rank=f.whole("v_low_rank_dim"), **common)
    inner = f.optional("intermediate_size")
    ratio = f.number("hidden_ratio")
    if inner is None:
        inner = RWKV_MULTIPLE * -(-int(width * ratio) // RWKV_MULTIPLE)
    channel = op("rwkv7-channel", expansion=expansion(f, "hidden_ratio", inner))
    slots = stack([first] + [later] * (layer_count(f) - 1), channel)
    genome = f.genome(slots, position="none", epsilon=None)
    return replace(genome, norm="layernorm", embedding_norm=f.flag("norm_first"))


@family(
    "fla.SambaConfig", base={},
    hidden_size=2304, state_size=16, num_hidden_layers=18, norm_eps=1e-5, expand=2, conv_kernel=4,
    use_bias=False, use_conv_bias=True, time_step_rank="auto", hidden_ratio=4, vocab_size=32000,
    tie_word_embeddings=False, hidden_act="swish",
    attn={
        "layers": [1, 3, 5, 7, 9, 11, 13, 15, 17], "num_heads": 18, "num_kv_heads": 18,
        "qkv_bias": False, "window_size": 2048, "rope_theta": 10000.0,
    },
)  # fmt: skip
def samba(f: Fields) -> Genome:
    """Mamba, and attention where `attn` says; the MLP's width follows from a ratio."""
    _common(f)
    mamba, width = mamba1(f), f.whole("hidden_size")
    inner = int(width * f.number("hidden_ratio") * 2 / 3)
    inner = GLU_MULTIPLE * -(-inner // GLU_MULTIPLE)
    channel = op("swiglu", expansion=expansion(f, "hidden_ratio", inner))
    mixers = [mamba] * layer_count(f)
    entry = f.inside("attn", ATTENTION)
    places = entry.list_of("layers", int, "layers' numbers") if f.get("attn") else []
    if f.given("attn") and any(not 0 <= i < len(mixers) for i in places):
        raise ConfigurationError(f"attn.layers has a layer that is none of {len(mixers)}")
    attention = _attention(entry, width) if places else mamba
    mixers = [attention if i in places else mamba for i in range(len(mixers))]
    return f.genome(stack(mixers, channel), epsilon="norm_eps")


def _attention(entry: Fields, width: int) -> Op:
    """The attention of an entry of `attn`."""
    heads, window = entry.whole("num_heads"), entry.optional("window_size")
    kv_heads = entry.optional("num_kv_heads") or heads
    if width % heads or heads % kv_heads:
        raise ConfigurationError(
            f"attn: {heads} heads, {kv_heads} with keys and values, at width {width}"
        )
    genes: dict[str, Gene] = {"heads": heads, "rope_theta": entry.number("rope_theta")}
    if kv_heads != heads:
        genes["kv_heads"] = kv_heads
    if entry.flag("qkv_bias"):
        genes |= INPUT_BIAS
    if window is not None:
        genes |= {"pattern": "sliding", "window": window}
    return op("mha" if kv_heads == heads else "gqa", **genes)
