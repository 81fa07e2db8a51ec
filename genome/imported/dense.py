"""Transformers without experts: Llama, Mistral, Qwen 3, Phi-3, Gemma 1 to 3."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...primitives.base import Gene
from ..genome import Genome, Slot
from .fields import Fields, alone, op
from .parts import attention, expansion, heads_of, layer_count, mlp, rope, window

KINDS = {"full_attention": "full", "sliding_attention": "sliding"}

LLAMA: Mapping[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "mlp_bias": False,
}
MISTRAL: Mapping[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
}
QWEN3: Mapping[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "head_dim": 128,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "use_sliding_window": False,
    "max_window_layers": 28,
}
QWEN2: Mapping[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "use_sliding_window": False,
    "max_window_layers": 28,
}
PHI3: Mapping[str, Any] = {
    "vocab_size": 32064,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
}
GEMMA: Mapping[str, Any] = {
    "vocab_size": 256000,
    "hidden_size": 3072,
    "intermediate_size": 24576,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 256,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "rope_theta": 10000.0,
    "attention_bias": False,
}
GEMMA2: Mapping[str, Any] = {
    "vocab_size": 256000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "final_logit_softcapping": 30.0,
    "attn_logit_softcapping": 50.0,
}
GEMMA3: Mapping[str, Any] = {
    "vocab_size": 262208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
GEMMA3_LOCAL_BASE, GEMMA3_BASE = 10000.0, 1000000.0
"""The bases of RoPE in windows and in full attention, where the file does not say."""
GEMMA3_PERIOD = 6
"""One full attention in so many layers, where the file does not say."""

# Gemma's factor sqrt(width) on embeddings is no difference: it can stand in the tables, and its
# inverse in the last norm's scale.
LATER = "it reads later tokens, which no language model's genome does"


def llama(f: Fields) -> Genome:
    """`LlamaConfig`: Llama 1 to 3.3, and what keeps its form."""
    f.epsilon("rms_norm_eps")
    mixer = attention(f, bias=f.flag("attention_bias"), **rope(f))
    return f.genome(alone(mixer, mlp(f, bias=f.flag("mlp_bias"))) * layer_count(f, None))


def mistral(f: Fields) -> Genome:
    """`MistralConfig`; a null `sliding_window` is full attention."""
    f.epsilon("rms_norm_eps")
    layers = f.layers("layer_types", KINDS)
    genes = rope(f)
    if layers is None:
        mixers = [attention(f, **window(f), **genes)] * layer_count(f, None)
    else:
        layer_count(f, layers)
        mixers = [
            attention(f, **(window(f) if kind == "sliding" else {}), **genes) for kind in layers
        ]
    channel = mlp(f)
    return f.genome([slot for mixer in mixers for slot in alone(mixer, channel)])


def qwen2(f: Fields) -> Genome:
    """`Qwen2Config`, of Qwen 2 and 2.5: biases of queries, keys and values."""
    return _qwen(f, {"bias": True, "bias_at": "inputs"})


def qwen3(f: Fields) -> Genome:
    """`Qwen3Config`: norms of queries and keys."""
    return _qwen(f, {"qk_norm": True, "bias": f.flag("attention_bias")})


def _qwen(f: Fields, genes: dict[str, Gene]) -> Genome:
    f.epsilon("rms_norm_eps")
    genes |= rope(f)
    layers, channel = qwen_windows(f), mlp(f)
    mixers = [attention(f, **genes, **(window(f) if sliding else {})) for sliding in layers]
    return f.genome([slot for mixer in mixers for slot in alone(mixer, channel)])


def qwen_windows(f: Fields) -> list[bool]:
    """Whether each layer has the sliding window: as `layer_types` says, else from
    `max_window_layers` on where windows are used at all."""
    layers = f.layers("layer_types", KINDS)
    count = layer_count(f, layers)
    tokens, used = f.get("sliding_window"), f.flag("use_sliding_window")
    used = used and tokens is not None
    if layers is not None:
        return [kind == "sliding" and used for kind in layers]
    first = f.whole("max_window_layers", low=0)
    first = first if used else count
    return [i >= first for i in range(count)]


def phi3(f: Fields) -> Genome:
    """`Phi3Config`; its fused projections are the genome's too."""
    f.epsilon("rms_norm_eps")
    f.known("original_max_position_embeddings")
    mixer = attention(f, **window(f), **rope(f))
    return f.genome(alone(mixer, mlp(f)) * layer_count(f, None))


def gemma(f: Fields) -> Genome:
    """`GemmaConfig`: GeGLU, wide heads."""
    f.epsilon("rms_norm_eps")
    f.never("use_bidirectional_attention", why=LATER)
    # Files call the activation by two names and two forms; the library runs the tanh form for all.
    f.known("hidden_act", "hidden_activation")
    mixer = attention(f, bias=f.flag("attention_bias"), **rope(f))
    channel = op("geglu", expansion=expansion(f, "intermediate_size"), activation="gelu-tanh")
    return f.genome(alone(mixer, channel) * layer_count(f, None))


def gemma2(f: Fields) -> Genome:
    """`Gemma2Config`: norms before and after, capped scores, windows in every other layer."""
    layers = f.layers("layer_types", KINDS)
    count = layer_count(f, layers)
    layers = layers or ["full" if i % 2 else "sliding" for i in range(count)]
    cap = f.get("attn_logit_softcapping")
    genes: dict[str, Gene] = (
        {} if cap is None else {"logit_cap": f.number("attn_logit_softcapping")}
    )
    return _gemma_windows(f, layers, {kind: {**genes, **rope(f)} for kind in KINDS.values()})


def gemma3(f: Fields) -> Genome:
    """`Gemma3TextConfig`: norms of queries and keys, five windows to one full attention."""
    layers = f.layers("layer_types", KINDS)
    count = layer_count(f, layers)
    period = f.optional("sliding_window_pattern") or GEMMA3_PERIOD
    layers = layers or ["sliding" if (i + 1) % period else "full" for i in range(count)]
    f.known("_sliding_window_pattern")
    f.neutral("attn_logit_softcapping", None, what="a cap on scores")
    turns = {
        "sliding": rope(f, "sliding_attention", "rope_local_base_freq", GEMMA3_LOCAL_BASE),
        "full": rope(f, "full_attention", "rope_theta", GEMMA3_BASE),
    }
    genes: dict[str, dict[str, Gene]] = {k: {"qk_norm": True, **v} for k, v in turns.items()}
    return _gemma_windows(f, layers, genes)


def _gemma_windows(f: Fields, layers: list[str], genes: Mapping[str, dict[str, Gene]]) -> Genome:
    """The layers of Gemma 2 and 3: `genes` of a layer's kind, all slots between two norms."""
    f.epsilon("rms_norm_eps")
    f.never("use_bidirectional_attention", why=LATER)
    f.neutral("final_logit_softcapping", None, what="a cap on logits")
    f.neutral("query_pre_attn_scalar", heads_of(f)[2], what="a factor of its own on scores")
    bias = f.flag("attention_bias")
    channel = mlp(f, act="hidden_activation")
    slots: list[Slot] = []
    for kind in layers:
        local = window(f) if kind == "sliding" else {}
        slots += alone(attention(f, bias=bias, **local, **genes[kind]), channel)
    return f.genome(slots, placement="sandwich")
