"""Selective copying: tokens scattered among blanks are to be repeated in order at the end.

"Mechanistic Design and Scaling of Hybrid Architectures" (MAD, arXiv 2403.17844).
"""

from __future__ import annotations

import numpy as np
from pydantic import Field, ValidationInfo, field_validator

from .synthetic import Examples, FiniteTask, SyntheticSettings
from .task import IGNORE

NAME = "selective-copying"


class CopyingSettings(SyntheticSettings):
    """Settings of selective copying; the defaults are MAD's."""

    length: int = Field(default=256, ge=4, description="tokens of a sequence")
    num_tokens_to_copy: int = Field(
        default=16, ge=1, description="tokens to repeat", validate_default=True
    )

    @field_validator("num_tokens_to_copy")
    @classmethod
    def _room(cls, count: int, info: ValidationInfo) -> int:
        length = info.data.get("length")
        if length is not None and 2 * count + 2 > length:
            most = (length - 2) // 2
            raise ValueError(f"at length {length} it is at most {most}, not {count}")
        return count


def make_copying(settings: CopyingSettings, seed: int) -> FiniteTask:
    """Selective copying.

    A sequence is `num_tokens_to_copy` tokens, drawn uniformly with replacement from all but the
    last two of the alphabet, with length - 2 * num_tokens_to_copy - 1 blanks (the last token but
    one) inserted, each before a token drawn uniformly; then the copy token (the last of the
    alphabet) and as many blanks as there are tokens to copy. The targets are the tokens in order,
    at the final blanks, where each is predicted; there is no shift and no loss elsewhere.
    """
    copy, blank, tokens = settings.vocab - 1, settings.vocab - 2, settings.vocab - 2
    count = settings.num_tokens_to_copy
    blanks = settings.length - 2 * count - 1

    def draw(rng: np.random.Generator, n: int) -> Examples:
        wanted = rng.integers(0, tokens, (n, count))
        before = rng.integers(0, count, (n, blanks))
        rows = np.arange(n)[:, None]
        per_token = np.bincount((rows * count + before).ravel(), minlength=n * count)
        place = np.arange(count) + per_token.reshape(n, count).cumsum(axis=1)
        inputs = np.full((n, settings.length), blank, dtype=np.int64)
        inputs[rows, place] = wanted
        inputs[:, count + blanks] = copy
        targets = np.full_like(inputs, IGNORE)
        targets[:, -count:] = wanted
        return Examples(inputs, targets, targets)

    # The answers stand before the blanks that ask for them, and nowhere after.
    return FiniteTask(NAME, settings, seed, draw, answers=tokens, bidirectional=True)
