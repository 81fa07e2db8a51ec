"""Recurrent models that are no Mamba: RecurrentGemma, xLSTM."""

from __future__ import annotations

from ...primitives.base import Gene
from ..genome import Genome
from .fields import STACK, ConfigurationError, Fields, family, op
from .parts import UNTIED, attention, expansion, layer_count, mlp, stack, window
from .turns import rope

BLOCKS = {"recurrent": "recurrent", "attention": "attention"}
GATE_BLOCK = 256
"""Channels of a block of the gates where the genome says 0 blocks."""
MULTIPLE = 64
"""The authors' code rounds the widths of queries and of values up to it, the library's does not."""

RUNNING = (
    *("norm_reduction_force_float32", "chunkwise_kernel", "sequence_kernel", "step_kernel"),
    *("mode", "return_last_states", "autocast_kernel_dtype", "eps", "inference_state_dtype"),
    *("weight_mode", "max_inference_chunksize"),
)
"""Fields of xLSTM about kernels and how weights are stored."""


@family(
    "RecurrentGemmaConfig",
    {"_block_types": "block_types", "sliding_window": "attention_window_size"},
    num_hidden_layers=26, vocab_size=256000, hidden_size=2560, intermediate_size=7680,
    num_attention_heads=10, attention_window_size=2048, conv1d_width=4, logits_soft_cap=30.0,
    hidden_activation="gelu_pytorch_tanh", partial_rotary_factor=0.5, attention_bias=False,
    block_types=["recurrent", "recurrent", "attention"], tie_word_embeddings=True,
)  # fmt: skip
def recurrent_gemma(f: Fields) -> Genome:
    """A block's gates have as many blocks as attention has heads."""
    if f.get("logits_soft_cap"):
        f.note(f"a cap on logits (logits_soft_cap={f.number('logits_soft_cap'):g})")
    f.neutral(
        "hidden_activation", "gelu_pytorch_tanh", what="the activation of the recurrent branch"
    )
    # As Gemma's factor it can stand in the table.
    f.known("embeddings_scale_by_sqrt_dim")
    width, heads = f.whole("hidden_size"), f.whole("num_attention_heads")
    inner, both = f.optional("lru_width") or width, f.whole("intermediate_size")
    if inner % heads:
        raise ConfigurationError(f"lru_width={inner} is no multiple of num_attention_heads={heads}")
    if both % 2:
        raise f.refuse("intermediate_size", "gate and up have half of it each")
    recurrent = op(
        "rg-lru",
        expand=inner / width,
        blocks=0 if inner == heads * GATE_BLOCK else heads,
        conv=f.whole("conv1d_width"),
    )
    # The output has a bias whatever `attention_bias` says of the inputs.
    genes: dict[str, Gene] = {"bias": True, **rope(f, partial=True)}
    if not f.flag("attention_bias"):
        genes["bias_at"] = "output"
    mixer = attention(f, **window(f, "attention_window_size"), **genes)
    channel = mlp(f, act="hidden_activation", inner=both // 2, bias=True)
    blocks = f.layers("block_types", BLOCKS)
    if blocks is None:
        raise f.refuse("block_types", "it is a list of recurrent and attention")
    kinds = [blocks[i % len(blocks)] for i in range(layer_count(f))]
    mixers = [mixer if kind == "attention" else recurrent for kind in kinds]
    return f.genome(stack(mixers, channel))


@family(
    "xLSTMConfig", base=STACK,
    vocab_size=50304, num_heads=8, use_bias=False, add_out_norm=True, norm_eps=1e-6,
    qk_dim_factor=0.5, v_dim_factor=1.0, ffn_proj_factor=2.667, ffn_round_up_to_multiple_of=64,
    gate_soft_cap=15.0, output_logit_soft_cap=30.0,
)  # fmt: skip
def xlstm(f: Fields) -> Genome:
    """mLSTM and SwiGLU, as in xLSTM-7B."""
    f.never("use_bias")
    f.never("tie_word_embeddings", why=UNTIED)
    f.always("add_out_norm", why="a genome has a norm before the head")
    if f.get("output_logit_soft_cap"):
        f.note(f"a cap on logits (output_logit_soft_cap={f.number('output_logit_soft_cap'):g})")
    f.known(*RUNNING)
    width = f.whole("hidden_size")
    for name, same in (("embedding_dim", "hidden_size"), ("num_blocks", "num_hidden_layers")):
        value = f.whole(same)
        f.same(name, value, f"it is another name of {same}, which is {value}")
    layer = op(
        "mlstm",
        heads=f.whole("num_heads"),
        key_expand=_factor(f, "qk_dim_factor"),
        expand=_factor(f, "v_dim_factor"),
        cap=0.0 if f.get("gate_soft_cap") is None else f.number("gate_soft_cap"),
    )
    multiple = f.whole("ffn_round_up_to_multiple_of")
    # Rounded up as the library does it.
    inner = int((width * f.number("ffn_proj_factor") + multiple - 1) // multiple) * multiple
    channel = op("swiglu", expansion=expansion(f, "ffn_proj_factor", inner))
    slots = stack([layer] * layer_count(f), channel)
    return f.genome(slots, position="none", epsilon="norm_eps")


def _factor(f: Fields, name: str) -> float:
    width = f.whole("hidden_size")
    inner = width * f.number(name)
    if inner % MULTIPLE:
        raise f.refuse(name, f"{inner:g} channels are no multiple of {MULTIPLE}: codes differ")
    return inner / width
