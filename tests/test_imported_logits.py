"""Imported configurations in small: the genome's model with random weights of transformers' has the
same logits, whole and token by token."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import transformers
from reference_weights import VOCAB, Weights, check, joined, load, of, scatter, tokens
from torch import Tensor

from mendel.genome import imported
from mendel.primitives.recurrent_parts import EPS

AUTO: Any = transformers.AutoModelForCausalLM

SMALL = {"vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
DENSE = {**SMALL, **HEADS, "intermediate_size": 128, "rms_norm_eps": 1e-6}
GEMMA = {**DENSE, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 9}
MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_n_groups": 2}
ROTARY = 8
LATENT = {
    **DENSE,
    "num_key_value_heads": 4,
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

MIXERS = ("self_attn", "mamba", "conv", "mixer")
CHANNELS = ("mlp", "feed_forward")
BEFORE = ("input_layernorm", "operator_norm", "norm", "temporal_pre_norm")
SECOND = ("pre_feedforward_layernorm", "pre_ff_layernorm", "ffn_norm", "post_attention_layernorm")


def operator(t: Weights) -> Weights:
    """A layer of theirs as ours, whose kind its weights tell."""
    t = {
        name.replace("layernorm", "norm").replace("out_proj", "o_proj"): v for name, v in t.items()
    }
    t = {name.replace("wqkv", "qkv_proj"): v for name, v in t.items()}
    if "dt_bias" in t:
        return _scan(t, "dt.A_log", joined(t, "norm", "norm")) | {"dt.bias": t["dt_bias"]}
    if "x_proj.weight" in t:
        norms = [
            t[f"{part}_norm.weight"] for part in ("dt", "b", "c") if f"{part}_norm.weight" in t
        ]
        more = {f"norms.{i}": norm for i, norm in enumerate(norms)}
        return _scan(t, "A_log", more) | joined(t, "select", "x_proj") | joined(t, "dt", "dt_proj")
    if "conv.weight" in t:
        taps = {"conv.weight": t["conv.weight"].squeeze(1)}
        return joined(t, "in_proj", "in_proj") | taps | joined(t, "out_proj", "o_proj")
    if "kv_b_proj.weight" in t:
        return latent(t)
    if "qkv_proj.weight" in t:
        return joined(t, "entry", "qkv_proj") | joined(t, "exit", "o_proj")
    if "q_proj.weight" in t:
        entry = joined(t, "entry", "q_proj", "k_proj", "v_proj") | joined(t, "exit", "o_proj")
        return entry | joined(t, "q_norm", "q_norm") | joined(t, "k_norm", "k_norm")
    return mlp(t)


def latent(t: Weights) -> Weights:
    """DeepSeek's attention, whose RoPE turns neighbouring channels, ours those half apart."""
    order = [*range(0, ROTARY, 2), *range(1, ROTARY, 2)]

    def turned(rows: Tensor) -> Tensor:
        kept = rows.shape[-2] - ROTARY
        return torch.cat((rows[..., :kept, :], rows[..., kept:, :][..., order, :]), -2)

    queries = t.get("q_b_proj.weight", t.get("q_proj.weight"))
    assert queries is not None
    heads = turned(queries.unflatten(0, (HEADS["num_attention_heads"], -1))).flatten(0, 1)
    first = t.get("q_a_proj.weight", heads)
    own = {"entry.weight": torch.cat((first, turned(t["kv_a_proj_with_mqa.weight"])))}
    if "q_a_norm.weight" in t:
        own |= {"q_norm.weight": t["q_a_norm.weight"], "q_up.weight": heads}
    own |= {"kv_norm.weight": t["kv_a_norm.weight"], "kv_up.weight": t["kv_b_proj.weight"]}
    return own | joined(t, "exit", "o_proj")


def _scan(t: Weights, a: str, more: Weights) -> Weights:
    """What Mamba and Mamba-2 have in common."""
    conv = {"conv.weight": t["conv1d.weight"].squeeze(1), "conv.bias": t["conv1d.bias"]}
    own = {a: t["A_log"], "skip": t["D"], **conv, **more}
    return own | joined(t, "in_proj", "in_proj") | joined(t, "out_proj", "o_proj")


def mlp(t: Weights) -> Weights:
    """An MLP, gated or not, or experts."""
    for gate, up, down in (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2")):
        if f"{gate}.weight" in t:
            return joined(t, "entry", gate, up) | joined(t, "exit", down)
    for both, down in (
        ("gate_up_proj", "down_proj"),
        ("input_linear", "output_linear"),
        ("up_proj", "down_proj"),
    ):
        if f"{both}.weight" in t:
            return joined(t, "entry", both) | joined(t, "exit", down)
    entry = "experts.gate_up_proj" if "experts.gate_up_proj" in t else "experts.up_proj"
    router = "router.weight" if "router.weight" in t else "gate.weight"
    own = {
        "router.weight": t[router],
        "experts.entry": t[entry],
        "experts.exit": t["experts.down_proj"],
    }
    if "shared_expert_gate.weight" in t:
        own["shared_gate"] = t["shared_expert_gate.weight"]
    shared = of(t, "shared_experts") or of(t, "shared_expert")
    return own | ({f"shared.{name}": w for name, w in mlp(shared).items()} if shared else {})


def apart(t: Weights) -> list[Weights]:
    """Experts and what is always on as two operators."""
    return [{k: v for k, v in t.items() if not k.startswith("shared.")}, of(t, "shared")]


def layer(t: Weights) -> list[tuple[str, str | None, list[Weights]]]:
    """Slots of a layer: the name of the norm before, of the one after, and the operators."""
    sandwich = "pre_feedforward_layernorm.weight" in t
    first = next(name for name in BEFORE if f"{name}.weight" in t)
    mixers = [operator(of(t, name)) for name in MIXERS if of(t, name)]
    after = "post_attention_layernorm" if sandwich else None
    slots = [(first, after, mixers)]
    second = next((name for name in SECOND if f"{name}.weight" in t), None)
    if second is not None:
        channels = [mlp(of(t, name)) for name in CHANNELS if of(t, name)]
        experts, shared = of(t, "block_sparse_moe"), of(t, "shared_mlp")
        if experts:
            beside = {f"shared.{name}": w for name, w in mlp(shared).items()}
            channels.append(mlp(experts) | beside)
        elif shared:
            channels.append(mlp(shared))
        slots.append((second, "post_feedforward_layernorm" if sandwich else None, channels))
    return slots


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_the_library(name: str) -> None:
    family, values = name.split(",")[0], CASES[name]
    reference = getattr(transformers, imported.FAMILIES[family].reference)
    config = reference(**values, experts_implementation="eager")
    torch.manual_seed(0)
    theirs = AUTO.from_config(config)
    found = imported.read(json.loads(config.to_json_string(use_diff=False)))
    assert len([said for said in found.differs if "epsilon" not in said]) == (name in DIFFER)
    for module in theirs.modules():
        if "RMSNormGated" in type(module).__name__:
            # Theirs has the epsilon of the layers' norms, ours its own.
            module.variance_epsilon = EPS
        if "NemotronH" in type(module).__name__ and hasattr(module, "time_step_limit"):
            module.time_step_limit = (0.0, float("inf"))
    w = scatter(theirs)
    root = next(iter(w)).split(".")[0]
    # Gemma's scale is 1 + w; the factor sqrt(D) after its embedding stands in our tables.
    unit, factor = (1.0, 8.0) if family.startswith("gemma") else (0.0, 1.0)
    operators: list[Weights] = []
    norms: list[Tensor] = []
    ends: Weights = {}
    for i in range(len(values.get("layers_block_type", range(2)))):
        t = of(w, f"{root}.layers.{i}")
        for before, after, branches in layer(t):
            if after is not None:
                ends[f"blocks.{len(norms)}.after.weight"] = unit + t[f"{after}.weight"]
            slot = found.genome.slots[len(norms)]
            norms.append(unit + t[f"{before}.weight"])
            operators += branches if len(slot.branches) == len(branches) else apart(*branches)
    for t in operators:
        for norm in ("q_norm.weight", "k_norm.weight"):
            if norm in t:
                t[norm] = unit + t[norm]
    rest = {k: v for k, v in of(w, root).items() if not k.startswith("layers.")}
    table, final = rest.values()
    ends |= {"embedding.weight": factor * table, "final_norm.weight": (unit + final) / factor}
    if not found.genome.tied:
        ends["head.weight"] = w["lm_head.weight"]
    ours = load(found.genome, operators, norms, ends)
    with torch.no_grad():
        expected = theirs(tokens()).logits
    check(ours, expected, CAPS.get(name, 0.0))
