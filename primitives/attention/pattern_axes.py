"""The axes of attention's patterns that positions decide, and the patterns that they name."""

from __future__ import annotations

from collections.abc import Mapping

from ..base import Axis, Gene, GeneError, Point
from ..genes import choice, flag, number, only, whole
from .bigbird import Blocks
from .patterns import Chunk, Pattern, Span, Summaries, Window, per_head

PATTERNS = (
    "full",
    "sliding",
    "global",
    "dilated",
    "chunked",
    "strided",
    "fixed",
    "bigbird",
    "multi-scale",
    "adaptive-span",
)
"""Those that positions alone decide."""

REMEMBERING = ("transformer-xl", "compressive", "memformer")
"""Those with a memory beyond the segment, see memory_axes.py."""

BY_DATA = ("lsh", "routing", "sparsek", "native-sparse")
"""Those that the data decide, see chosen_axes.py."""

LOW_RANK = ("linformer", "nystrom", "synthesizer-dense", "synthesizer-random")
"""Those whose weights have a low rank or are made without keys, see low_rank_axes.py."""

BOTH_WAYS = ("full", "sliding", "global", "bigbird", "multi-scale")
"""Those that can also read later tokens."""

BY_HEAD = ("strided", "fixed", "multi-scale")
"""Those that differ from head to head."""

PATTERN_AXES = (
    Axis(
        "pattern",
        "full",
        "which earlier tokens a token sees: all; a sliding window; a window and global tokens; a"
        " dilated window; its own chunk; Sparse Transformer's strided or fixed pattern, one half of"
        " the key-value heads local, the other reading far; BigBird's blocks; windows that double"
        " from head to head; a window whose span is learned; a segment and a memory of earlier ones"
        " (transformer-xl, compressive, memformer); all, by landmarks (linformer, nystrom) or with"
        " weights that no key makes (synthesizer-dense, synthesizer-random); what shares its"
        " hashed bucket (lsh) or its cluster (routing); a window and the best by a learned score"
        " (sparsek), or compressed and selected blocks (native-sparse)",
        options=(*PATTERNS, *REMEMBERING, *BY_DATA, *LOW_RANK),
        search=("full", "sliding", "dilated", "chunked", "fixed", "bigbird", "multi-scale"),
    ),
    Axis(
        "window",
        128,
        "tokens that a local pattern sees, the token itself included (causal=false: as many to"
        " either side); the longest of multi-scale and adaptive-span; the length of a chunk",
        low=1.0,
        search=(32, 64, 128, 256),
    ),
    Axis(
        "sinks",
        0,
        "sliding: initial tokens that every later one sees (StreamingLLM, arXiv 2309.17453; here"
        " with their positions in the text, not in the cache)",
        low=0.0,
        high=65536.0,
        search=(0, 4),
    ),
    Axis(
        "globals",
        1,
        "global, bigbird: initial tokens that every token sees (causal=false: and that see every"
        " token); bigbird rounds up to whole blocks",
        low=1.0,
        high=65536.0,
    ),
    Axis("dilation", 2, "dilated: the distance from one token that is seen to the next", low=1.0),
    Axis("stride", 64, "strided, fixed: the stride, near the root of the context", low=1.0),
    Axis("summary", 8, "fixed: tokens at the end of each stride that all later ones see", low=1.0),
    Axis("block", 16, "bigbird, native-sparse: tokens in a block", low=1.0, high=65536.0),
    Axis("random", 3, "bigbird: blocks drawn at random for each block", low=0.0, high=65536.0),
    Axis("pattern_seed", 0, "bigbird: what the random blocks are drawn by", low=0.0),
    Axis("ramp", 32, "adaptive-span: tokens over which the soft mask falls", low=1.0),
    Axis("span_penalty", 2e-6, "adaptive-span: weight of the mean span in the loss", low=0.0),
    Axis(
        "causal",
        True,
        "false: every token sees later ones too; not for language models",
        options=(True, False),
    ),
)

PATTERN_POINTS = (
    Point("swa", {"pattern": "sliding"}, "Longformer 2004.05150; Mistral 2310.06825"),
    Point(
        "streaming-llm",
        {"pattern": "sliding", "sinks": 4},
        "Xiao et al., arXiv 2309.17453",
        "The positions of RoPE are those in the text; the paper's are those in the cache.",
    ),
    Point(
        "longformer",
        {"pattern": "global", "window": 257, "causal": False},
        "Beltagy et al., arXiv 2004.05150",
        "Global tokens have projections of their own. The causal form (pattern=global) has none:"
        " the first tokens see no later one, so that only the others' view of them is left, which"
        " is a sliding window with sinks.",
    ),
    Point(
        "dilated-attention", {"pattern": "dilated"}, "Beltagy et al., arXiv 2004.05150, figure 2c"
    ),
    Point(
        "bigbird",
        {"pattern": "bigbird", "window": 128, "block": 64, "globals": 64},
        "Zaheer et al., arXiv 2007.14062",
        "The causal form sees earlier blocks only, and no last block is global. The random blocks"
        " are the same for all heads.",
    ),
    Point(
        "sparse-transformer",
        {"pattern": "strided"},
        "Child et al., arXiv 1904.10509",
        "Of the paper's ways to join the two factors that of one head per factor; pattern=fixed for"
        " the other pair of factors.",
    ),
    Point(
        "chunked-attention",
        {"pattern": "chunked"},
        "Meta, Llama 4 (2025), local layers; Child et al., arXiv 1904.10509",
    ),
    Point(
        "multi-scale-attention",
        {"pattern": "multi-scale"},
        "Guo et al., arXiv 1912.00544; Xu et al., arXiv 2501.01039",
    ),
    Point("adaptive-span", {"pattern": "adaptive-span"}, "Sukhbaatar et al., arXiv 1905.07799"),
)


def pattern_of(genes: Mapping[str, Gene], kv_heads: int, position: str) -> Pattern:
    """The pattern that the genes name, or GeneError with a sentence."""
    name, window, causal = choice(genes, "pattern"), whole(genes, "window"), flag(genes, "causal")
    if not causal:
        _both_ways(genes, name, position)
    if name in BY_HEAD:
        _by_head(genes, name, kv_heads, position)
    if name == "full":
        return Window(causal=causal)
    if name == "sliding":
        return Window(window, whole(genes, "sinks"), causal=causal)
    if name == "global":
        return Window(window, whole(genes, "globals"), causal=causal)
    if name == "dilated":
        return Window(window, dilation=whole(genes, "dilation"))
    if name == "chunked":
        return Chunk(window)
    if name == "multi-scale":
        # Each head's window is twice that of the one before it.
        windows = (max(1, window >> (kv_heads - 1 - head)) for head in range(kv_heads))
        return per_head(Window(w, causal=causal) for w in windows)
    if name == "adaptive-span":
        return Window(window, span=Span(whole(genes, "ramp"), number(genes, "span_penalty")))
    if name == "bigbird":
        size = whole(genes, "block")
        near, first = -(-window // size), -(-whole(genes, "globals") // size)
        drawn, seed = whole(genes, "random"), whole(genes, "pattern_seed")
        return Blocks(size, near, first, drawn, seed, causal)
    return _factors(genes, name, kv_heads)


def _factors(genes: Mapping[str, Gene], name: str, kv_heads: int) -> Pattern:
    """The two patterns of Sparse Transformer (arXiv 1904.10509, 4.2), a half of the heads each."""
    stride, summary = whole(genes, "stride"), whole(genes, "summary")
    if name == "strided":
        # The paper's window begins l tokens before the query's own.
        factors: tuple[Window, Window] | tuple[Chunk, Summaries]
        factors = Window(stride + 1), Window(dilation=stride)
    else:
        if summary > stride:
            raise GeneError(
                f"summary={summary} is more than the stride {stride} that it is part of"
            )
        factors = Chunk(stride), Summaries(stride, summary)
    half = kv_heads // 2
    return per_head((factors[0],) * half + (factors[1],) * half)


def _by_head(genes: Mapping[str, Gene], name: str, kv_heads: int, position: str) -> None:
    """What needs all heads to see the same tokens, or both factors their heads."""
    if name != "multi-scale" and kv_heads % 2:
        raise GeneError(
            f"pattern={name} has one pattern for each half of the key-value heads, and kv_heads="
            f"{kv_heads} is odd"
        )
    only(genes, "pattern", {"talking_heads": False})
    if choice(genes, "score") == "differential":
        raise GeneError(
            f"pattern={name} does not go with score=differential: the heads of a pair would see"
            " different tokens"
        )
    if position == "xl":
        raise GeneError(f"pattern={name} does not go with position=xl")


def _both_ways(genes: Mapping[str, Gene], name: str, position: str) -> None:
    """What reads later tokens has no cache, no convolution and no biases of earlier tokens only."""
    if name not in BOTH_WAYS:
        raise GeneError(
            f"pattern={name} reads earlier tokens only; causal=false goes with "
            + ", ".join(BOTH_WAYS)
        )
    only(genes, "causal", {"conv": 0})
    if position in ("alibi", "t5", "xl"):
        raise GeneError(f"position={position} has biases of earlier tokens only: causal=true")
