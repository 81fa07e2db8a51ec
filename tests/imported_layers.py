"""Single layers of transformers' models under our names, where more than names differ."""

from __future__ import annotations

from typing import Any

import torch
from reference_weights import Weights, joined
from torch import Tensor

RENAMED = {
    **dict.fromkeys(("temporal_block", "linear_attn", "mlstm_layer"), "mixer"),
    **dict.fromkeys(("mlp_block", "ffn"), "mlp"),
    **dict.fromkeys(("channel_pre_norm", "norm_ffn"), "ffn_norm"),
    "norm_mlstm": "norm",
}
"""Parts of a layer under the names that other models have for them."""


def renamed(t: Weights) -> Weights:
    """The weights of a layer, whose parts have one name in all models."""
    parts = {name: name.split(".", 1) for name in t}
    return {f"{RENAMED.get(head, head)}.{rest}": t[name] for name, (head, rest) in parts.items()}


def special(t: Weights, config: Any) -> Weights | None:
    """A layer that is told by a weight of its own; None for all others."""
    for mark, read in (
        ("sinks", lambda: sink_attention(t)),
        ("experts.gate_up_proj_bias", lambda: clamped_experts(t)),
        ("in_proj_qkvz.weight", lambda: gated_delta(t, config)),
        ("forget_gate.A_log", lambda: kimi_delta(t)),
        ("rg_lru.recurrent_param", lambda: gated_lru(t)),
        ("igate_preact.weight", lambda: mlstm(t)),
        ("proj_up_gate.weight", lambda: glu(t)),
    ):
        if mark in t:
            return read()
    if config.model_type == "qwen3_next" and "q_proj.weight" in t:
        return gated_attention(t, config.head_dim)
    return None


def sink_attention(t: Weights) -> Weights:
    """gpt-oss."""
    own = joined(t, "entry", "q_proj", "k_proj", "v_proj") | joined(t, "exit", "o_proj")
    return own | {"scoring.sinks": t["sinks"]}


def clamped_experts(t: Weights) -> Weights:
    """gpt-oss: gate and up alternate there, and matrices are (E, in, out)."""
    entry, bias = t["experts.gate_up_proj"], t["experts.gate_up_proj_bias"]
    return {
        "router.weight": t["router.weight"],
        "router.bias": t["router.bias"],
        "experts.entry": torch.cat((entry[..., ::2], entry[..., 1::2]), -1).mT,
        "experts.entry_bias": torch.cat((bias[..., ::2], bias[..., 1::2]), -1),
        "experts.exit": t["experts.down_proj"].mT,
        "experts.exit_bias": t["experts.down_proj_bias"],
    }


def gated_delta(t: Weights, config: Any) -> Weights:
    """Qwen3-Next: the rows of a key head stand together there."""
    groups, key = config.linear_num_key_heads, config.linear_key_head_dim
    times = config.linear_num_value_heads // groups
    inner = times * config.linear_value_head_dim
    wide, narrow = t["in_proj_qkvz.weight"], t["in_proj_ba.weight"]
    rows = [
        *wide.unflatten(0, (groups, -1)).split([key, key, inner, inner], 1),
        *narrow.unflatten(0, (groups, -1)).split([times, times], 1),
    ]
    return {
        "in_proj.weight": torch.cat([part.flatten(0, 1) for part in rows]),
        "conv.weight": t["conv1d.weight"].squeeze(1),
        "dt.A_log": t["A_log"],
        "dt.bias": t["dt_bias"],
        "norm.weight": t["norm.weight"],
        "out_proj.weight": t["out_proj.weight"],
    }


def gated_attention(t: Weights, head_dim: int) -> Weights:
    """Qwen3-Next: every head's queries and gate stand together there."""
    own = (
        joined(t, "exit", "o_proj") | joined(t, "q_norm", "q_norm") | joined(t, "k_norm", "k_norm")
    )
    for kind in ("weight", "bias"):
        if f"q_proj.{kind}" in t:
            pairs = t[f"q_proj.{kind}"].unflatten(0, (-1, 2, head_dim))
            queries, gate = (pairs[:, i].flatten(0, 1) for i in (0, 1))
            rows = (queries, t[f"k_proj.{kind}"], t[f"v_proj.{kind}"], gate)
            own[f"entry.{kind}"] = torch.cat(rows)
    return own


def kimi_delta(t: Weights) -> Weights:
    """Kimi Delta Attention."""
    parts = ("q_proj", "k_proj", "v_proj", "g_a_proj", "b_proj", "forget_gate.f_a_proj")
    heads, bias = t["b_proj.weight"].shape[0], t["forget_gate.dt_bias"]
    return {
        "in_proj.weight": torch.cat([t[f"{part}.weight"] for part in parts]),
        "decay.up.weight": t["forget_gate.f_b_proj.weight"],
        "decay.bias": bias.unflatten(0, (heads, -1)),
        "decay.A_log": t["forget_gate.A_log"].view(heads, 1),
        "gate_up.weight": t["g_b_proj.weight"],
        "conv.weight": t["conv1d.weight"].squeeze(1),
        "norm.weight": t["o_norm.weight"],
        "out_proj.weight": t["o_proj.weight"],
    }


def gated_lru(t: Weights) -> Weights:
    """RecurrentGemma."""
    own = joined(t, "in_proj", "linear_y", "linear_x") | joined(t, "out_proj", "linear_out")
    for kind in ("weight", "bias"):
        both = [t[f"rg_lru.{gate}_gate_{kind}"] for gate in ("input", "recurrent")]
        own[f"block_gates.{kind}"] = torch.cat(both, -1)
    conv: dict[str, Tensor] = {"conv.weight": t["conv_1d.weight"].squeeze(1)}
    return (
        own | conv | {"conv.bias": t["conv_1d.bias"], "rg_lru.decay": t["rg_lru.recurrent_param"]}
    )


def mlstm(t: Weights) -> Weights:
    """xLSTM."""
    return (
        joined(t, "in_proj", "q", "k", "v", "ogate_preact")
        | joined(t, "gates", "igate_preact", "fgate_preact")
        | joined(t, "norm", "multihead_norm")
        | joined(t, "out_proj", "out_proj")
    )


def glu(t: Weights) -> Weights:
    """xLSTM."""
    return joined(t, "entry", "proj_up_gate", "proj_up") | joined(t, "exit", "proj_down")
