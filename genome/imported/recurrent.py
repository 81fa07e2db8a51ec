"""Recurrent models that are no Mamba: RecurrentGemma, xLSTM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...primitives.base import Gene
from ..genome import Genome, Slot
from .fields import ConfigurationError, Fields, alone, op
from .parts import attention, expansion, layer_count, mlp, rope

RECURRENT_GEMMA: Mapping[str, Any] = {
    "num_hidden_layers": 26,
    "vocab_size": 256000,
    "hidden_size": 2560,
    "intermediate_size": 7680,
    "num_attention_heads": 10,
    "attention_window_size": 2048,
    "conv1d_width": 4,
    "logits_soft_cap": 30.0,
    "rms_norm_eps": 1e-6,
    "hidden_activation": "gelu_pytorch_tanh",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.5,
    "block_types": ["recurrent", "recurrent", "attention"],
    "attention_bias": False,
    "tie_word_embeddings": True,
}
XLSTM: Mapping[str, Any] = {
    "vocab_size": 50304,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_heads": 8,
    "use_bias": False,
    "tie_word_embeddings": False,
    "add_out_norm": True,
    "norm_eps": 1e-6,
    "qk_dim_factor": 0.5,
    "v_dim_factor": 1.0,
    "ffn_proj_factor": 2.667,
    "ffn_round_up_to_multiple_of": 64,
    "gate_soft_cap": 15.0,
    "output_logit_soft_cap": 30.0,
}

BLOCKS = {"recurrent": "recurrent", "attention": "attention"}
GATE_BLOCK = 256
"""Channels of a block of the gates where the genome says 0 blocks."""
QK_MULTIPLE = 64
"""The library rounds the widths of all queries and of all values up to a multiple of this."""

RUNNING = (
    "norm_reduction_force_float32",
    "chunkwise_kernel",
    "sequence_kernel",
    "step_kernel",
    "mode",
    "return_last_states",
    "autocast_kernel_dtype",
    "eps",
    "inference_state_dtype",
    "weight_mode",
    "max_inference_chunksize",
)
"""Fields of xLSTM about kernels and how weights are stored."""


def recurrent_gemma(f: Fields) -> Genome:
    """`RecurrentGemmaConfig`: a block's gates have as many blocks as attention has heads."""
    f.epsilon("rms_norm_eps")
    if f.get("logits_soft_cap"):
        f.note(f"a cap on logits (logits_soft_cap={f.number('logits_soft_cap'):g})")
    f.neutral(
        "hidden_activation", "gelu_pytorch_tanh", what="the activation of the recurrent branch"
    )
    width, heads = f.whole("hidden_size"), f.whole("num_attention_heads")
    inner = f.optional("lru_width") or width
    if inner % heads or f.whole("intermediate_size") % 2:
        raise ConfigurationError(
            f"lru_width={inner} is no multiple of num_attention_heads={heads}"
            if inner % heads
            else "intermediate_size is odd: gate and up have half of it each"
        )
    recurrent = op(
        "rg-lru",
        expand=inner / width,
        blocks=0 if inner == heads * GATE_BLOCK else heads,
        conv=f.whole("conv1d_width"),
    )
    # The output has a bias whatever `attention_bias` says of the inputs.
    genes: dict[str, Gene] = {"bias": True, **rope(f)}
    if not f.flag("attention_bias"):
        genes["bias_at"] = "output"
    window: dict[str, Gene] = {"pattern": "sliding", "window": f.whole("attention_window_size")}
    mixer = attention(f, **window, **genes)
    half = f.whole("intermediate_size") // 2
    channel = mlp(f, act="hidden_activation", inner=half, bias=True)
    blocks = f.layers("block_types", BLOCKS)
    if blocks is None:
        raise f.refuse("block_types", "it is a list of recurrent and attention")
    slots: list[Slot] = []
    for i in range(layer_count(f, None)):
        kind = blocks[i % len(blocks)]
        slots += alone(mixer if kind == "attention" else recurrent, channel)
    return f.genome(slots)


def xlstm(f: Fields) -> Genome:
    """`xLSTMConfig`: mLSTM and SwiGLU, as in xLSTM-7B."""
    f.epsilon("norm_eps")
    f.never("use_bias")
    f.always("add_out_norm", why="a genome has a norm before the head")
    if f.get("output_logit_soft_cap"):
        f.note(f"a cap on logits (output_logit_soft_cap={f.number('output_logit_soft_cap'):g})")
    f.known(*RUNNING)
    width = f.whole("hidden_size")
    for name, same in (("embedding_dim", "hidden_size"), ("num_blocks", "num_hidden_layers")):
        if f.get(name) not in (None, f.whole(same)):
            raise f.refuse(name, f"it is another name of {same}, which is {f.whole(same)}")
    layer = op(
        "mlstm",
        heads=f.whole("num_heads"),
        key_expand=_rounded(width * f.number("qk_dim_factor"), QK_MULTIPLE) / width,
        expand=_rounded(width * f.number("v_dim_factor"), QK_MULTIPLE) / width,
        cap=0.0 if f.get("gate_soft_cap") is None else f.number("gate_soft_cap"),
    )
    multiple = f.whole("ffn_round_up_to_multiple_of")
    inner = _rounded(width * f.number("ffn_proj_factor"), multiple)
    channel = op("swiglu", expansion=expansion(f, "ffn_proj_factor", inner))
    return f.genome(alone(layer, channel) * layer_count(f, None), position="none")


def _rounded(size: float, multiple: int) -> int:
    """The size rounded up to a multiple, as the library rounds."""
    return int((size + multiple - 1) // multiple) * multiple
