"""Published models in small: random weights of transformers' model give the same logits here.

What the genome does not have (`differs` in genome/published/) is applied to our logits.
"""

from __future__ import annotations

import pytest
import torch
import transformers
from imported_layers import (
    clamped_experts,
    gated_attention,
    gated_delta,
    gated_lru,
    glu,
    mlstm,
    sink_attention,
)
from imported_weights import mlp
from reference_weights import VOCAB, Weights, attention, check, joined, load, of, scatter, tokens


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def untied(weights: Weights) -> Weights:
    """Tables and last norm of most models there."""
    return {
        "embedding.weight": weights["model.embed_tokens.weight"],
        "final_norm.weight": weights["model.norm.weight"],
        "head.weight": weights["lm_head.weight"],
    }


def test_recurrentgemma() -> None:
    theirs = transformers.RecurrentGemmaForCausalLM(
        transformers.RecurrentGemmaConfig(
            vocab_size=VOCAB,
            hidden_size=64,
            intermediate_size=2 * 192,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=1,
            attention_window_size=9,
        )
    )
    w = scatter(theirs)

    operators, norms = [], []
    for i in range(4):
        layer = of(w, f"model.layers.{i}")
        mixer, mlp = of(layer, "temporal_block"), of(layer, "mlp_block")
        operators.append(attention(mixer) if i == 2 else gated_lru(mixer))
        operators.append(
            joined(mlp, "entry", "gate_proj", "up_proj") | joined(mlp, "exit", "down_proj")
        )
        # Their scale is 1 + w.
        norms += [1 + layer[f"{part}_pre_norm.weight"] for part in ("temporal", "channel")]
    # The factor sqrt(D) after their embedding stands in our tables.
    ends = {
        "embedding.weight": 8 * w["model.embed_tokens.weight"],
        "final_norm.weight": (1 + w["model.final_norm.weight"]) / 8,
    }
    mlp_genes = "geglu(expansion=3, activation=gelu-tanh, bias=true)"
    ours = load(
        f"{{width=64, vocab={VOCAB}}} [rg-lru(blocks=4) > {mlp_genes}]*2 > swa(heads=4, kv_heads=1,"
        f" window=9, rope_fraction=0.5, bias=true, bias_at=output) > {mlp_genes}"
        f" > rg-lru(blocks=4) > {mlp_genes}",
        operators,
        norms,
        ends,
    )
    check(ours, theirs(tokens()).logits, cap=30.0)


def test_xlstm() -> None:
    theirs = transformers.xLSTMForCausalLM(
        transformers.xLSTMConfig(
            vocab_size=VOCAB,
            hidden_size=64,
            num_hidden_layers=2,
            num_heads=4,
            autocast_kernel_dtype="float32",
            chunk_size=16,
            eps=1e-12,  # the papers have none
        )
    )
    w = scatter(theirs)
    operators, norms = [], []
    for i in range(2):
        layer = of(w, f"backbone.blocks.{i}")
        operators += [mlstm(of(layer, "mlstm_layer")), glu(of(layer, "ffn"))]
        norms += [layer[f"norm_{part}.weight"] for part in ("mlstm", "ffn")]
    ends = {
        "embedding.weight": w["backbone.embeddings.weight"],
        "final_norm.weight": w["backbone.out_norm.weight"],
        "head.weight": w["lm_head.weight"],
    }
    # 64 * 2.667 channels, rounded up to a multiple of 64.
    ours = load(
        f"{{width=64, position=none, tied=false, vocab={VOCAB}}}"
        " [mlstm(heads=4) > swiglu(expansion=3)]*2",
        operators,
        norms,
        ends,
    )
    check(ours, theirs(tokens(), use_cache=False).logits, cap=30.0)


def test_gpt_oss() -> None:
    theirs = transformers.GptOssForCausalLM(
        transformers.GptOssConfig(
            vocab_size=VOCAB,
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=2,
            num_local_experts=8,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=24,
            sliding_window=9,
            rms_norm_eps=1e-6,
            attn_implementation="eager",
            experts_implementation="eager",
        )
    )
    w = scatter(theirs)

    operators, norms = [], []
    for i in range(2):
        layer = of(w, f"model.layers.{i}")
        operators += [sink_attention(of(layer, "self_attn")), clamped_experts(of(layer, "mlp"))]
        norms += [layer[f"{part}_layernorm.weight"] for part in ("input", "post_attention")]
    yarn = "rope_scaling=yarn, rope_factor=32, rope_original=4096, rope_rounded=false"
    heads = "gpt-oss-attention(heads=4, kv_heads=2, head_dim=24, window=9"
    ours = load(
        f"{{width=64, tied=false, vocab={VOCAB}}} {heads}, {yarn}) > gpt-oss-moe(experts=8)"
        f" > {heads}, {yarn}, pattern=full) > gpt-oss-moe(experts=8)",
        operators,
        norms,
        untied(w),
    )
    check(ours, theirs(tokens()).logits)


def test_qwen3_next() -> None:
    theirs = transformers.Qwen3NextForCausalLM(
        transformers.Qwen3NextConfig(
            vocab_size=VOCAB,
            hidden_size=64,
            num_hidden_layers=2,
            layer_types=["linear_attention", "full_attention"],
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            linear_num_value_heads=4,
            linear_num_key_heads=2,
            linear_key_head_dim=16,
            linear_value_head_dim=32,
            num_experts=8,
            num_experts_per_tok=3,
            moe_intermediate_size=16,
            shared_expert_intermediate_size=16,
            experts_implementation="eager",
        )
    )
    w = scatter(theirs)

    layers = [of(w, f"model.layers.{i}") for i in range(2)]
    full = gated_attention(of(layers[1], "self_attn"), 32)
    for norm in ("q_norm.weight", "k_norm.weight"):
        full[norm] = 1 + full[norm]
    mixers = [gated_delta(of(layers[0], "linear_attn"), theirs.config), full]
    operators, norms = [], []
    for layer, mixer in zip(layers, mixers, strict=True):
        operators += [mixer, mlp(of(layer, "mlp"))]
        norms += [1 + layer[f"{part}_layernorm.weight"] for part in ("input", "post_attention")]
    moe = "moe(experts=8, top_k=3, expansion=0.25, shared=1, shared_gate=true, balance=none)"
    ends = untied(w)
    ends["final_norm.weight"] = 1 + ends["final_norm.weight"]
    ours = load(
        f"{{width=64, tied=false, vocab={VOCAB}}}"
        f" gated-deltanet(heads=4, groups=2, key_dim=16) > {moe}"
        f" > gqa(heads=4, kv_heads=2, head_dim=32, qk_norm=true, gate=sigmoid, rope_fraction=0.25)"
        f" > {moe}",
        operators,
        norms,
        ends,
    )
    check(ours, theirs(tokens()).logits)
