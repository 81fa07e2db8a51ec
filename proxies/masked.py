"""Masked bytes: some bytes of a text are hidden and predicted from both sides.

The masked language modelling of BERT (Devlin et al., arXiv 1810.04805, section 3.1), on bytes.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn

from .corpus import Corpus, read_corpus
from .task import IGNORE, Batch, evaluating, generator
from .text import VOCAB as BYTES
from .text import TextSettings, TextTask, byte_metrics

NAME = "masked-text"
MASK = BYTES
"""The token that stands for a hidden byte."""
VOCAB = BYTES + 1
MASKED, RANDOM = 0.8, 0.1
"""Of the chosen positions so many show the mask and so many a random byte; the rest shows its own
byte, so that a model cannot rely on what it sees there."""

Tokens = NDArray[np.int64]


class MaskedSettings(TextSettings):
    """Settings of masked bytes."""

    share: float = Field(
        default=0.15, gt=0, le=1, description="part of the positions that are to be predicted"
    )


class MaskedTextTask(TextTask):
    """The hidden bytes of a text. `score` is 1 - bits per chosen byte / 8, at least 0.

    Text, parts and windows are those of `byte-text`. In every window round(share * length)
    positions, at least one, are chosen; of them 80 % show the mask (token 256), 10 % a byte drawn
    uniformly, 10 % their own byte. Loss and score are at the chosen positions alone, each predicted
    where it stands. The training windows' choice is drawn by the generator of the step, that of the
    held-out windows is fixed, whatever the seed.
    """

    _more = 0

    def __init__(self, settings: MaskedSettings, seed: int, corpus: Corpus) -> None:
        super().__init__(settings, seed, corpus)
        self._count = max(1, round(settings.share * settings.length))
        hidden = self._hide(generator(0, NAME, "test"), self.test_windows)
        self.test_inputs, self.test_targets = hidden

    @property
    def name(self) -> str:
        return NAME

    @property
    def vocab(self) -> int:
        return VOCAB

    @property
    def bidirectional(self) -> bool:
        return True

    def train_batch(self, step: int, batch: int) -> Batch:
        """`batch` windows that begin at uniform places of the training part, with hidden bytes."""
        rng = generator(self._seed, NAME, "windows", step)
        inputs, targets = self._hide(rng, self._draw(rng, batch))
        return Batch(torch.from_numpy(inputs), torch.from_numpy(targets))

    def _hide(self, rng: np.random.Generator, windows: Tokens) -> tuple[Tokens, Tokens]:
        """Inputs with hidden bytes, and targets at the chosen positions; windows (n, T)."""
        order = rng.random(windows.shape).argsort(axis=1)
        chosen = order < self._count
        how = rng.random(windows.shape)
        inputs = np.where(chosen & (how < MASKED), MASK, windows)
        other = chosen & (how >= MASKED) & (how < MASKED + RANDOM)
        inputs = np.where(other, rng.integers(0, BYTES, windows.shape), inputs)
        return inputs, np.where(chosen, windows, IGNORE)

    def evaluate(
        self, model: nn.Module, batch: int, device: torch.device | str = "cpu"
    ) -> dict[str, float]:
        """`score`, `bits_per_byte`, `loss` (nats per chosen byte, in float32), `accuracy`, all over
        the chosen positions of the held-out windows."""
        loss = torch.zeros((), dtype=torch.float64, device=device)
        hits = torch.zeros((), dtype=torch.int64, device=device)
        with evaluating(model):
            for at in range(0, len(self.test_inputs), batch):
                inputs = torch.from_numpy(self.test_inputs[at : at + batch]).to(device)
                targets = torch.from_numpy(self.test_targets[at : at + batch]).to(device)
                output: Tensor = model(inputs)[0]
                asked = targets != IGNORE
                logits, wanted = output[asked].float(), targets[asked]
                loss += F.cross_entropy(logits, wanted, reduction="sum")
                hits += (logits.argmax(-1) == wanted).sum()
        count = int((self.test_targets != IGNORE).sum())
        return byte_metrics(float(loss) / count, int(hits) / count)


def make_masked(settings: MaskedSettings, seed: int) -> MaskedTextTask:
    """Masked bytes of the text that the settings name."""
    corpus = read_corpus(
        settings.text,
        text_field=settings.text_field,
        split=settings.split,
        max_bytes=settings.max_bytes,
    )
    return MaskedTextTask(settings, seed, corpus)
