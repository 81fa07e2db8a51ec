"""What training a genome would cost: operations, tokens, hours of a device, memory.

A training step costs three forward passes: one forward, two for the gradients of inputs and weights
(Kaplan et al., arXiv 2001.08361, section 2.1: 6 N for 2 N forward). Forward passes are what
`cost.py` counts, attention at the context included, so for a dense model this is 6 FLOPs per
parameter and token, 12 * layers * width * (context + 1) / 2 for causal attention, and 6 * vocab *
width for the head. Tables that are only looked up cost nothing; the head's product is counted, and
`head_flops` is its part, because some publications leave it out (Bae et al., arXiv 2510.04800,
appendix C). Elementwise work is not counted, as everywhere. Reversible backbones compute the
slots, not the head, once more.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..primitives.base import training_flops
from .cost import DEFAULT_CONTEXT, cost
from .devices import Device
from .genome import Genome
from .resolve import configs
from .routing import passing

RATIO = 20.0
"""Tokens per parameter of compute-optimal training (Hoffmann et al., Chinchilla, arXiv 2203.15556:
1.4T tokens for 70B). Of experts the active parameters count."""

PASSES = 3
"""Forward passes that a step costs."""

UTILISATION = 0.4
"""The share of a device's peak that training reaches: 38 to 43 % for Llama 3 405B on H100s
(arXiv 2407.21783, table 4), 46 % for PaLM 540B (arXiv 2204.02311, table 3). New operators without
good kernels reach less."""

BYTES_PER_PARAMETER = 16
"""Mixed precision with AdamW: bf16 weights and gradients, float32 weights and two moments
(Rajbhandari et al., ZeRO, arXiv 1910.02054, section 3.1). Activations come on top."""


@dataclass(frozen=True)
class TrainingCost:
    """What a training run costs."""

    tokens: float
    ratio: float
    """Tokens per active parameter."""
    context: int
    """Tokens of a sequence."""
    flops_per_token: float
    """Forward and backward, on average over a sequence."""
    head_flops: float
    """The head's part of it."""
    memory: int
    """Bytes of weights, gradients and AdamW's state, without activations."""

    @property
    def flops(self) -> float:
        """Of the whole run."""
        return self.tokens * self.flops_per_token

    def seconds(self, device: Device, utilisation: float = UTILISATION) -> float:
        """Of one device that reaches that share of its peak."""
        return self.flops / (device.peak * utilisation)

    def fits(self, device: Device) -> bool:
        """Whether weights, gradients and AdamW's state fit in the memory of one."""
        return self.memory <= device.memory


def training_cost(
    genome: Genome,
    context: int = DEFAULT_CONTEXT,
    *,
    tokens: float | None = None,
    ratio: float = RATIO,
    vocab: int | None = None,
) -> TrainingCost:
    """The cost of training on `tokens`, or on `ratio` tokens per active parameter.

    Raises GeneError where the genome is invalid.
    """
    counted = cost(genome, context, torch.bfloat16, vocab)
    forward = counted.total.flops_per_token
    for slot, row in zip(genome.slots, configs(genome), strict=True):
        inside = passing(slot.tokens, context)
        for config in row:
            decoding = config.cost(inside, torch.bfloat16).flops_per_token
            forward += (training_flops(config, inside) - decoding) * inside / context
    again = forward - counted.head.flops_per_token if genome.residual == "reversible" else 0.0
    active = counted.total.active_params
    used = ratio * active if tokens is None else tokens
    return TrainingCost(
        used,
        used / active,
        context,
        PASSES * forward + again,
        PASSES * counted.head.flops_per_token,
        BYTES_PER_PARAMETER * counted.total.params,
    )
