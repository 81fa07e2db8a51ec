"""Imported configurations in small: the genome's model with random weights of transformers' has the
same logits, whole and token by token."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import transformers
from imported_weights import LATENT_HEADS, ROTARY, models
from reference_weights import VOCAB, check, tokens

from mendel.genome import imported

SMALL = {"vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
DENSE = {**SMALL, **HEADS, "intermediate_size": 128, "rms_norm_eps": 1e-6}
GEMMA = {**DENSE, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 9}
MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_n_groups": 2}
LATENT = {
    **DENSE,
    "num_attention_heads": LATENT_HEADS,
    "num_key_value_heads": LATENT_HEADS,
    "kv_lora_rank": 24,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": ROTARY,
    "v_head_dim": 12,
    "n_routed_experts": 4,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}

CASES: dict[str, dict[str, Any]] = {
    "llama": {**DENSE, "attention_bias": True, "mlp_bias": True},
    "llama, yarn": {**DENSE, "rope_parameters": {**YARN, "rope_theta": 5000.0}},
    "mistral": {**DENSE, "sliding_window": 9},
    "qwen2": {**DENSE, "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    "qwen3": {**DENSE, "head_dim": 32, "tie_word_embeddings": True},
    "phi3": {**DENSE, "pad_token_id": 0, "partial_rotary_factor": 0.5},
    "gemma": {**DENSE, "head_dim": 16},
    "gemma2": GEMMA,
    "gemma3_text": {**GEMMA, "layer_types": ["sliding_attention", "full_attention"]},
    "mixtral": {**DENSE, "num_local_experts": 4},
    "qwen3_moe": {
        **DENSE,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "decoder_sparse_step": 2,
    },
    "qwen2_moe": {
        **DENSE,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 128,
        "mlp_only_layers": [1],
    },
    "olmoe": {**DENSE, "num_experts": 4, "num_experts_per_tok": 2, "pad_token_id": 0},
    "llama4_text": {
        **DENSE,
        "head_dim": 16,
        "intermediate_size_mlp": 64,
        "num_local_experts": 4,
        "interleave_moe_layer_step": 2,
        "no_rope_layer_interval": 2,
        "attention_chunk_size": 8,
        "attn_temperature_tuning": False,
    },
    "deepseek_v2": {**LATENT, "q_lora_rank": None, "num_experts_per_tok": 2},
    "deepseek_v3": {**LATENT, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2},
    "mamba": {**SMALL, "layer_norm_epsilon": 1e-6},
    "mamba2": {
        **SMALL,
        "layer_norm_epsilon": 1e-6,
        "num_heads": 4,
        "head_dim": 32,
        "n_groups": 2,
        "state_size": 16,
    },
    "jamba": {
        **DENSE,
        "num_experts": 4,
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "mamba_dt_rank": 8,
    },
    "falcon_h1": {**DENSE, **MAMBA2, "mamba_d_ssm": 128, "mamba_n_groups": 1},
    "granitemoehybrid": {
        **DENSE,
        **MAMBA2,
        "intermediate_size": 64,
        "shared_intermediate_size": 128,
        "num_local_experts": 4,
        "layer_types": ["linear_attention", "full_attention"],
        "attention_multiplier": 0.25,
    },
    "granitemoehybrid, dense": {
        **DENSE,
        **MAMBA2,
        "shared_intermediate_size": 96,
        "num_local_experts": 0,
        "layer_types": ["linear_attention", "full_attention"],
        "attention_multiplier": 0.25,
        "position_embedding_type": "rope",
    },
    "bamba": {**DENSE, **MAMBA2, "attn_layer_indices": [1]},
    "lfm2": {
        **SMALL,
        **HEADS,
        "norm_eps": 1e-6,
        "intermediate_size": 128,
        "layer_types": ["conv", "full_attention"],
    },
    "nemotron_h": {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        **HEADS,
        "head_dim": 16,
        "layer_norm_epsilon": 1e-6,
        "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
        "intermediate_size": 128,
        "moe_intermediate_size": 64,
        "moe_shared_expert_intermediate_size": 96,
        "mamba_num_heads": 4,
        "mamba_head_dim": 32,
        "ssm_state_size": 16,
        "n_groups": 2,
        "n_routed_experts": 4,
    },
}
CAPS = {"gemma2": 30.0}
"""Of logits, which the genome has not."""
DIFFER = {*CAPS, "nemotron_h", "deepseek_v3"}
"""What has a difference that is taken away here."""


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_the_library(name: str) -> None:
    family, values = name.split(",")[0], CASES[name]
    reference = getattr(transformers, imported.FAMILIES[family].reference)
    config = reference(**values, experts_implementation="eager")
    found = imported.read(json.loads(config.to_json_string(use_diff=False)))
    assert len([said for said in found.differs if "epsilon" not in said]) == (name in DIFFER)
    theirs, ours = models(config, found.genome)
    with torch.no_grad():
        expected = theirs(tokens()).logits
    check(ours, expected, CAPS.get(name, 0.0))
