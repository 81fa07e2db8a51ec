"""Hybrids whose files list the layers: LFM2 and Nemotron-H."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..genome import Genome, Slot
from .experts import beside, sigmoid_experts
from .fields import ConfigurationError, Fields, alone, op
from .hybrids import KINDS
from .parts import activation, attention, expansion, layer_count, mamba2, rope, without_rope

LFM2: Mapping[str, Any] = {
    "vocab_size": 65536,
    "hidden_size": 2560,
    "intermediate_size": 12288,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "rope_theta": 1000000.0,
    "conv_bias": False,
    "conv_L_cache": 3,
    "block_multiple_of": 256,
    "block_ffn_dim_multiplier": 1.0,
    "block_auto_adjust_ff_dim": True,
}
NEMOTRON_H: Mapping[str, Any] = {
    "vocab_size": 131072,
    "hidden_size": 4096,
    "tie_word_embeddings": False,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "attention_bias": False,
    "intermediate_size": 21504,
    "mlp_hidden_act": "relu2",
    "mlp_bias": False,
    "ssm_state_size": 128,
    "mamba_num_heads": 128,
    "mamba_head_dim": 64,
    "mamba_hidden_act": "silu",
    "n_groups": 8,
    "conv_kernel": 4,
    "time_step_min": 0.001,
    "use_conv_bias": True,
    "mamba_proj_bias": False,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "moe_intermediate_size": 7688,
    "moe_shared_expert_intermediate_size": 7688,
    "num_experts_per_tok": 2,
    "routed_scaling_factor": 1.0,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "num_nextn_predict_layers": 0,
    "use_bias": False,
    "layer_norm_epsilon": 1e-5,
}

NEMOTRON_LETTERS = {"M": "mamba", "*": "attention", "-": "mlp", "E": "moe"}
NEMOTRON_DEFAULT = ["mamba", "moe", "attention", "mlp"]
NEMOTRON_KINDS = {**KINDS, "mlp": "mlp", "moe": "moe"}


def lfm2(f: Fields) -> Genome:
    """`Lfm2Config`: gated short convolutions, and attention with normed queries and keys."""
    f.epsilon("norm_eps")
    f.never("conv_bias")
    width = f.whole("hidden_size")
    for name in ("conv_dim", "conv_dim_out", "block_dim"):
        if f.get(name) not in (None, width):
            raise f.refuse(name, f"the library's LFM2 is {width} wide throughout")
    f.known("block_mlp_init_scale", "block_norm_eps", "block_out_init_scale")
    f.known(
        "num_heads",
        "block_use_swiglu",
        "block_use_xavier_init",
        "conv_use_xavier_init",
        "use_pos_enc",
    )
    count = layer_count(f, None)
    layers = f.layers("layer_types", {"conv": "conv", "full_attention": "attention"})
    layer_count(f, layers)
    places = f.list_of("full_attn_idxs", int, "layers' numbers")
    if layers is None:
        places = list(range(count)) if places is None else places
        layers = ["attention" if i in places else "conv" for i in range(count)]
    inner = f.whole("intermediate_size")
    if f.flag("block_auto_adjust_ff_dim"):
        multiple = f.whole("block_multiple_of")
        inner = int(2 * inner / 3)
        if f.get("block_ffn_dim_multiplier") is not None:
            inner = int(f.number("block_ffn_dim_multiplier") * inner)
            inner = multiple * -(-inner // multiple)
    channel = op("swiglu", expansion=expansion(f, "intermediate_size", inner))
    conv = op("lfm2-conv", taps=f.whole("conv_L_cache"))
    mixer = attention(f, qk_norm=True, **rope(f))
    slots: list[Slot] = []
    for kind in layers:
        slots += alone(mixer if kind == "attention" else conv, channel)
    return f.genome(slots)


def nemotron_h(f: Fields) -> Genome:
    """`NemotronHConfig`: single operators in the order of a pattern, no positions."""
    f.number("layer_norm_epsilon")
    f.never("use_bias", "mamba_proj_bias", "moe_latent_size")
    f.always("use_conv_bias", why="a genome's Mamba has a bias on the convolution")
    f.neutral("mamba_hidden_act", "silu", what="the activation after the convolution")
    f.neutral("time_step_min", None, 0, what="a least step size in the library's Mamba-2")
    if f.whole("num_nextn_predict_layers", low=0):
        f.note("the modules that predict more than one token")
    f.known(
        "expand",
        "mtp_layers_block_type",
        "mtp_hybrid_override_pattern",
        "moe_shared_expert_overlap",
        "time_step_max",
        "time_step_floor",
        "time_step_rank",
        "rms_norm_eps",
        "norm_eps",
    )
    without_rope(f)
    mixers: dict[str, Slot] = {}
    slots: list[Slot] = []
    for kind in _nemotron_layers(f):
        if kind not in mixers:
            mixers[kind] = _nemotron_slot(f, kind)
        slots.append(mixers[kind])
    return f.genome(slots, position="none")


def _nemotron_layers(f: Fields) -> list[str]:
    pattern = f.get("hybrid_override_pattern")
    if f.given("layers_block_type") or pattern is None:
        layers = f.layers("layers_block_type", NEMOTRON_KINDS) or NEMOTRON_DEFAULT
    elif isinstance(pattern, str) and pattern and set(pattern) <= set(NEMOTRON_LETTERS):
        layers = [NEMOTRON_LETTERS[letter] for letter in pattern]
    else:
        raise f.refuse("hybrid_override_pattern", "its letters are M, *, - and E")
    if f.given("num_hidden_layers") and f.whole("num_hidden_layers") != len(layers):
        raise ConfigurationError(
            f"the pattern has {len(layers)} layers where num_hidden_layers="
            f"{f.get('num_hidden_layers')}"
        )
    return layers


def _nemotron_slot(f: Fields, kind: str) -> Slot:
    act = activation(f, "mlp_hidden_act")
    bias = f.flag("mlp_bias")
    if kind == "attention":
        f.never("sliding_window", why="the library's Nemotron-H takes no window")
        return Slot((attention(f, bias=f.flag("attention_bias")),))
    if kind == "mamba":
        layer = mamba2(
            f,
            inner=f.whole("mamba_num_heads") * f.whole("mamba_head_dim"),
            heads="mamba_num_heads",
            head_dim="mamba_head_dim",
            state="ssm_state_size",
            groups="n_groups",
            taps="conv_kernel",
            epsilon="layer_norm_epsilon",
        )
        return Slot((layer,))
    if kind == "mlp":
        size = expansion(f, "intermediate_size")
        return Slot((op("relu2", activation=act, expansion=size, bias=bias),))
    return _nemotron_experts(f, act, bias)


def _nemotron_experts(f: Fields, act: str, bias: bool) -> Slot:
    f.never("mlp_bias", why="experts have no biases")
    inner, always_on = "moe_intermediate_size", "moe_shared_expert_intermediate_size"
    experts = sigmoid_experts(f, activation=act, gated=False)
    dense = op("relu2", activation=act, expansion=expansion(f, always_on), bias=bias)
    return beside(experts, f.whole(inner), dense, f.whole(always_on))
