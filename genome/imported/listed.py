"""Hybrids whose files list the layers: LFM2, Nemotron-H."""

from __future__ import annotations

from ..genome import Genome, Slot
from .experts import beside, sigmoid_experts
from .fields import STACK, ConfigurationError, Fields, family, op
from .parts import (
    MIXERS,
    UNTIED,
    activation,
    attention,
    conv_bias,
    expansion,
    layers,
    mamba2,
    stack,
)
from .turns import rope, without_rope


@family(
    "Lfm2Config", {"tie_embedding": "tie_word_embeddings", "block_ff_dim": "intermediate_size"},
    STACK,
    num_attention_heads=32, vocab_size=65536, hidden_size=2560, intermediate_size=12288,
    num_key_value_heads=8, norm_eps=1e-5, tie_word_embeddings=True, rope_theta=1e6, conv_bias=False,
    conv_L_cache=3, block_multiple_of=256, block_ffn_dim_multiplier=1.0,
    block_auto_adjust_ff_dim=True,
)  # fmt: skip
def lfm2(f: Fields) -> Genome:
    """Gated short convolutions, and attention with normed queries and keys."""
    f.never("conv_bias")
    width = f.whole("hidden_size")
    for name in ("conv_dim", "conv_dim_out", "block_dim"):
        f.same(name, width, f"the library's LFM2 is {width} wide throughout")
    f.known("block_mlp_init_scale", "block_norm_eps", "block_out_init_scale", "num_heads")
    f.known("block_use_swiglu", "block_use_xavier_init", "conv_use_xavier_init", "use_pos_enc")
    places = f.list_of("full_attn_idxs", int, "layers' numbers")
    everywhere = f.get("full_attn_idxs") is None
    kinds = {"conv": "conv", "full_attention": "attention"}
    listed = layers(f, kinds, lambda i: "attention" if everywhere or i in places else "conv")
    inner = f.whole("intermediate_size")
    if f.flag("block_auto_adjust_ff_dim"):
        inner = int(2 * inner / 3)
        if f.get("block_ffn_dim_multiplier") is not None:
            multiple = f.whole("block_multiple_of")
            inner = int(f.number("block_ffn_dim_multiplier") * inner)
            inner = multiple * -(-inner // multiple)
    channel = op("swiglu", expansion=expansion(f, "intermediate_size", inner))
    conv = op("lfm2-conv", taps=f.whole("conv_L_cache"))
    mixer = attention(f, qk_norm=True, **rope(f))
    mixers = [mixer if kind == "attention" else conv for kind in listed]
    return f.genome(stack(mixers, channel), epsilon="norm_eps")


NEMOTRON_LETTERS = {"M": "mamba", "*": "attention", "-": "mlp", "E": "moe"}
NEMOTRON_DEFAULT = ["mamba", "moe", "attention", "mlp"]
NEMOTRON_KINDS = {**MIXERS, "mlp": "mlp", "moe": "moe"}
NEMOTRON_ALIASES = {
    "layer_types": "layers_block_type",
    "attention_head_dim": "head_dim",
    "num_query_groups": "num_key_value_heads",
    "mamba_n_groups": "n_groups",
    "mamba_d_conv": "conv_kernel",
    "mamba_conv_bias": "use_conv_bias",
    "mamba_dt_limit": "time_step_limit",
    "mamba_dt_min": "time_step_min",
    "num_local_experts": "n_routed_experts",
}
NEMOTRON_IGNORED = (
    *("expand", "mtp_layers_block_type", "mtp_hybrid_override_pattern", "n_shared_experts"),
    *("moe_shared_expert_overlap", "time_step_max", "time_step_floor", "time_step_rank"),
    *("rms_norm_eps", "norm_eps"),
)
"""Fields that the library's classes do not read, or that decide how weights begin."""


@family(
    "NemotronHConfig", NEMOTRON_ALIASES, {},
    vocab_size=131072, hidden_size=4096, tie_word_embeddings=False, num_attention_heads=32,
    num_key_value_heads=8, head_dim=128, attention_bias=False, intermediate_size=21504,
    mlp_hidden_act="relu2", mlp_bias=False, ssm_state_size=128, mamba_num_heads=128,
    mamba_head_dim=64, mamba_hidden_act="silu", n_groups=8, conv_kernel=4, time_step_min=0.001,
    use_conv_bias=True, mamba_proj_bias=False, n_routed_experts=8, n_shared_experts=1,
    moe_intermediate_size=7688, moe_shared_expert_intermediate_size=7688, num_experts_per_tok=2,
    routed_scaling_factor=1.0, n_group=1, topk_group=1, norm_topk_prob=True,
    num_nextn_predict_layers=0, use_bias=False, layer_norm_epsilon=1e-5,
)  # fmt: skip
def nemotron_h(f: Fields) -> Genome:
    """Single operators in the order of a pattern, no positions."""
    f.never("use_bias", "mamba_proj_bias", "moe_latent_size")
    f.never("tie_word_embeddings", why=UNTIED)
    f.never("attention_bias", why="the library's attention has none, whatever it says")
    f.never("sliding_window", why="the library's Nemotron-H takes no window")
    conv_bias(f, "use_conv_bias")
    f.neutral("mamba_hidden_act", "silu", what="the activation after the convolution")
    f.neutral("time_step_min", None, 0, what="a least step size in the library's Mamba-2")
    if f.count("num_nextn_predict_layers"):
        f.note("the modules that predict more than one token")
    f.known(*NEMOTRON_IGNORED)
    without_rope(f)
    kinds = _nemotron_layers(f)
    made = {kind: _nemotron_slot(f, kind) for kind in dict.fromkeys(kinds)}
    slots = [made[kind] for kind in kinds]
    return f.genome(slots, position="none", epsilon="layer_norm_epsilon")


def _nemotron_layers(f: Fields) -> list[str]:
    pattern = f.get("hybrid_override_pattern")
    if f.given("layers_block_type") or pattern is None:
        kinds = f.layers("layers_block_type", NEMOTRON_KINDS) or NEMOTRON_DEFAULT
    elif isinstance(pattern, str) and pattern and set(pattern) <= set(NEMOTRON_LETTERS):
        kinds = [NEMOTRON_LETTERS[letter] for letter in pattern]
    else:
        raise f.refuse("hybrid_override_pattern", "its letters are M, *, - and E")
    if f.given("num_hidden_layers") and f.whole("num_hidden_layers") != len(kinds):
        raise ConfigurationError(
            f"the pattern has {len(kinds)} layers where num_hidden_layers="
            f"{f.get('num_hidden_layers')}"
        )
    return kinds


def _nemotron_slot(f: Fields, kind: str) -> Slot:
    if kind == "attention":
        return Slot((attention(f),))
    if kind == "mamba":
        layer = mamba2(
            f,
            inner=f.whole("mamba_num_heads") * f.whole("mamba_head_dim"),
            heads="mamba_num_heads",
            head_dim="mamba_head_dim",
            state="ssm_state_size",
            groups="n_groups",
            taps="conv_kernel",
        )
        return Slot((layer,))
    act, bias = activation(f, "mlp_hidden_act"), f.flag("mlp_bias")
    name = "moe_shared_expert_intermediate_size" if kind == "moe" else "intermediate_size"
    dense = op("relu2", activation=act, expansion=expansion(f, name), bias=bias)
    if kind == "mlp":
        return Slot((dense,))
    f.never("mlp_bias", why="experts have no biases")
    routed = sigmoid_experts(f, activation=act, gated=False)
    return beside(routed, f.whole("moe_intermediate_size"), dense, f.whole(name))
