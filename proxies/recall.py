"""In-context recall: key-value pairs, and the value of a key that was seen before.

"Mechanistic Design and Scaling of Hybrid Architectures" (MAD, arXiv 2403.17844).
"""

from __future__ import annotations

import numpy as np
from pydantic import Field, field_validator

from .synthetic import Examples, FiniteTask, SyntheticSettings
from .task import IGNORE

NAME = "in-context-recall"


class RecallSettings(SyntheticSettings):
    """Settings of in-context recall; the defaults are MAD's."""

    multi_query: bool = Field(
        default=True,
        description="every repeated key asks; otherwise only the last one, after a prefix",
    )

    @field_validator("length")
    @classmethod
    def _even(cls, length: int) -> int:
        if length % 2:
            raise ValueError(f"length is even (pairs of key and value), not {length}")
        return length


def make_recall(settings: RecallSettings, seed: int) -> FiniteTask:
    """In-context recall.

    A sequence is length / 2 pairs. Keys are the lower half of the alphabet, values the upper half.
    Each pair's key is drawn uniformly with replacement; a key's value is drawn uniformly when the
    key first appears and stays for that sequence. The last key is drawn uniformly from the distinct
    keys of the sequence, so at least one question is asked. With `multi_query=False` the last token
    of the alphabet is a prefix that announces the last pair, and only that pair is asked.

    Training: next-token loss at every position, random keys included, whose loss cannot fall below
    ln(keys). Score: accuracy on the values of repeated keys only. A model reads `length - 1` tokens
    (`length` without `multi_query`), because the last value is only a target.
    """
    ordinary = settings.vocab if settings.multi_query else settings.vocab - 1
    keys, values = ordinary // 2, ordinary - ordinary // 2

    def draw(rng: np.random.Generator, n: int) -> Examples:
        pairs = settings.length // 2
        sequence = np.empty((n, settings.length), dtype=np.int64)
        asked = np.zeros((n, settings.length), dtype=bool)
        rows = np.arange(n)

        drawn = rng.integers(0, keys, (n, pairs - 1))
        # Drawing a value for every key beforehand has the same distribution as at first sight.
        value_of = keys + rng.integers(0, values, (n, keys))
        seen = np.zeros((n, keys), dtype=bool)
        for i in range(pairs - 1):
            key = drawn[:, i]
            sequence[:, 2 * i] = key
            sequence[:, 2 * i + 1] = value_of[rows, key]
            if settings.multi_query:
                asked[:, 2 * i + 1] = seen[rows, key]
            seen[rows, key] = True
        # The place of the largest of independent uniforms is uniform over the seen keys.
        last = np.where(seen, rng.random((n, keys)), -1.0).argmax(axis=1)
        sequence[:, -2], sequence[:, -1] = last, value_of[rows, last]
        asked[:, -1] = True
        if not settings.multi_query:
            prefix = np.full((n, 1), settings.vocab - 1)
            sequence = np.concatenate([sequence[:, :-2], prefix, sequence[:, -2:]], axis=1)
            asked = np.concatenate([asked[:, :-2], np.zeros((n, 1), bool), asked[:, -2:]], axis=1)
        scored = np.where(asked, sequence, IGNORE)
        return Examples(sequence[:, :-1], sequence[:, 1:], scored[:, 1:])

    return FiniteTask(NAME, settings, seed, draw, answers=values)
