"""Hybrids of attention with Mamba: Jamba, Falcon-H1, Granite 4.0, Bamba."""

from __future__ import annotations

from ...primitives.base import Gene
from ..genome import Genome, Op, Slot
from .experts import beside, experts, sparse
from .fields import TRANSFORMER, Fields, family, op
from .mamba import dt_rank
from .parts import MIXERS, attention, conv_bias, heads_of, layer_count, layers, mamba2, mlp, stack
from .turns import PARTIAL, rope, without_rope

FALCON_FACTORS = (
    *("lm_head_multiplier", "embedding_multiplier", "key_multiplier", "attention_out_multiplier"),
    *("attention_in_multiplier", "ssm_in_multiplier", "ssm_out_multiplier"),
)


def mamba2_of(f: Fields, inner: int | None = None, norm: str = "gated-rmsnorm") -> Op:
    """Mamba-2 by the fields that Falcon-H1, Granite and Bamba share."""
    _mamba_parts(f)
    wide = f.whole("mamba_expand") * f.whole("hidden_size")
    return mamba2(f, inner=wide if inner is None else inner, norm=norm)


def _mamba_parts(f: Fields) -> None:
    conv_bias(f, "mamba_conv_bias")
    f.never("mamba_proj_bias")
    f.neutral("hidden_act", "silu", "swish", what="Mamba's activation")


@family(
    "JambaConfig", {"num_local_experts": "num_experts"}, TRANSFORMER,
    vocab_size=65536, num_key_value_heads=8, num_experts_per_tok=2, num_experts=16,
    expert_layer_period=2, expert_layer_offset=1, attn_layer_period=8, attn_layer_offset=4,
    mamba_d_state=16, mamba_d_conv=4, mamba_expand=2, mamba_conv_bias=True, mamba_proj_bias=False,
    hidden_act="silu",
)  # fmt: skip
def jamba(f: Fields) -> Genome:
    """No positions."""
    _mamba_parts(f)
    f.never("sliding_window", why="the library's Jamba takes no window")
    f.same("mamba_inner_layernorms", True, "a genome's Jamba norms the step sizes, B and C")
    f.known("n_ctx")
    mamba = op(
        "jamba-mamba",
        state=f.whole("mamba_d_state"),
        expand=f.number("mamba_expand"),
        rank=dt_rank(f, "mamba_dt_rank"),
        conv=f.whole("mamba_d_conv"),
    )
    routed = experts(f, "mixtral", False, "num_experts", "intermediate_size")
    every, first = f.whole("attn_layer_period"), f.whole("attn_layer_offset", low=0)
    period, start = f.whole("expert_layer_period"), f.whole("expert_layer_offset", low=0)
    numbers, mixer, single = range(layer_count(f)), attention(f), f.whole("num_experts") == 1
    mixers = [mixer if i % every == first else mamba for i in numbers]
    dense = [single or i % period != start for i in numbers]
    without_rope(f)
    return f.genome(sparse(f, mixers, dense, routed), position="none")


@family(
    "FalconH1Config",
    vocab_size=128000, num_key_value_heads=8, rms_norm_eps=1e-5, mamba_d_ssm=1024,
    mamba_n_heads=128, mamba_d_head="auto", mamba_n_groups=1, mamba_d_state=256, mamba_d_conv=4,
    mamba_expand=2, mamba_conv_bias=True, mamba_proj_bias=False, mamba_norm_before_gate=True,
    mamba_rms_norm=False, projectors_bias=False, attention_bias=False, mlp_bias=False,
    lm_head_multiplier=1.0, embedding_multiplier=1.0, key_multiplier=1.0,
    attention_out_multiplier=1.0, attention_in_multiplier=1.0, ssm_in_multiplier=1.0,
    ssm_out_multiplier=1.0, hidden_act="silu",
)  # fmt: skip
def falcon_h1(f: Fields) -> Genome:
    """Attention and Mamba-2 side by side."""
    f.never("projectors_bias")
    factors = [f.number(name) for name in FALCON_FACTORS]
    for name in ("mlp_multipliers", "ssm_multipliers"):
        factors += f.list_of(name, float, "factors")
    if set(factors) != {1.0}:
        f.note("fixed factors on embeddings, projections, keys and logits (*_multiplier)")
    # With `mamba_use_mlp` false a layer would have no MLP; no class reads it.
    f.known("mamba_use_mlp")
    norm = "none"
    before = f.flag("mamba_norm_before_gate")
    if f.flag("mamba_rms_norm"):
        norm = "rmsnorm-all" if before else "gated-rmsnorm"
        if before and f.whole("mamba_n_groups") > 1:
            raise f.refuse(
                "mamba_norm_before_gate", "with groups, a genome's Mamba-2 norms after the gate"
            )
    mamba = mamba2_of(f, f.optional("mamba_d_ssm"), norm)
    mixer = Slot((attention(f, bias=f.flag("attention_bias"), **rope(f)), mamba), "sum")
    return f.genome(stack([mixer] * layer_count(f), mlp(f, bias=f.flag("mlp_bias"))))


@family(
    "GraniteMoeHybridConfig", {"layers_block_type": "layer_types"},
    intermediate_size=11008, attention_bias=False, embedding_multiplier=1.0, logits_scaling=1.0,
    residual_multiplier=1.0, attention_multiplier=1.0, num_local_experts=8, num_experts_per_tok=2,
    shared_intermediate_size=1024, mamba_n_heads=128, mamba_n_groups=1, mamba_d_state=256,
    mamba_d_head="auto", mamba_d_conv=4, mamba_expand=2, mamba_conv_bias=True,
    mamba_proj_bias=False, hidden_act="silu",
)  # fmt: skip
def granite(f: Fields) -> Genome:
    """A dense MLP in every layer, experts beside it where there are any."""
    kinds = layers(f, MIXERS, lambda _: "mamba")
    ones = ("embedding_multiplier", "logits_scaling", "residual_multiplier")
    own = f.get("attention_multiplier") != heads_of(f)[2] ** -0.5
    if own or any(f.get(name) != 1 for name in ones):
        f.note("fixed factors on embeddings, scores, residual additions and logits (*_multiplier)")
    f.neutral("normalization_function", None, "rmsnorm", what="norms of another kind")
    turned = f.get("position_embedding_type") == "rope"
    genes: dict[str, Gene] = rope(f) if turned else {}
    without_rope(f)
    mixer, mamba = attention(f, bias=f.flag("attention_bias"), **genes), mamba2_of(f)
    channel = Slot((mlp(f, size="shared_intermediate_size"),))
    f.known("num_experts_per_tok", "intermediate_size")
    if f.count("num_local_experts"):
        routed = experts(f, "moe", True, "num_local_experts", "intermediate_size", balance="none")
        inner, always_on = f.whole("intermediate_size"), f.whole("shared_intermediate_size")
        channel = beside(routed, inner, channel.branches[0], always_on)
    mixers = [mixer if kind == "attention" else mamba for kind in kinds]
    return f.genome(stack(mixers, channel), position="rope" if turned else "none")


@family(
    "BambaConfig",
    vocab_size=128000, num_key_value_heads=8, rms_norm_eps=1e-5, partial_rotary_factor=0.5,
    attention_bias=False, mlp_bias=False, mamba_n_heads=128, mamba_d_head="auto", mamba_n_groups=1,
    mamba_d_state=256, mamba_d_conv=4, mamba_expand=2, mamba_conv_bias=True, mamba_proj_bias=False,
    hidden_act="silu",
)  # fmt: skip
def bamba(f: Fields) -> Genome:
    """Half of a head's channels are turned."""
    f.same(PARTIAL, 0.5, "the library's class turns half of a head's channels, whatever it says")
    places = f.list_of("attn_layer_indices", int, "layers' numbers")
    f.known("z_loss_coefficient")
    mixer = attention(f, bias=f.flag("attention_bias"), **rope(f, partial=True))
    mamba = mamba2_of(f)
    mixers = [mixer if i in places else mamba for i in range(layer_count(f))]
    return f.genome(stack(mixers, mlp(f, bias=f.flag("mlp_bias"))))
