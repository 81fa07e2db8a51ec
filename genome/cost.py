"""What a genome costs, per slot and whole, counted without making a tensor."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..primitives.base import Cost
from ..primitives.norm import norm_params
from ..primitives.position import LearnedPosition
from .genome import Genome
from .resolve import configs

DEFAULT_CONTEXT = 4096
"""Tokens; the context of STAR's cache objective (arXiv 2411.17800)."""


@dataclass(frozen=True)
class ModelCost:
    """Costs per slot (norms included), of the embedding with positions, of the head, and whole.

    Weights that several slots share count in the first of them and nowhere else; so do the bytes of
    shared keys and values. FLOPs count wherever the work is done.
    """

    slots: tuple[Cost, ...]
    embedding: Cost
    head: Cost

    @property
    def total(self) -> Cost:
        return sum(self.slots, self.embedding + self.head)


def cost(
    genome: Genome,
    context: int = DEFAULT_CONTEXT,
    dtype: torch.dtype = torch.bfloat16,
    vocab: int | None = None,
) -> ModelCost:
    """The cost at a context of so many tokens, with weights and activations in `dtype`.

    Raises GeneError with a sentence where the genome is invalid.
    """
    alphabet = genome.vocab if vocab is None else vocab
    norm = norm_params(genome.norm, genome.width)
    per_slot = 2 if genome.placement == "sandwich" else 1
    seen: set[str] = set()
    slots = []
    for slot, row in zip(genome.slots, configs(genome), strict=True):
        norms = per_slot
        if len(slot.branches) > 1 and slot.join == "norm":
            norms += len(slot.branches)
        total = Cost(norms * norm, norms * norm)
        for op, config in zip(slot.branches, row, strict=True):
            part = config.cost(context, dtype)
            if op.weights is not None and op.weights in seen:
                part = Cost(0, 0, part.flops_per_token, part.state_bytes)
            if op.weights is not None:
                seen.add(op.weights)
            total += part
        slots.append(total)
    table = alphabet * genome.width
    positions = LearnedPosition.params(genome.width) if genome.position == "learned" else 0
    final = 0 if genome.placement == "post" else norm
    untied = 0 if genome.tied else table
    return ModelCost(
        tuple(slots),
        Cost(table + positions, table + positions),
        Cost(untied + final, untied + final, 2.0 * table),
    )
