"""Weights of transformers' models as those of an imported genome, and its logits."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from imported_layers import renamed, special
from reference_weights import Weights, joined, load, of, scatter
from torch import Tensor, nn

from mendel.genome.genome import Genome
from mendel.genome.model import LanguageModel
from mendel.primitives.recurrent_parts import EPS

AUTO: Any = transformers.AutoModelForCausalLM

DELTAS = ("qwen3_next", "kimi_linear")
"""Families whose gated norm has the epsilon of the layers' norms here too."""

LATENT_HEADS, ROTARY = 4, 8
"""Of every latent attention in these tests."""

MIXERS = ("self_attn", "mamba", "conv", "mixer")
CHANNELS = ("mlp", "feed_forward")
BEFORE = ("input_layernorm", "operator_norm", "norm", "temporal_pre_norm")
SECOND = ("pre_feedforward_layernorm", "pre_ff_layernorm", "ffn_norm", "post_attention_layernorm")


def operator(t: Weights, config: Any) -> Weights:
    """A layer of theirs as ours, whose kind its weights tell."""
    own = special(t, config)
    if own is not None:
        return own
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
    heads = turned(queries.unflatten(0, (LATENT_HEADS, -1))).flatten(0, 1)
    first = t.get("q_a_proj.weight", heads)
    own = {"entry.weight": torch.cat((first, turned(t["kv_a_proj_with_mqa.weight"])))}
    if "q_a_norm.weight" in t:
        own |= {"q_norm.weight": t["q_a_norm.weight"], "q_up.weight": heads}
    own |= {"kv_norm.weight": t["kv_a_norm.weight"], "kv_up.weight": t["kv_b_proj.weight"]}
    return own | joined(t, "exit", "o_proj")


def halves(t: Weights, head_dim: int) -> Weights:
    """Queries and keys whose RoPE turns neighbouring channels, with those half a head apart."""
    order = [*range(0, head_dim, 2), *range(1, head_dim, 2)]
    turned = {
        name: w.unflatten(0, (-1, head_dim))[:, order].flatten(0, 1)
        for name, w in t.items()
        if ".q_proj." in name or ".k_proj." in name
    }
    return t | turned


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
    inward, outward = t[entry], t["experts.down_proj"]
    if inward.shape[2] != outward.shape[1]:
        # Llama 4 has them as (E, in, out).
        inward, outward = inward.mT, outward.mT
    own = {"router.weight": t[router], "experts.entry": inward, "experts.exit": outward}
    if "shared_expert_gate.weight" in t:
        own["shared_gate"] = t["shared_expert_gate.weight"]
    shared = of(t, "shared_experts") or of(t, "shared_expert")
    return own | ({f"shared.{name}": w for name, w in mlp(shared).items()} if shared else {})


def apart(t: Weights) -> list[Weights]:
    """Experts and what is always on as two operators."""
    return [{k: v for k, v in t.items() if not k.startswith("shared.")}, of(t, "shared")]


def layer(t: Weights, config: Any) -> list[tuple[str, str | None, list[Weights]]]:
    """Slots of a layer: the name of the norm before, of the one after, and the operators."""
    sandwich = "pre_feedforward_layernorm.weight" in t
    first = next(name for name in BEFORE if f"{name}.weight" in t)
    mixers = [operator(of(t, name), config) for name in MIXERS if of(t, name)]
    after = "post_attention_layernorm" if sandwich else None
    slots = [(first, after, mixers)]
    second = next((name for name in SECOND if f"{name}.weight" in t), None)
    if second is not None:
        channels = [operator(of(t, name), config) for name in CHANNELS if of(t, name)]
        experts, shared = of(t, "block_sparse_moe"), of(t, "shared_mlp")
        if experts:
            beside = {f"shared.{name}": w for name, w in mlp(shared).items()}
            channels.append(mlp(experts) | beside)
        elif shared:
            channels.append(mlp(shared))
        slots.append((second, "post_feedforward_layernorm" if sandwich else None, channels))
    return slots


def models(config: Any, genome: Genome) -> tuple[nn.Module, LanguageModel]:
    """Their model of a configuration with random weights, and ours of its genome with the same.

    What a genome has of its own is set in theirs: the epsilon of Mamba-2's norm, and no least step
    size.
    """
    torch.manual_seed(0)
    theirs = AUTO.from_config(config)
    for module in theirs.modules():
        if "RMSNormGated" in type(module).__name__ and config.model_type not in DELTAS:
            module.variance_epsilon = EPS
        if "NemotronH" in type(module).__name__ and hasattr(module, "time_step_limit"):
            module.time_step_limit = (0.0, float("inf"))
    w = scatter(theirs)
    root = next(iter(w)).split(".")[0]
    # Gemma's factor sqrt(D) after the embedding stands in our tables.
    gemma = "gemma" in config.model_type
    unit = 1.0 if gemma or config.model_type == "qwen3_next" else 0.0
    """Of scales 1 + w."""
    factor = config.hidden_size**0.5 if gemma else 1.0
    if config.model_type == "recurrent_gemma":
        factor = float(torch.tensor(factor, dtype=torch.bfloat16))
    layers = getattr(config, "layers_block_type", range(config.num_hidden_layers))
    stack = "blocks" if config.model_type == "xlstm" else "layers"
    operators: list[Weights] = []
    norms: list[Tensor] = []
    ends: Weights = {}
    for i in range(len(layers)):
        t = renamed(of(w, f"{root}.{stack}.{i}"))
        if config.model_type == "llama4_text":
            t = halves(t, config.head_dim)
        for before, after, branches in layer(t, config):
            if after is not None:
                ends[f"blocks.{len(norms)}.after.weight"] = unit + t[f"{after}.weight"]
            slot = genome.slots[len(norms)]
            norms.append(unit + t[f"{before}.weight"])
            operators += branches if len(slot.branches) == len(branches) else apart(*branches)
    for t in operators:
        for norm in ("q_norm.weight", "k_norm.weight"):
            if norm in t:
                t[norm] = unit + t[norm]
    rest = {k: v for k, v in of(w, root).items() if not k.startswith(f"{stack}.")}
    table, final = rest.values()
    # A head of its own does not have the table's factor.
    ends["embedding.weight"] = factor * table
    ends["final_norm.weight"] = (unit + final) / (factor if genome.tied else 1.0)
    if not genome.tied:
        ends["head.weight"] = w["lm_head.weight"]
    return theirs, load(genome, operators, norms, ends)
