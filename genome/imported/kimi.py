"""Kimi Linear."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..genome import Genome, Op, Slot
from .experts import hidden, latent_attention, sigmoid_experts
from .fields import ConfigurationError, Fields, alone, op, shown
from .parts import layer_count, mlp, without_rope

KIMI_LINEAR: Mapping[str, Any] = {
    "vocab_size": 163840,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "moe_intermediate_size": 1024,
    "num_hidden_layers": 27,
    "num_attention_heads": 32,
    "n_shared_experts": 1,
    "routed_scaling_factor": 2.446,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "qk_nope_head_dim": 128,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "n_routed_experts": 256,
    "linear_head_dim": 128,
    "linear_num_heads": 32,
    "linear_conv_kernel_dim": 4,
}
ALIASES = {
    "moe_renormalize": "norm_topk_prob",
    "num_expert_group": "n_group",
    "num_local_experts": "n_routed_experts",
    "num_experts": "n_routed_experts",
    "num_experts_per_token": "num_experts_per_tok",
    "num_shared_experts": "n_shared_experts",
}
KINDS = {"linear_attention": "kda", "full_attention": "mla"}
MLP_KINDS = {"dense": "dense", "sparse": "sparse"}
LINEAR = {
    "head_dim": "linear_head_dim",
    "num_heads": "linear_num_heads",
    "short_conv_kernel_size": "linear_conv_kernel_dim",
}
"""The fields of `linear_attn_config`, which the published file has, and the library's."""


def kimi_linear(f: Fields) -> Genome:
    """`KimiLinearConfig`: Kimi Delta Attention, and latent attention without positions."""
    f.epsilon("rms_norm_eps")
    sizes = {name: f.whole(name) for name in LINEAR.values()}
    linear = f.mapping("linear_attn_config")
    for name, field in LINEAR.items():
        sizes[field] = _whole(f"linear_attn_config.{name}", linear.get(name, sizes[field]))
    count = layer_count(f, None)
    heads, head_dim = sizes["linear_num_heads"], sizes["linear_head_dim"]
    kda = op(
        "kda",
        heads=heads,
        key_dim=head_dim,
        expand=heads * head_dim / f.whole("hidden_size"),
        conv=sizes["linear_conv_kernel_dim"],
    )
    mla = latent_attention(f, position="none")
    shared = f.optional("n_shared_experts") or 0
    experts = sigmoid_experts(f, "moe", shared=shared, **hidden(f))
    dense = mlp(f)
    without_rope(f)
    f.neutral("mla_use_nope", None, True, what="RoPE in latent attention")
    f.neutral("num_nextn_predict_layers", None, 0, what="modules that predict further tokens")
    f.neutral("moe_router_activation_func", None, "sigmoid", what="the scores of the router")
    f.known("use_grouped_topk", "topk_method")
    slots: list[Slot] = []
    for kind, channel in zip(_mixers(f, count, linear), _channels(f, count), strict=True):
        mixer: Op = kda if kind == "kda" else mla
        slots += alone(mixer, dense if channel == "dense" else experts)
    return f.genome(slots, position="none")


def _mixers(f: Fields, count: int, linear: Mapping[str, Any]) -> list[str]:
    layers = f.layers("layer_types", KINDS)
    if layers is not None:
        layer_count(f, layers)
        return layers
    full, kda = linear.get("full_attn_layers"), linear.get("kda_layers")
    if full is None or kda is None:
        return ["mla" if i and i % 4 == 0 else "kda" for i in range(count)]
    # Numbered from 1 there.
    both = [*full, *kda] if isinstance(full, list) and isinstance(kda, list) else []
    if [i for i in range(1, count + 1) if both.count(i) != 1] or len(both) != count:
        raise ConfigurationError(
            "linear_attn_config: kda_layers and full_attn_layers do not number every layer once"
        )
    return ["mla" if i + 1 in full else "kda" for i in range(count)]


def _channels(f: Fields, count: int) -> list[str]:
    layers = f.layers("mlp_layer_types", MLP_KINDS)
    first = f.get("first_k_dense_replace")
    if layers is not None:
        layer_count(f, layers, "mlp_layer_types")
        return layers
    if f.get("moe_layer_freq") not in (None, 1):
        raise f.refuse("moe_layer_freq", "experts stand in every layer after the dense ones")
    dense = 1 if first is None else f.whole("first_k_dense_replace", low=0)
    return ["dense" if i < dense else "sparse" for i in range(count)]


def _whole(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigurationError(f"{name} is a whole number of at least 1, not {shown(value)}")
    return value
