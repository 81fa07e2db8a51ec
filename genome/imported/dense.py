"""Transformers without experts: Llama, Mistral, Qwen 2 and 3, Phi-3, Gemma 1 to 3."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ...primitives.base import Gene
from ..genome import Genome
from .fields import Fields, family, op
from .parts import (
    INPUT_BIAS,
    WINDOWS,
    attention,
    attentions,
    expansion,
    heads_of,
    layer_count,
    layers,
    mlp,
    stack,
    window,
)
from .turns import rope

# Gemma's factor sqrt(width) on embeddings is no difference: it can stand in the tables, and its
# inverse in the last norm's scale.
LATER = "it reads later tokens, which no language model's genome does"


@family(
    "LlamaConfig",
    intermediate_size=11008, attention_bias=False, mlp_bias=False, hidden_act="silu",
)  # fmt: skip
def llama(f: Fields) -> Genome:
    """Llama 1 to 3.3, and what keeps its form."""
    mixer = attention(f, bias=f.flag("attention_bias"), **rope(f))
    return f.genome(stack([mixer] * layer_count(f), mlp(f, bias=f.flag("mlp_bias"))))


@family("MistralConfig", hidden_act="silu", num_key_value_heads=8, sliding_window=4096)
def mistral(f: Fields) -> Genome:
    """A null `sliding_window` is full attention."""
    kinds = layers(f, WINDOWS, lambda _: "sliding")
    return f.genome(stack(attentions(f, kinds, **rope(f)), mlp(f)))


@family(
    "Qwen2Config",
    vocab_size=151936, intermediate_size=22016, num_key_value_heads=32, use_sliding_window=False,
    sliding_window=4096, max_window_layers=28, hidden_act="silu",
)  # fmt: skip
def qwen2(f: Fields) -> Genome:
    """Qwen 2 and 2.5: biases of queries, keys and values."""
    return f.genome(stack(attentions(f, qwen_kinds(f), **INPUT_BIAS, **rope(f)), mlp(f)))


@family(
    "Qwen3Config",
    vocab_size=151936, intermediate_size=22016, num_key_value_heads=32, head_dim=128,
    attention_bias=False, use_sliding_window=False, sliding_window=4096, max_window_layers=28,
    hidden_act="silu",
)  # fmt: skip
def qwen3(f: Fields) -> Genome:
    """Norms of queries and keys."""
    bias = f.flag("attention_bias")
    mixers = attentions(f, qwen_kinds(f), qk_norm=True, bias=bias, **rope(f))
    return f.genome(stack(mixers, mlp(f)))


def qwen_kinds(f: Fields, otherwise: Callable[[int], bool] | None = None) -> list[str]:
    """Where windows are used at all: as `layer_types` says, else in layers whose number is
    `otherwise`, which is from `max_window_layers` on."""
    first = f.whole("max_window_layers", low=0)
    inside = otherwise or (lambda i: i >= first)
    used = qwen_windows(f)
    kinds = layers(f, WINDOWS, lambda i: "sliding" if used and inside(i) else "full")
    if "sliding" in kinds and not used:
        raise f.refuse("use_sliding_window", "layer_types has layers with a window")
    return kinds


def qwen_windows(f: Fields) -> bool:
    """Whether windows are used."""
    given = f.get("sliding_window") is not None
    return f.flag("use_sliding_window") and given


@family(
    "Phi3Config",
    vocab_size=32064, hidden_size=3072, intermediate_size=8192, rms_norm_eps=1e-5,
    sliding_window=None, hidden_act="silu",
)  # fmt: skip
def phi3(f: Fields) -> Genome:
    """Its fused projections are the genome's too."""
    f.known("original_max_position_embeddings")
    f.never("attention_bias", why="the library's Phi-3 has none, whatever it says")
    mixer = attention(f, **window(f), **rope(f, partial=True))
    return f.genome(stack([mixer] * layer_count(f), mlp(f)))


@family(
    "GemmaConfig",
    vocab_size=256000, hidden_size=3072, intermediate_size=24576, num_hidden_layers=28,
    num_attention_heads=16, num_key_value_heads=16, head_dim=256, attention_bias=False,
    tie_word_embeddings=True, hidden_act="gelu_pytorch_tanh",
)  # fmt: skip
def gemma(f: Fields) -> Genome:
    """GeGLU, wide heads."""
    f.never("use_bidirectional_attention", why=LATER)
    # Older files have a second name, which the library does not read. Its gelu is the tanh form.
    f.known("hidden_activation")
    mixer = attention(f, bias=f.flag("attention_bias"), **rope(f))
    channel = mlp(f)
    if f.get("hidden_act") == "gelu":
        channel = op("geglu", expansion=expansion(f, "intermediate_size"), activation="gelu-tanh")
    return f.genome(stack([mixer] * layer_count(f), channel))


@family(
    "Gemma2Config",
    vocab_size=256000, hidden_size=2304, intermediate_size=9216, num_hidden_layers=26,
    num_attention_heads=8, num_key_value_heads=4, head_dim=256, attention_bias=False,
    tie_word_embeddings=True, hidden_activation="gelu_pytorch_tanh", query_pre_attn_scalar=256,
    sliding_window=4096, final_logit_softcapping=30.0, attn_logit_softcapping=50.0,
)  # fmt: skip
def gemma2(f: Fields) -> Genome:
    """Norms before and after, capped scores, windows in every other layer."""
    kinds = layers(f, WINDOWS, lambda i: "full" if i % 2 else "sliding")
    genes = rope(f)
    if f.get("attn_logit_softcapping") is not None:
        genes["logit_cap"] = f.number("attn_logit_softcapping")
    return _sandwich(f, kinds, dict.fromkeys(kinds, genes))


@family(
    "Gemma3TextConfig",
    vocab_size=262208, hidden_size=2304, intermediate_size=9216, num_hidden_layers=26,
    num_attention_heads=8, num_key_value_heads=4, head_dim=256, attention_bias=False,
    tie_word_embeddings=True, hidden_activation="gelu_pytorch_tanh", query_pre_attn_scalar=256,
    sliding_window=4096, sliding_window_pattern=6, rope_theta=1e6, rope_local_base_freq=10000.0,
)  # fmt: skip
def gemma3(f: Fields) -> Genome:
    """Norms of queries and keys, five windows to one full attention, each with a base of RoPE."""
    period = f.whole("sliding_window_pattern")
    kinds = layers(f, WINDOWS, lambda i: "sliding" if (i + 1) % period else "full")
    f.known("_sliding_window_pattern")
    f.neutral("attn_logit_softcapping", None, what="a cap on scores")
    turns = {
        "sliding": rope(f, "sliding_attention", "rope_local_base_freq"),
        "full": rope(f, "full_attention"),
    }
    return _sandwich(f, kinds, {kind: {"qk_norm": True, **turns[kind]} for kind in kinds})


def _sandwich(f: Fields, kinds: list[str], genes: Mapping[str, Mapping[str, Gene]]) -> Genome:
    """The layers of Gemma 2 and 3: `genes` of a layer's kind, all slots between two norms."""
    # Files have a second name, which the library does not read.
    f.known("hidden_act")
    f.never("use_bidirectional_attention", why=LATER)
    f.neutral("final_logit_softcapping", None, what="a cap on logits")
    f.neutral("query_pre_attn_scalar", heads_of(f)[2], what="a factor of its own on scores")
    mixers = attentions(f, kinds, genes, bias=f.flag("attention_bias"))
    return f.genome(stack(mixers, mlp(f, act="hidden_activation")), placement="sandwich")
