"""From a genome to a language model."""

from __future__ import annotations

from .genome import Genome
from .model import LanguageModel
from .resolve import blueprint


def build(genome: Genome, vocab: int | None = None) -> LanguageModel:
    """The genome's model with fresh weights from torch's global generator.

    Raises GeneError with a sentence where the genome is invalid.
    """
    return LanguageModel(blueprint(genome), vocab)
