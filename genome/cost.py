"""What a genome costs, per slot and whole, counted without making a tensor."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ..primitives.base import Config, Cost, own_params
from ..primitives.position import LearnedPosition
from .genome import Genome
from .residual import block_params, embedding_params, head_params, router_rows
from .resolve import configs
from .routing import passing

DEFAULT_CONTEXT = 4096
"""Tokens; the context of STAR's cache objective (arXiv 2411.17800)."""


@dataclass(frozen=True)
class ModelCost:
    """Costs per slot (norms and scalings included), of the embedding, of the head, and whole.

    Weights that several slots share count in the first of them and nowhere else, but for what each
    place has of its own; so do the bytes of shared keys and values. FLOPs count wherever the work
    is done. Of a slot that takes a share of the tokens they are those of its shorter sequence, per
    token of the whole one; its cache has room for all, because decoding bounds nothing, and its
    weights are active.
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
    seen: set[str] = set()
    known: dict[Config, Cost] = {}
    slots = []
    for slot, row in zip(genome.slots, configs(genome), strict=True):
        beside = block_params(genome, slot, row)
        inside = passing(slot.tokens, context) if slot.tokens != 1 else context
        share = inside / context
        gate, depth = (2.0 * genome.width * rows for rows in router_rows(genome, slot))
        total = Cost(beside, beside, depth + gate * share)
        for op, config in zip(slot.branches, row, strict=True):
            if config not in known:
                known[config] = config.cost(context, dtype)
            part = known[config]
            if inside != context:
                flops = config.cost(inside, dtype).flops_per_token * share
                part = replace(part, flops_per_token=flops)
            if op.weights is not None and op.weights in seen:
                own = own_params(config)
                part = Cost(own, own, part.flops_per_token, part.state_bytes)
            if op.weights is not None:
                seen.add(op.weights)
            total += part
        slots.append(total)
    table = alphabet * genome.width
    entry = table + embedding_params(genome)
    if genome.position == "learned":
        entry += LearnedPosition.params(genome.width)
    exit_ = (0 if genome.tied else table) + head_params(genome, alphabet)
    return ModelCost(
        tuple(slots),
        Cost(entry, entry),
        Cost(exit_, exit_, 2.0 * table),
    )
