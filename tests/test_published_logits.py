"""Published models in small: random weights of transformers' model give the same logits here.

What the genome does not have (`differs` in genome/published/) is applied to our logits.
"""

from __future__ import annotations

import pytest
import torch
import transformers
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

    def recurrent(t: Weights) -> Weights:
        found = joined(t, "in_proj", "linear_y", "linear_x") | joined(t, "out_proj", "linear_out")
        for kind in ("weight", "bias"):
            both = [t[f"rg_lru.{gate}_gate_{kind}"] for gate in ("input", "recurrent")]
            found[f"block_gates.{kind}"] = torch.cat(both, -1)
        found["rg_lru.decay"] = t["rg_lru.recurrent_param"]
        return found | {
            "conv.weight": t["conv_1d.weight"].squeeze(1),
            "conv.bias": t["conv_1d.bias"],
        }

    operators, norms = [], []
    for i in range(4):
        layer = of(w, f"model.layers.{i}")
        mixer, mlp = of(layer, "temporal_block"), of(layer, "mlp_block")
        operators.append(attention(mixer) if i == 2 else recurrent(mixer))
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
        mixer, mlp = of(layer, "mlstm_layer"), of(layer, "ffn")
        operators.append(
            joined(mixer, "in_proj", "q", "k", "v", "ogate_preact")
            | joined(mixer, "gates", "igate_preact", "fgate_preact")
            | joined(mixer, "norm", "multihead_norm")
            | joined(mixer, "out_proj", "out_proj")
        )
        operators.append(
            joined(mlp, "entry", "proj_up_gate", "proj_up") | joined(mlp, "exit", "proj_down")
        )
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

    def experts(t: Weights) -> Weights:
        # Gate and up alternate there, and matrices are (E, in, out).
        entry, bias = t["experts.gate_up_proj"], t["experts.gate_up_proj_bias"]
        return {
            "router.weight": t["router.weight"],
            "router.bias": t["router.bias"],
            "experts.entry": torch.cat((entry[..., ::2], entry[..., 1::2]), -1).mT,
            "experts.entry_bias": torch.cat((bias[..., ::2], bias[..., 1::2]), -1),
            "experts.exit": t["experts.down_proj"].mT,
            "experts.exit_bias": t["experts.down_proj_bias"],
        }

    operators, norms = [], []
    for i in range(2):
        layer = of(w, f"model.layers.{i}")
        mixer = of(layer, "self_attn")
        operators += [
            attention(mixer) | {"scoring.sinks": mixer["sinks"]},
            experts(of(layer, "mlp")),
        ]
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

    def delta(t: Weights) -> Weights:
        # They keep the rows of a key head together.
        qkvz = t["in_proj_qkvz.weight"].view(2, -1, 64).split([16, 16, 64, 64], 1)
        ba = t["in_proj_ba.weight"].view(2, -1, 64).split([2, 2], 1)
        return {
            "in_proj.weight": torch.cat([part.flatten(0, 1) for part in (*qkvz, *ba)]),
            "conv.weight": t["conv1d.weight"].squeeze(1),
            "dt.A_log": t["A_log"],
            "dt.bias": t["dt_bias"],
            "norm.weight": t["norm.weight"],
            "out_proj.weight": t["out_proj.weight"],
        }

    def gated_attention(t: Weights) -> Weights:
        # Every head's queries and gate stand together.
        queries, gate = t["q_proj.weight"].view(4, 2, 32, 64).unbind(1)
        rows = [queries.flatten(0, 1), t["k_proj.weight"], t["v_proj.weight"], gate.flatten(0, 1)]
        return {
            "entry.weight": torch.cat(rows),
            "exit.weight": t["o_proj.weight"],
            "q_norm.weight": 1 + t["q_norm.weight"],
            "k_norm.weight": 1 + t["k_norm.weight"],
        }

    def experts(t: Weights) -> Weights:
        return {
            "router.weight": t["gate.weight"],
            "experts.entry": t["experts.gate_up_proj"],
            "experts.exit": t["experts.down_proj"],
            **joined(t, "shared.entry", "shared_expert.gate_proj", "shared_expert.up_proj"),
            **joined(t, "shared.exit", "shared_expert.down_proj"),
            "shared_gate": t["shared_expert_gate.weight"],
        }

    layers = [of(w, f"model.layers.{i}") for i in range(2)]
    mixers = [delta(of(layers[0], "linear_attn")), gated_attention(of(layers[1], "self_attn"))]
    operators, norms = [], []
    for layer, mixer in zip(layers, mixers, strict=True):
        operators += [mixer, experts(of(layer, "mlp"))]
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
