"""What fields of transformers' configurations may be, in small: parts that families share."""

from __future__ import annotations

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
