"""Qwen's models with experts: Qwen 2 MoE, Qwen 3 MoE, Qwen3-Next; and gpt-oss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...primitives.base import Gene
from ..genome import Genome, Op, Slot
from .dense import KINDS, qwen_windows
from .experts import hidden
from .fields import Fields, alone, op
from .parts import attention, expansion, layer_count, mlp, rope, window

QWEN2_MOE: Mapping[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "use_sliding_window": False,
    "max_window_layers": 28,
    "decoder_sparse_step": 1,
    "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632,
    "num_experts_per_tok": 4,
    "num_experts": 60,
    "norm_topk_prob": False,
    "mlp_only_layers": [],
    "qkv_bias": True,
}
QWEN3_MOE: Mapping[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 24,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "use_sliding_window": False,
    "decoder_sparse_step": 1,
    "moe_intermediate_size": 768,
    "num_experts_per_tok": 8,
    "num_local_experts": 128,
    "norm_topk_prob": False,
    "mlp_only_layers": [],
}
QWEN3_NEXT: Mapping[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 48,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.25,
    "attention_bias": False,
    "head_dim": 256,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "decoder_sparse_step": 1,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
    "num_experts_per_tok": 10,
    "num_experts": 512,
    "norm_topk_prob": True,
    "mlp_only_layers": [],
}
NEXT_KINDS = {"linear_attention": "linear", "full_attention": "full"}
NEXT_PERIOD = 4
"""One full attention in so many layers, where the file does not say."""

GPT_OSS: Mapping[str, Any] = {
    "num_hidden_layers": 36,
    "num_local_experts": 128,
    "vocab_size": 201088,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "head_dim": 64,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "sliding_window": 128,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 150000.0,
    "num_experts_per_tok": 4,
    "swiglu_alpha": 1.702,
    "swiglu_limit": 7.0,
    "attention_bias": True,
}


def qwen2_moe(f: Fields) -> Genome:
    """`Qwen2MoeConfig`: shared experts behind a gate per token."""
    f.epsilon("rms_norm_eps")
    genes: dict[str, Gene] = dict(rope(f))
    if f.flag("qkv_bias"):
        genes |= {"bias": True, "bias_at": "inputs"}
    mixers = [
        attention(f, **genes, **(window(f) if sliding else {})) for sliding in qwen_windows(f)
    ]
    return f.genome(_with_experts(f, mixers, gated_experts(f, "qwen2-moe")))


def gated_experts(f: Fields, point: str = "moe") -> Op:
    """Experts, and shared ones behind a gate, which are a multiple of them in width."""
    inner = f.whole("moe_intermediate_size")
    shared = f.whole("shared_expert_intermediate_size")
    if shared % inner:
        raise f.refuse(
            "shared_expert_intermediate_size",
            f"with a gate it is a multiple of moe_intermediate_size={inner} in a genome",
        )
    return op(
        point,
        experts=f.whole("num_experts"),
        top_k=f.whole("num_experts_per_tok"),
        expansion=expansion(f, "moe_intermediate_size"),
        shared=shared // inner,
        shared_gate=True,
        balance="none",
        renormalise=f.flag("norm_topk_prob"),
        **hidden(f),
    )


def qwen3_moe(f: Fields) -> Genome:
    """`Qwen3MoeConfig`: Qwen 3 with experts in every layer, or in every so many."""
    f.epsilon("rms_norm_eps")
    genes: dict[str, Gene] = {"qk_norm": True, "bias": f.flag("attention_bias"), **rope(f)}
    local = window(f)
    if f.flag("use_sliding_window"):
        genes |= local
    experts = op(
        "mixtral",
        experts=f.whole("num_local_experts"),
        top_k=f.whole("num_experts_per_tok"),
        expansion=expansion(f, "moe_intermediate_size"),
        renormalise=f.flag("norm_topk_prob"),
        **hidden(f),
    )
    return f.genome(_with_experts(f, [attention(f, **genes)] * layer_count(f, None), experts))


def qwen3_next(f: Fields) -> Genome:
    """`Qwen3NextConfig`: Gated DeltaNet, and gated attention in every fourth layer."""
    f.epsilon("rms_norm_eps")
    f.neutral("hidden_act", "silu", what="the activation after the convolution")
    layers = f.layers("layer_types", NEXT_KINDS)
    count = layer_count(f, layers)
    period = f.optional("full_attention_interval") or NEXT_PERIOD
    layers = layers or ["linear" if (i + 1) % period else "full" for i in range(count)]
    bias = f.flag("attention_bias")
    full = attention(f, qk_norm=True, gate="sigmoid", bias=bias, **rope(f))
    heads = f.whole("linear_num_value_heads")
    linear = op(
        "gated-deltanet",
        heads=heads,
        groups=f.whole("linear_num_key_heads"),
        key_dim=f.whole("linear_key_head_dim"),
        expand=heads * f.whole("linear_value_head_dim") / f.whole("hidden_size"),
        conv=f.whole("linear_conv_kernel_dim"),
    )
    mixers = [linear if kind == "linear" else full for kind in layers]
    return f.genome(_with_experts(f, mixers, gated_experts(f)))


def _with_experts(f: Fields, mixers: list[Op], experts: Op) -> list[Slot]:
    """A channel mixer after each mixer: experts, or a dense MLP where Qwen's two fields say so."""
    step = f.whole("decoder_sparse_step")
    plain = f.list_of("mlp_only_layers", int, "layers' numbers") or []
    slots: list[Slot] = []
    for i, mixer in enumerate(mixers):
        dense = i in plain or (i + 1) % step
        slots += alone(mixer, mlp(f) if dense else experts)
    return slots


def gpt_oss(f: Fields) -> Genome:
    """`GptOssConfig`: sinks, biases everywhere, windows in every other layer, clamped experts."""
    f.epsilon("rms_norm_eps")
    f.neutral("hidden_act", "silu", what="the activation")
    f.neutral("swiglu_alpha", 1.702, what="a factor of its own inside the experts' unit")
    f.neutral("swiglu_limit", 7.0, what="a limit of its own of the experts' unit")
    layers = f.layers("layer_types", KINDS)
    count = layer_count(f, layers)
    layers = layers or ["full" if i % 2 else "sliding" for i in range(count)]
    genes: dict[str, Gene] = {"sink_logits": True, "bias": f.flag("attention_bias"), **rope(f)}
    f.known("initial_context_length")
    experts = op(
        "gpt-oss-moe",
        experts=f.whole("num_local_experts"),
        top_k=f.whole("num_experts_per_tok"),
        expansion=expansion(f, "intermediate_size"),
    )
    slots: list[Slot] = []
    for kind in layers:
        local = window(f) if kind == "sliding" else {}
        slots += alone(attention(f, **genes, **local), experts)
    return f.genome(slots)
