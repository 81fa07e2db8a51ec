"""Hybrids of attention with Mamba: Jamba, Falcon-H1, Granite 4.0, Bamba."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...primitives.base import Gene
from ..genome import Genome, Op, Slot
from .experts import beside, hidden
from .fields import Fields, alone, op
from .mamba import dt_rank
from .parts import attention, expansion, heads_of, layer_count, mamba2, mlp, rope, without_rope

JAMBA: Mapping[str, Any] = {
    "vocab_size": 65536,
    "tie_word_embeddings": False,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "num_experts_per_tok": 2,
    "num_experts": 16,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
    "attn_layer_period": 8,
    "attn_layer_offset": 4,
    "mamba_d_state": 16,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_conv_bias": True,
    "mamba_proj_bias": False,
}
FALCON_H1: Mapping[str, Any] = {
    "vocab_size": 128000,
    "tie_word_embeddings": False,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "mamba_d_ssm": 1024,
    "mamba_n_heads": 128,
    "mamba_d_head": "auto",
    "mamba_n_groups": 1,
    "mamba_d_state": 256,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_conv_bias": True,
    "mamba_proj_bias": False,
    "mamba_norm_before_gate": True,
    "mamba_rms_norm": False,
    "projectors_bias": False,
    "attention_bias": False,
    "mlp_bias": False,
    "lm_head_multiplier": 1.0,
    "embedding_multiplier": 1.0,
    "key_multiplier": 1.0,
    "attention_out_multiplier": 1.0,
    "attention_in_multiplier": 1.0,
    "ssm_in_multiplier": 1.0,
    "ssm_out_multiplier": 1.0,
}
GRANITE: Mapping[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "embedding_multiplier": 1.0,
    "logits_scaling": 1.0,
    "residual_multiplier": 1.0,
    "attention_multiplier": 1.0,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "shared_intermediate_size": 1024,
    "mamba_n_heads": 128,
    "mamba_n_groups": 1,
    "mamba_d_state": 256,
    "mamba_d_head": "auto",
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_conv_bias": True,
    "mamba_proj_bias": False,
}
BAMBA: Mapping[str, Any] = {
    "vocab_size": 128000,
    "tie_word_embeddings": False,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.5,
    "attention_bias": False,
    "mlp_bias": False,
    "mamba_n_heads": 128,
    "mamba_d_head": "auto",
    "mamba_n_groups": 1,
    "mamba_d_state": 256,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_conv_bias": True,
    "mamba_proj_bias": False,
}
KINDS = {
    "mamba": "mamba",
    "linear_attention": "mamba",
    "attention": "attention",
    "full_attention": "attention",
}
"""Layers' kinds in older files and in newer ones."""

FALCON_FACTORS = (
    "lm_head_multiplier",
    "embedding_multiplier",
    "key_multiplier",
    "attention_out_multiplier",
    "attention_in_multiplier",
    "ssm_in_multiplier",
    "ssm_out_multiplier",
)


def mamba2_of(f: Fields, inner: int, norm: str = "gated-rmsnorm") -> Op:
    """Mamba-2 by the fields that Falcon-H1, Granite and Bamba share."""
    f.always("mamba_conv_bias", why="a genome's Mamba has a bias on the convolution")
    f.never("mamba_proj_bias")
    return mamba2(
        f,
        inner=inner,
        heads="mamba_n_heads",
        head_dim="mamba_d_head",
        state="mamba_d_state",
        groups="mamba_n_groups",
        taps="mamba_d_conv",
        epsilon="rms_norm_eps",
        norm=norm,
    )


def jamba(f: Fields) -> Genome:
    """`JambaConfig`: no positions."""
    f.epsilon("rms_norm_eps")
    f.always("mamba_conv_bias", why="a genome's Mamba has a bias on the convolution")
    f.never("mamba_proj_bias")
    f.never("sliding_window", why="the library's Jamba takes no window")
    mamba = op(
        "jamba-mamba",
        state=f.whole("mamba_d_state"),
        expand=f.number("mamba_expand"),
        rank=dt_rank(f, "mamba_dt_rank"),
        conv=f.whole("mamba_d_conv"),
    )
    dense = channel = mlp(f)
    if f.whole("num_experts") > 1:
        channel = op(
            "mixtral",
            experts=f.whole("num_experts"),
            top_k=f.whole("num_experts_per_tok"),
            expansion=expansion(f, "intermediate_size"),
            renormalise=False,
            **hidden(f),
        )
    mixer = attention(f)
    every, first = f.whole("attn_layer_period"), f.whole("attn_layer_offset", low=0)
    sparse, start = f.whole("expert_layer_period"), f.whole("expert_layer_offset", low=0)
    slots: list[Slot] = []
    for i in range(layer_count(f, None)):
        slots += alone(
            mixer if i % every == first else mamba, channel if i % sparse == start else dense
        )
    return f.genome(slots, position="none")


def falcon_h1(f: Fields) -> Genome:
    """`FalconH1Config`: attention and Mamba-2 side by side."""
    f.never("projectors_bias")
    factors = [f.number(name) for name in FALCON_FACTORS]
    for name in ("mlp_multipliers", "ssm_multipliers"):
        factors += f.list_of(name, float, "factors") or []
    if set(factors) != {1.0}:
        f.note("fixed factors on embeddings, projections, keys and logits (*_multiplier)")
    # With `mamba_use_mlp` false a layer would have no MLP; no class reads it.
    f.known("mamba_use_mlp")
    inner = f.optional("mamba_d_ssm")
    if inner is None:
        inner = f.whole("mamba_expand") * f.whole("hidden_size")
    norm = "none"
    if f.flag("mamba_rms_norm"):
        norm = "rmsnorm-all" if f.flag("mamba_norm_before_gate") else "gated-rmsnorm"
        if norm == "rmsnorm-all" and f.whole("mamba_n_groups") > 1:
            raise f.refuse(
                "mamba_norm_before_gate", "with groups, a genome's Mamba-2 norms after the gate"
            )
    mixer = Slot(
        (attention(f, bias=f.flag("attention_bias"), **rope(f)), mamba2_of(f, inner, norm)), "sum"
    )
    channel = Slot((mlp(f, bias=f.flag("mlp_bias")),))
    return f.genome([mixer, channel] * layer_count(f, None))


def granite(f: Fields) -> Genome:
    """`GraniteMoeHybridConfig`: a dense MLP in every layer, experts beside it where there are
    any."""
    layers = f.layers("layer_types", KINDS)
    layers = layers or ["mamba"] * layer_count(f, None)
    layer_count(f, layers)
    _, _, head_dim = heads_of(f)
    factors = ("embedding_multiplier", "logits_scaling", "residual_multiplier")
    if any(f.get(name) != 1 for name in factors) or f.get("attention_multiplier") != head_dim**-0.5:
        f.note("fixed factors on embeddings, scores, residual additions and logits (*_multiplier)")
    f.neutral("normalization_function", None, "rmsnorm", what="norms of another kind")
    turned = f.get("position_embedding_type") == "rope"
    genes: dict[str, Gene] = {"bias": f.flag("attention_bias"), **(rope(f) if turned else {})}
    if not turned:
        without_rope(f)
    mamba = mamba2_of(f, f.whole("mamba_expand") * f.whole("hidden_size"))
    channel = Slot((mlp(f, size="shared_intermediate_size"),))
    if f.whole("num_local_experts", low=0):
        experts = op(
            "moe",
            experts=f.whole("num_local_experts"),
            top_k=f.whole("num_experts_per_tok"),
            expansion=expansion(f, "intermediate_size"),
            balance="none",
            **hidden(f),
        )
        inner, always_on = f.whole("intermediate_size"), f.whole("shared_intermediate_size")
        channel = beside(experts, inner, channel.branches[0], always_on)
    slots: list[Slot] = []
    for kind in layers:
        slots += [*alone(attention(f, **genes) if kind == "attention" else mamba), channel]
    return f.genome(slots, position="rope" if turned else "none")


def bamba(f: Fields) -> Genome:
    """`BambaConfig`: half of a head's channels are turned."""
    count = layer_count(f, None)
    places = f.list_of("attn_layer_indices", int, "layers' numbers") or []
    f.known("z_loss_coefficient")
    mamba = mamba2_of(f, f.whole("mamba_expand") * f.whole("hidden_size"))
    mixer = attention(f, bias=f.flag("attention_bias"), **rope(f))
    channel = mlp(f, bias=f.flag("mlp_bias"))
    slots: list[Slot] = []
    for i in range(count):
        slots += alone(mixer if i in places else mamba, channel)
    return f.genome(slots)
