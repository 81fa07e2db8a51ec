"""Hybrids of attention with a delta rule: Qwen3-Next, Kimi Linear."""

from __future__ import annotations

from ..genome import Genome
from .experts import (
    dense_first,
    gated_experts,
    latent_attention,
    qwen_layers,
    sigmoid_experts,
    sparse,
)
from .fields import TRANSFORMER, ConfigurationError, Fields, family, op
from .parts import UNTIED, attention, layers
from .turns import rope, without_rope

NEXT_KINDS = {"linear_attention": "linear", "full_attention": "full"}


@family(
    "Qwen3NextConfig", {"num_local_experts": "num_experts"},
    vocab_size=151936, hidden_size=2048, intermediate_size=5632, num_hidden_layers=48,
    num_attention_heads=16, num_key_value_heads=2, partial_rotary_factor=0.25, head_dim=256,
    attention_bias=False, full_attention_interval=4, linear_conv_kernel_dim=4,
    linear_key_head_dim=128, linear_value_head_dim=128, linear_num_key_heads=16,
    linear_num_value_heads=32, decoder_sparse_step=1, moe_intermediate_size=512,
    shared_expert_intermediate_size=512, num_experts_per_tok=10, num_experts=512,
    norm_topk_prob=True, mlp_only_layers=[], hidden_act="silu",
)  # fmt: skip
def qwen3_next(f: Fields) -> Genome:
    """Gated DeltaNet, and gated attention in every fourth layer."""
    f.neutral("hidden_act", "silu", "swish", what="the activation after the convolution")
    period = f.whole("full_attention_interval")
    kinds = layers(f, NEXT_KINDS, lambda i: "linear" if (i + 1) % period else "full")
    bias = f.flag("attention_bias")
    full = attention(f, qk_norm=True, gate="sigmoid", bias=bias, **rope(f, partial=True))
    heads = f.whole("linear_num_value_heads")
    linear = op(
        "gated-deltanet",
        heads=heads,
        groups=f.whole("linear_num_key_heads"),
        key_dim=f.whole("linear_key_head_dim"),
        expand=heads * f.whole("linear_value_head_dim") / f.whole("hidden_size"),
        conv=f.whole("linear_conv_kernel_dim"),
    )
    mixers = [linear if kind == "linear" else full for kind in kinds]
    return f.genome(qwen_layers(f, mixers, gated_experts(f)))


KIMI_ALIASES = {
    "moe_renormalize": "norm_topk_prob",
    "num_expert_group": "n_group",
    "num_local_experts": "n_routed_experts",
    "num_experts": "n_routed_experts",
    "num_experts_per_token": "num_experts_per_tok",
    "num_shared_experts": "n_shared_experts",
}
KIMI_KINDS = {"linear_attention": "kda", "full_attention": "mla"}
MLP_KINDS = {"dense": "dense", "sparse": "sparse"}
LINEAR = {
    "linear_head_dim": "head_dim",
    "linear_num_heads": "num_heads",
    "linear_conv_kernel_dim": "short_conv_kernel_size",
}
"""The library's fields of Kimi Delta Attention, and those of the published `linear_attn_config`."""


@family(
    "KimiLinearConfig", KIMI_ALIASES, TRANSFORMER,
    vocab_size=163840, hidden_size=2304, intermediate_size=9216, moe_intermediate_size=1024,
    num_hidden_layers=27, n_shared_experts=1, routed_scaling_factor=2.446, kv_lora_rank=512,
    qk_rope_head_dim=64, v_head_dim=128, qk_nope_head_dim=128, n_group=1, topk_group=1,
    num_experts_per_tok=8, norm_topk_prob=True, rms_norm_eps=1e-5, attention_bias=False,
    n_routed_experts=256, linear_head_dim=128, linear_num_heads=32, linear_conv_kernel_dim=4,
    first_k_dense_replace=1, hidden_act="silu",
)  # fmt: skip
def kimi_linear(f: Fields) -> Genome:
    """Kimi Delta Attention, and latent attention without positions."""
    linear = f.inside("linear_attn_config", {name: f.get(field) for field, name in LINEAR.items()})
    heads, head_dim = linear.whole("num_heads"), linear.whole("head_dim")
    kda = op(
        "kda",
        heads=heads,
        key_dim=head_dim,
        expand=heads * head_dim / f.whole("hidden_size"),
        conv=linear.whole("short_conv_kernel_size"),
    )
    mla = latent_attention(f, {})
    without_rope(f)
    f.never("tie_word_embeddings", why=UNTIED)
    f.neutral("hidden_act", "silu", "swish", what="the activation after the convolution")
    f.neutral("mla_use_nope", None, True, what="RoPE in latent attention")
    f.neutral("num_nextn_predict_layers", None, 0, what="modules that predict further tokens")
    f.neutral("moe_router_activation_func", None, "sigmoid", what="the scores of the router")
    f.known("use_grouped_topk", "topk_method")
    routed = sigmoid_experts(f, shared=f.count("n_shared_experts"))
    first = dense_first(f)
    dense = layers(f, MLP_KINDS, lambda i: "dense" if first[i] else "sparse", "mlp_layer_types")
    mixers = [kda if kind == "kda" else mla for kind in _kimi_layers(f, linear)]
    return f.genome(sparse(f, mixers, [kind == "dense" for kind in dense], routed), position="none")


def _kimi_layers(f: Fields, linear: Fields) -> list[str]:
    full, kda = (
        linear.list_of(name, int, "layers' numbers") for name in ("full_attn_layers", "kda_layers")
    )
    if not full or not kda:
        return layers(f, KIMI_KINDS, lambda i: "mla" if i and i % 4 == 0 else "kda")
    kinds = layers(f, KIMI_KINDS, lambda i: "mla" if i + 1 in full else "kda")
    # Numbered from 1 there.
    if not f.given("layer_types") and sorted([*full, *kda]) != [*range(1, len(kinds) + 1)]:
        raise ConfigurationError(
            "linear_attn_config: kda_layers and full_attn_layers do not number every layer once"
        )
    return kinds
