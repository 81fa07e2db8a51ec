"""What every proxy task agrees on: batches, the task protocol, seeds, evaluation."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ..genome.genome import Genome
from ..genome.resolve import acausal

IGNORE = -100
"""A target that carries no loss and no score; torch's default `ignore_index`."""

LEAKS = "next-token tasks such as {task} would leak (masked-text takes it)"
"""The end of the sentence about a design that reads later tokens."""


class ProxyError(ValueError):
    """A setting, a corpus or a checkpoint that is refused. The message is one line."""


@dataclass(frozen=True)
class Batch:
    """`inputs` and `targets` are (B, T) int64; a target stands at the position that predicts it."""

    inputs: Tensor
    targets: Tensor


class Task(Protocol):
    """Seeded data, a loss by its targets, and a score. Immutable: one task serves many trainings.

    `length` is T, the tokens that a model reads per sequence. `chance` is the score of a model that
    guesses uniformly. `bidirectional` says that a genome which reads later tokens can train on it:
    what a position is to predict is not among the inputs after it.
    """

    @property
    def name(self) -> str: ...
    @property
    def vocab(self) -> int: ...
    @property
    def length(self) -> int: ...
    @property
    def chance(self) -> float: ...
    @property
    def bidirectional(self) -> bool: ...

    def train_batch(self, step: int, batch: int) -> Batch:
        """The batch of that step: a pure function of the task's seed, the step and the size."""
        ...

    def evaluate(
        self, model: nn.Module, batch: int, device: torch.device | str = "cpu"
    ) -> dict[str, float]:
        """Metrics on held-out data: `score` in 0..1, higher is better, and others beside it."""
        ...

    def describe(self) -> dict[str, Any]:
        """Everything that decides the data, as JSON: name, settings, seed, fingerprints."""
        ...


def leak(genome: Genome, task: str, bidirectional: bool) -> str | None:
    """Why the genome cannot train on the task of that name, as a sentence; None where it can.

    Raises GeneError where an operator cannot be built.
    """
    words = None if bidirectional else acausal(genome)
    return None if words is None else f"{words}; {LEAKS.format(task=task)}"


def generator(seed: int, *stream: int | str) -> np.random.Generator:
    """A generator of its own for each stream of a seed; numpy's global state is never used.

    PCG64 is named rather than left to `default_rng`, whose choice numpy may change.
    """
    words = [
        part
        if isinstance(part, int)
        else int.from_bytes(hashlib.sha256(part.encode()).digest()[:4], "little")
        for part in stream
    ]
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, *words])))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode and without gradients; its mode is restored afterwards."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
