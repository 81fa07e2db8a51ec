"""Transformers with experts: Mixtral, DeepSeek-V2 and V3."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...primitives.base import Gene
from ..genome import Genome, Op, Slot
from .fields import ConfigurationError, Fields, alone, op
from .parts import activation, attention, expansion, layer_count, mlp, rope, rope_base, window

MIXTRAL: Mapping[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "rope_theta": 1000000.0,
    "num_experts_per_tok": 2,
    "num_local_experts": 8,
}
DEEPSEEK_V2: Mapping[str, Any] = {
    "vocab_size": 102400,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "mlp_bias": False,
    "first_k_dense_replace": 0,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "routed_scaling_factor": 1.0,
    "topk_method": "greedy",
    "norm_topk_prob": False,
    "v_head_dim": 128,
    "moe_intermediate_size": 1407,
}
DEEPSEEK_V3: Mapping[str, Any] = {
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "n_shared_experts": 1,
    "n_routed_experts": 256,
    "routed_scaling_factor": 2.5,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "qk_nope_head_dim": 128,
    "n_group": 8,
    "topk_group": 4,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 3,
    "norm_topk_prob": True,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "num_nextn_predict_layers": 1,
}


def mixtral(f: Fields) -> Genome:
    """`MixtralConfig`: the chosen experts' scores sum to one."""
    f.epsilon("rms_norm_eps")
    mixer = attention(f, **window(f), **rope(f))
    experts = op(
        "mixtral",
        experts=f.whole("num_local_experts"),
        top_k=f.whole("num_experts_per_tok"),
        expansion=expansion(f, "intermediate_size"),
        **hidden(f),
    )
    return f.genome(alone(mixer, experts) * layer_count(f, None))


def hidden(f: Fields) -> dict[str, Gene]:
    """The gene of the experts' activation."""
    return {"activation": activation(f, "hidden_act")}


def latent_attention(f: Fields, position: str = "rope") -> Op:
    """Multi-head latent attention by DeepSeek's fields."""
    f.never("attention_bias", why="its biases are on some projections only")
    f.known("num_key_value_heads", "head_dim", "qk_head_dim")
    head_dim = f.whole("qk_nope_head_dim")
    value_dim = f.whole("v_head_dim")
    genes: dict[str, Gene] = {"rope_theta": rope_base(f)} if position == "rope" else {}
    if value_dim != head_dim:
        genes["value_dim"] = value_dim
    return op(
        "mla",
        heads=f.whole("num_attention_heads"),
        head_dim=head_dim,
        latent=f.whole("kv_lora_rank"),
        rope_dim=f.whole("qk_rope_head_dim"),
        q_rank=f.optional("q_lora_rank") or 0,
        **genes,
    )


def deepseek_v2(f: Fields) -> Genome:
    """`DeepseekV2Config`: softmax scores, which the chosen experts keep."""
    f.epsilon("rms_norm_eps")
    f.never("mlp_bias")
    groups: dict[str, Gene] = {}
    if f.option("topk_method", ("greedy", "group_limited_greedy")) == "group_limited_greedy":
        groups = {"groups": f.whole("n_group"), "top_groups": f.whole("topk_group")}
    f.known("n_group", "topk_group", "aux_loss_alpha")
    f.neutral("scoring_func", None, "softmax", what="the scores of the router")
    experts = op(
        "deepseek-moe",
        experts=f.whole("n_routed_experts"),
        top_k=f.whole("num_experts_per_tok"),
        expansion=expansion(f, "moe_intermediate_size"),
        shared=f.optional("n_shared_experts") or 0,
        renormalise=f.flag("norm_topk_prob"),
        scale=f.number("routed_scaling_factor"),
        **groups,
        **hidden(f),
    )
    return deepseek_layers(f, latent_attention(f), experts)


def deepseek_v3(f: Fields) -> Genome:
    """`DeepseekV3Config`: sigmoid scores and a balance by biases."""
    f.epsilon("rms_norm_eps")
    f.neutral("scoring_func", None, "sigmoid", what="the scores of the router")
    f.neutral("topk_method", None, "noaux_tc", what="the choice of experts")
    f.known("aux_loss_alpha", "rope_interleave")
    if f.whole("num_nextn_predict_layers", low=0):
        f.note("the module that predicts a second token")
    shared = f.optional("n_shared_experts") or 0
    experts = sigmoid_experts(f, "deepseek-v3-moe", shared=shared, **hidden(f))
    return deepseek_layers(f, latent_attention(f), experts)


def sigmoid_experts(f: Fields, point: str = "moe", **genes: Gene) -> Op:
    """Experts by DeepSeek-V3's router; shared experts and activation are the caller's."""
    groups = f.whole("n_group")
    if groups > 1:
        genes["group_score"] = "top2"
    return op(
        point,
        experts=f.whole("n_routed_experts"),
        top_k=f.whole("num_experts_per_tok"),
        expansion=expansion(f, "moe_intermediate_size"),
        score="sigmoid",
        renormalise=f.flag("norm_topk_prob"),
        scale=f.number("routed_scaling_factor"),
        groups=groups,
        top_groups=f.whole("topk_group"),
        **genes,
    )


def beside(experts: Op, inner: int, dense: Op, always_on: int) -> Slot:
    """Experts of an inner width, and an MLP of the width `always_on` that every token takes: as
    shared experts where it is a multiple of theirs, else as a parallel operator."""
    if always_on % inner == 0:
        return Slot((experts.with_genes(shared=always_on // inner),))
    return Slot((experts, dense), "sum")


def deepseek_layers(f: Fields, mixer: Op, experts: Op) -> Genome:
    """Dense layers first, experts after them."""
    dense = mlp(f)
    first = f.whole("first_k_dense_replace", low=0)
    if f.get("moe_layer_freq") not in (None, 1):
        raise f.refuse("moe_layer_freq", "experts stand in every layer after the dense ones")
    count = layer_count(f, None)
    if first > count:
        raise ConfigurationError(f"first_k_dense_replace={first} of {count} layers")
    return f.genome(alone(mixer, dense) * first + alone(mixer, experts) * (count - first))
