"""Configurations of transformers' classes to draw from: what fields may be, by family, in small."""

from __future__ import annotations

import random
from typing import Any

Space = dict[str, tuple[Any, ...]]


def rarely(usual: object, other: object) -> tuple[Any, ...]:
    """Values for a field one of which is refused, alone or beside others."""
    return (*(usual,) * 9, other)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}
ROPE: tuple[Any, ...] = (
    *({}, {"rope_theta": 500.0}) * 2,
    {"rope_theta": 500.0, "rope_type": "linear", "factor": 2.0},
    {"rope_theta": 500.0, **YARN},
    {"rope_theta": 500.0, **YARN, "truncate": False},
    {"rope_theta": 500.0, **YARN, "beta_fast": 16.0},
    {"rope_theta": 500.0, "rope_type": "dynamic", "factor": 2.0},
)
"""As values of `rope_parameters`; an empty one is left out."""
PARTIAL = (*ROPE, {"rope_theta": 500.0, "partial_rotary_factor": 0.5})

ENDS: Space = {
    "vocab_size": (40, 64),
    "hidden_size": (64, 96),
    "num_hidden_layers": (2, 3),
    "tie_word_embeddings": (False, True),
}
HEADS: Space = {
    "num_attention_heads": (4, 8),
    "num_key_value_heads": (4, 2, 1),
    "rms_norm_eps": (1e-6, 1e-5),
}
WIDE: Space = {**HEADS, "head_dim": (16, 24)}
MLP: Space = {"intermediate_size": (64, 128, 168), "hidden_act": ("silu", "silu", "gelu", "relu")}
DENSE: Space = {**ENDS, **HEADS, **MLP, "rope_parameters": ROPE}
BIAS: Space = {"attention_bias": (False, True)}
WINDOW: Space = {"sliding_window": (None, 5, 9)}
KINDS = ("full_attention", "sliding_attention")
LAYERS: Space = {"layer_types": (None, ("of", KINDS))}
"""A list with one of the words for every layer."""
QWEN: Space = {
    "use_sliding_window": (False, True),
    "sliding_window": (5, 9),
    "max_window_layers": (0, 1, 2),
    **LAYERS,
}
CHOSEN: Space = {
    "num_experts_per_tok": (1, 2, 3),
    "norm_topk_prob": (False, True),
    "moe_intermediate_size": (32, 48),
}
QWEN_EXPERTS: Space = {
    **DENSE,
    **CHOSEN,
    "decoder_sparse_step": (1, 2),
    "mlp_only_layers": (None, [], [1]),
}
SHARED: Space = {"shared_expert_intermediate_size": (96, 192, 120)}
LATENT: Space = {
    "num_attention_heads": (4,),
    "num_key_value_heads": (4,),
    "rms_norm_eps": (1e-6,),
    "kv_lora_rank": (24, 32),
    "q_lora_rank": (None, 16),
    "qk_nope_head_dim": (16, 12),
    "qk_rope_head_dim": (8,),
    "v_head_dim": (16, 12),
    "n_routed_experts": (4, 8),
    "n_shared_experts": (1, 2),
    "first_k_dense_replace": (0, 1, 2),
    "routed_scaling_factor": (1.0, 2.5),
    "attention_bias": rarely(False, True),
    **CHOSEN,
}
MAMBA2: Space = {
    "mamba_n_heads": (4, 8),
    "mamba_d_head": rarely("auto", 32),
    "mamba_d_state": (16, 24),
    "mamba_n_groups": (1, 2),
    "mamba_d_conv": (4, 3),
    "mamba_expand": (2, 1),
    "mamba_conv_bias": rarely(True, False),
    "mamba_proj_bias": rarely(False, True),
}
SCAN: Space = {
    **ENDS,
    "layer_norm_epsilon": (1e-6, 1e-5),
    "state_size": (16, 8),
    "expand": (2, 1),
    "conv_kernel": (4, 3),
    "use_bias": rarely(False, True),
    "use_conv_bias": rarely(True, False),
}
GROUPS: Space = {"n_group": (1, 2), "topk_group": (1, 2)}
HYBRID: Space = {**DENSE, **MAMBA2, **BIAS}
GEMMA: Space = {
    **DENSE,
    "hidden_act": ("gelu_pytorch_tanh", "gelu"),
    "head_dim": (16, 24),
    **BIAS,
}
WINDOWED: Space = {
    **{name: values for name, values in GEMMA.items() if name != "hidden_act"},
    "hidden_activation": ("gelu_pytorch_tanh", "silu"),
    "query_pre_attn_scalar": (16, 24),
    "sliding_window": (5, 9),
    **LAYERS,
    "final_logit_softcapping": (None, 30.0),
}
SPACES: dict[str, Space] = {
    "llama": {**DENSE, **WIDE, **BIAS, "mlp_bias": (False, True), "rope_parameters": PARTIAL},
    "mistral": {**DENSE, **WIDE, **WINDOW},
    "qwen2": {**DENSE, **QWEN},
    "qwen3": {**DENSE, **WIDE, **BIAS, **QWEN, "head_dim": (16, 24)},
    "phi3": {
        **DENSE,
        **WINDOW,
        "pad_token_id": (0,),
        "partial_rotary_factor": (1.0, 0.5),
        "rope_parameters": ({}, {"rope_theta": 500.0}),
    },
    "gemma": GEMMA,
    "gemma2": {**WINDOWED, "attn_logit_softcapping": (None, 20.0)},
    "gemma3_text": {
        **WINDOWED,
        "sliding_window_pattern": (2, 6),
        "rope_parameters": (
            {},
            {"full_attention": {"rope_theta": 500.0}, "sliding_attention": {"rope_theta": 90.0}},
            {"full_attention": {"rope_theta": 500.0, "rope_type": "linear", "factor": 2.0}},
        ),
    },
    "mixtral": {
        **DENSE,
        **WIDE,
        **WINDOW,
        "num_local_experts": (2, 4),
        "num_experts_per_tok": (1, 2),
    },
    "qwen3_moe": {
        **QWEN_EXPERTS,
        **WIDE,
        **BIAS,
        "use_sliding_window": (False, True),
        "sliding_window": (5, 9),
        "num_experts": (4, 6),
    },
    "qwen2_moe": {
        **QWEN_EXPERTS,
        **QWEN,
        **SHARED,
        "num_experts": (4, 6),
        "qkv_bias": (True, False),
    },
    "qwen3_next": {
        **QWEN_EXPERTS,
        **SHARED,
        **BIAS,
        "hidden_act": ("silu", "gelu"),
        "head_dim": (16, 24),
        "num_experts": (4, 6),
        "linear_conv_kernel_dim": (4, 3),
        "linear_key_head_dim": (16, 8),
        "linear_value_head_dim": (16, 24),
        "linear_num_key_heads": (2, 4),
        "linear_num_value_heads": (4, 8),
        "full_attention_interval": (2, 3),
        "rope_parameters": ({}, {"rope_theta": 500.0}, {"partial_rotary_factor": 0.5}),
    },
    "olmoe": {
        **DENSE,
        **BIAS,
        "num_experts": (4, 6),
        "num_experts_per_tok": (1, 2),
        "norm_topk_prob": (False, True),
        "clip_qkv": rarely(None, 3.0),
    },
    "gpt_oss": {
        **DENSE,
        **BIAS,
        **LAYERS,
        "hidden_act": ("silu",),
        "head_dim": (16, 24),
        "sliding_window": (5, 9),
        "num_local_experts": (4, 6),
        "num_experts_per_tok": (1, 2, 3),
        "swiglu_limit": rarely(7.0, 5.0),
    },
    "deepseek_v2": {
        **DENSE,
        **LATENT,
        "mlp_bias": rarely(False, True),
        "norm_topk_prob": rarely(False, True),
        "topk_method": ("greedy", "group_limited_greedy"),
        "n_group": (2,),
        "topk_group": (1, 2),
        "n_shared_experts": (1, 2),
    },
    "deepseek_v3": {**DENSE, **LATENT, **GROUPS, "num_nextn_predict_layers": (0, 0, 1)},
    "mamba": {**SCAN, "time_step_rank": ("auto", 4, 9)},
    "mamba2": {
        **SCAN,
        "hidden_size": (64,),
        "num_heads": (4, 8),
        "head_dim": (16, 32),
        "n_groups": (1, 2),
        "time_step_limit": rarely((0.0, float("inf")), (0.01, 0.2)),
    },
    "jamba": {
        **ENDS,
        **HEADS,
        **MLP,
        "num_experts": (1, 4),
        "num_experts_per_tok": (1, 2),
        **dict.fromkeys(("attn_layer_offset", "expert_layer_offset"), (0, 1)),
        **dict.fromkeys(("attn_layer_period", "expert_layer_period"), (2, 3)),
        "mamba_dt_rank": ("auto", 8, 9),
        "mamba_d_state": (16, 8),
        "mamba_d_conv": (4, 3),
        "mamba_expand": (2, 1),
        "mamba_conv_bias": rarely(True, False),
        "mamba_proj_bias": rarely(False, True),
    },
    "falcon_h1": {
        **HYBRID,
        "head_dim": (16, 24),
        "mlp_bias": (False, True),
        "mamba_d_ssm": (None, 128, 64),
        "mamba_rms_norm": (False, True),
        "mamba_norm_before_gate": (False, True),
        "projectors_bias": rarely(False, True),
        "key_multiplier": rarely(1.0, 0.5),
        "mlp_multipliers": rarely(None, [1.0, 0.5]),
    },
    "granitemoehybrid": {
        **HYBRID,
        "shared_intermediate_size": (64, 96, 128),
        "num_local_experts": (0, 4),
        "num_experts_per_tok": (1, 2),
        "layer_types": (None, ("of", ("linear_attention", "full_attention"))),
        "attention_multiplier": (16**-0.5, 8**-0.5, 12**-0.5),
        "residual_multiplier": rarely(1.0, 0.5),
        "position_embedding_type": (None, "rope"),
    },
    "bamba": {
        **HYBRID,
        "mlp_bias": (False, True),
        "attn_layer_indices": (None, [1], [0, 1]),
    },
    "zamba2": {
        **ENDS,
        "num_hidden_layers": (4, 5),
        "num_attention_heads": (4, 8, 3),
        "num_key_value_heads": (None, 4, 2),
        "rms_norm_eps": (1e-6, 1e-5),
        "intermediate_size": (None, 96, 168),
        "hidden_act": ("gelu", "silu"),
        "layers_block_type": (("of", ("mamba", "hybrid", "linear_attention")),),
        "num_mem_blocks": (1, 2),
        "use_shared_attention_adapter": (False, True),
        "adapter_rank": (4, 8),
        "use_mem_rope": (False, True),
        "use_long_context": rarely(False, True),
        "rope_parameters": ROPE,
        "n_mamba_heads": (2, 4, 3),
        "mamba_ngroups": (1, 2),
        "mamba_d_state": (16, 8),
        "mamba_d_conv": (4, 3),
        "mamba_expand": (2, 1),
        "add_bias_linear": rarely(False, True),
        "time_step_min": (0.001, 0.01),
    },
    "lfm2": {
        **ENDS,
        "num_attention_heads": (4, 8),
        "num_key_value_heads": (4, 2),
        "norm_eps": (1e-6, 1e-5),
        "intermediate_size": (96, 192),
        "block_auto_adjust_ff_dim": (True, False),
        "block_multiple_of": (16, 64),
        "block_ffn_dim_multiplier": (1.0, 1.5),
        "conv_L_cache": (3, 4),
        "conv_bias": rarely(False, True),
        "layer_types": (None, ("of", ("conv", "full_attention"))),
        "full_attn_idxs": (None, [1], [0]),
        "rope_parameters": ROPE,
    },
    "nemotron_h": {
        "vocab_size": (40,),
        "hidden_size": (64, 96),
        "num_attention_heads": (4,),
        "num_key_value_heads": (4, 2),
        "tie_word_embeddings": rarely(False, True),
        "head_dim": (16, 24),
        "layer_norm_epsilon": (1e-6, 1e-5),
        "layers_block_type": (
            ["linear_attention", "full_attention", "mlp", "moe"],
            ["mlp", "linear_attention", "full_attention"],
        ),
        "intermediate_size": (128, 64),
        "moe_intermediate_size": (64, 32),
        "moe_shared_expert_intermediate_size": (96, 64),
        "moe_latent_size": rarely(None, 32),
        "mlp_hidden_act": ("relu2", "silu"),
        "mlp_bias": rarely(False, True),
        "attention_bias": rarely(False, True),
        "mamba_num_heads": (4, 8),
        "mamba_head_dim": (32, 64),
        "ssm_state_size": (16, 8),
        "n_groups": (1, 2),
        "conv_kernel": (4, 3),
        "use_bias": rarely(False, True),
        "use_conv_bias": rarely(True, False),
        "mamba_proj_bias": rarely(False, True),
        "n_routed_experts": (4, 8),
        "n_shared_experts": (1, 2),
        "num_experts_per_tok": (1, 2),
        "norm_topk_prob": (False, True),
        "routed_scaling_factor": (1.0, 2.5),
        **GROUPS,
        "time_step_min": (0.001, 0.01),
    },
    "recurrent_gemma": {
        **ENDS,
        "num_attention_heads": (4, 2),
        "num_key_value_heads": (None, 1, 2),
        "rms_norm_eps": (1e-6, 1e-5),
        "lru_width": (None, 64, 128),
        "intermediate_size": (128, 192),
        "conv1d_width": (4, 3),
        "attention_window_size": (5, 9),
        "attention_bias": (False, True),
        "block_types": (["recurrent", "attention"], ["attention", "recurrent"], ["recurrent"]),
        "hidden_activation": ("gelu_pytorch_tanh", "silu"),
        "logits_soft_cap": (30.0, 10.0),
    },
    "xlstm": {
        **ENDS,
        "hidden_size": (128, 256),
        "tie_word_embeddings": rarely(False, True),
        "num_heads": (2, 4),
        "use_bias": rarely(False, True),
        "add_out_norm": rarely(True, False),
        "qk_dim_factor": (0.5, 1.0, 0.7),
        "v_dim_factor": (1.0, 0.5),
        "ffn_proj_factor": (2.667, 1.3),
        "ffn_round_up_to_multiple_of": (64, 8),
        "gate_soft_cap": (15.0, 10.0),
        "weight_mode": ("single", "fused"),
    },
    "kimi_linear": {
        **ENDS,
        **{name: values for name, values in LATENT.items() if name != "n_routed_experts"},
        **MLP,
        "tie_word_embeddings": rarely(False, True),
        "pad_token_id": (None,),
        "num_local_experts": (4, 8),
        **GROUPS,
        "linear_head_dim": (16, 32),
        "linear_num_heads": (2, 4),
        "linear_conv_kernel_dim": (4, 3),
        "layer_types": (None, ("of", ("linear_attention", "full_attention"))),
        "mlp_layer_types": (None, ("of", ("dense", "sparse"))),
    },
}


def drawn(family: str, generator: random.Random) -> dict[str, Any]:
    """One configuration: a value of every field of the family's space."""
    values = {name: generator.choice(options) for name, options in SPACES[family].items()}
    for name, value in list(values.items()):
        if isinstance(value, tuple) and value[0] == "of":
            values[name] = [generator.choice(value[1]) for _ in range(values["num_hidden_layers"])]
    return {name: value for name, value in values.items() if value != {}}
