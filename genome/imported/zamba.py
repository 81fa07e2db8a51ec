"""Zamba2: Mamba-2 whose input some layers lead through a transformer block that they share."""

from __future__ import annotations

from dataclasses import replace

from ...primitives.base import Gene
from ..genome import Genome, Op, Slot
from ..resolve import letters
from .fields import STACK, ConfigurationError, Fields, family, op
from .mamba import STARTS
from .parts import activation, expansion, layers, mamba2_heads
from .turns import rope_base, without_rope

KINDS = {"mamba": "mamba", "linear_attention": "mamba", "hybrid": "hybrid"}
"""Layers' kinds in older files and in newer ones."""

HYBRIDS = {*range(6, 43, 6), 47, 51}
"""The class' own layers with a block: those of the 2.7B model."""

DERIVED = (
    *("attention_head_dim", "attention_hidden_size", "ffn_hidden_size", "hybrid_layer_ids"),
    *("kv_channels", "mamba_headdim", "num_query_groups", "use_shared_mlp_adapter"),
)
"""Fields that the class computes from the others, or does not read."""


@family(
    "Zamba2Config", {"layer_types": "layers_block_type", "head_dim": "attention_head_dim"},
    STACK,
    hidden_size=2560, num_hidden_layers=54, num_attention_heads=32, rope_theta=10000.0,
    hidden_act="gelu", rms_norm_eps=1e-5, add_bias_linear=False, num_mem_blocks=1,
    use_shared_attention_adapter=False, adapter_rank=128, use_mem_rope=False,
    use_long_context=False, n_mamba_heads=8, mamba_ngroups=1, mamba_d_state=64, mamba_d_conv=4,
    mamba_expand=2, use_conv_bias=True, time_step_min=0.001, tie_word_embeddings=True,
)  # fmt: skip
def zamba2(f: Fields) -> Genome:
    """Blocks that take turns over the depth."""
    f.never("add_bias_linear")
    f.known(*DERIVED, *STARTS, "use_mem_eff_path")
    f.neutral("time_step_min", None, 0, what="a least step size in the library's Mamba-2")
    if not f.given("layers_block_type") and f.get("num_hidden_layers") != 54:
        raise f.refuse("num_hidden_layers", "without layers_block_type the class has 54")
    kinds = layers(f, KINDS, lambda i: "hybrid" if i in HYBRIDS else "mamba", "layers_block_type")
    if not f.flag("tie_word_embeddings") and kinds.count("hybrid") > 1:
        raise f.refuse("tie_word_embeddings", "the library then shares no block either")
    block, mamba, blocks = _block(f), _mamba(f), f.whole("num_mem_blocks")
    calls = kinds.count("hybrid")
    slots: list[Slot] = []
    called = 0
    for kind in kinds:
        if kind == "mamba":
            slots.append(Slot((mamba,)))
            continue
        number = called % blocks
        called += 1
        # A block that is called once shares with nobody.
        shared = replace(block, weights=letters(number)) if number + blocks < calls else block
        slots.append(Slot((shared, mamba), "chain"))
    return f.genome(slots, position="rope" if f.flag("use_mem_rope") else "none")


def _block(f: Fields) -> Op:
    width, heads = f.whole("hidden_size"), f.whole("num_attention_heads")
    if 2 * width % heads:
        raise ConfigurationError(
            f"num_attention_heads={heads} does not divide {2 * width} channels, those of the "
            "stream and the embedding"
        )
    kv_heads = f.optional("num_key_value_heads") or heads
    adapted = f.flag("use_shared_attention_adapter")
    if adapted and kv_heads != heads:
        raise f.refuse(
            "use_shared_attention_adapter", "the class' adapters need as many key-value heads"
        )
    genes: dict[str, Gene] = {} if kv_heads == heads else {"kv_heads": kv_heads}
    if f.flag("use_mem_rope"):
        genes |= rope_base(f)
        if f.flag("use_long_context"):
            f.note("a scaling of RoPE (use_long_context)")
    without_rope(f)
    given = f.optional("intermediate_size")
    return op(
        "zamba2-block",
        heads=heads,
        expansion=expansion(f, "intermediate_size", given or 4 * width),
        activation=activation(f),
        adapters="all" if adapted else "mlp",
        rank=f.whole("adapter_rank"),
        **genes,
    )


def _mamba(f: Fields) -> Op:
    """Its heads are as wide as their number makes them, whatever `mamba_headdim` says."""
    # The class makes the bias, whatever the field says.
    f.known("use_conv_bias")
    inner = int(f.number("mamba_expand") * f.whole("hidden_size"))
    return mamba2_heads(f, inner, "n_mamba_heads", "mamba_d_state", "mamba_ngroups", "mamba_d_conv")
