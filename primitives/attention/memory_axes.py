"""Axes and points of attention with a memory beyond its segment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from ..base import Axis, Gene, GeneError, Point
from ..genes import choice, number, only, whole
from .compressive import CompressedSegments, CompressiveConfig
from .layer import AttentionConfig
from .pattern_axes import REMEMBERING
from .patterns import Chunk, Pattern
from .segments import SegmentConfig, Segments
from .slots import MemformerConfig

MEMORY_AXES = (
    Axis(
        "segment",
        16,
        "transformer-xl, compressive, memformer: tokens of a segment, at whose end the memory moves"
        " on; linformer: tokens of a block, which see one another exactly",
        low=1.0,
        high=65536.0,
        search=(16, 32),
    ),
    Axis(
        "memory",
        16,
        "transformer-xl, compressive: tokens before its segment that a token sees, without"
        " gradients into them",
        low=0.0,
        high=1e6,
        search=(16, 64),
    ),
    Axis(
        "compressed",
        16,
        "compressive: compressed memories that a token sees before its memory",
        low=1.0,
        high=1e6,
    ),
    Axis("compression_rate", 4, "compressive: tokens that become one", low=2.0, high=65536.0),
    Axis(
        "compression",
        "conv",
        "compressive: how they become one; conv learns from attention reconstruction, which adds to"
        " the training loss",
        options=("conv", "mean", "max"),
    ),
    Axis("slots", 8, "memformer: slots of the memory", low=1.0, high=65536.0, search=(8, 16)),
    Axis(
        "slot_temperature",
        0.5,
        "memformer: temperature of the softmax that writes slots; below 1 sharpens",
        low=1e-3,
        high=1e3,
    ),
)

MEMORY_POINTS = (
    Point(
        "transformer-xl",
        {"pattern": "transformer-xl", "position": "xl"},
        "Dai et al., arXiv 1901.02860",
        "The state holds keys and values where the paper keeps inputs and projects them again.",
    ),
    Point(
        "compressive",
        {"pattern": "compressive", "position": "xl"},
        "Rae et al., arXiv 1911.05507",
        "Memories begin empty, not as zeros.",
    ),
    Point(
        "memformer",
        {"pattern": "memformer"},
        "Wu et al., arXiv 2010.06891",
        "Every layer has its own slots, and a segment is causal, where the paper's encoder has one"
        " memory after its last layer.",
    ),
)


def memory_pattern(genes: Mapping[str, Gene]) -> Pattern | None:
    """What a token sees of the tokens themselves; None for patterns without such a memory."""
    name = choice(genes, "pattern")
    if name not in REMEMBERING:
        return None
    # A convolution would read the inputs of earlier segments.
    only(genes, "pattern", {"conv": 0, "causal": True})
    segment, memory = whole(genes, "segment"), whole(genes, "memory")
    if name == "memformer":
        return Chunk(segment)
    if name == "transformer-xl":
        return Segments(segment, memory)
    rate = whole(genes, "compression_rate")
    if segment % rate:
        raise GeneError(f"compression_rate={rate} does not divide segment={segment}")
    if memory == 0 or memory % segment:
        raise GeneError(
            f"pattern=compressive compresses whole segments that leave its memory: memory={memory}"
            f" is no multiple of segment={segment}"
        )
    return CompressedSegments(segment, memory, whole(genes, "compressed"), rate)


def with_memory(plain: AttentionConfig, genes: Mapping[str, Gene]) -> AttentionConfig:
    """The config of a form with a memory, from plain attention with `memory_pattern`'s."""
    name = choice(genes, "pattern")
    if plain.borrows:
        raise GeneError(f"pattern={name} keeps a memory of its own: it borrows no keys and values")
    same: dict[str, Any] = {field.name: getattr(plain, field.name) for field in fields(plain)}
    if name == "transformer-xl":
        return SegmentConfig(**same)
    # nGPT's paper has neither slots nor compressed memories: their keys stay as they are.
    same["normalised"] = False
    if name == "memformer":
        if plain.width % plain.heads:
            raise GeneError(
                f"pattern=memformer writes slots of the model's width by heads: heads={plain.heads}"
                f" does not divide the width {plain.width}"
            )
        temperature = number(genes, "slot_temperature")
        return MemformerConfig(**same, slots=whole(genes, "slots"), temperature=temperature)
    return CompressiveConfig(**same, compression=choice(genes, "compression"))
