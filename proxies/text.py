"""Byte-level language modelling: the next byte of real text, judged in bits per byte."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from .corpus import Corpus, join, read_corpus
from .task import Batch, ProxyError, evaluating, generator

NAME = "byte-text"
VOCAB = 256
HELD_OUT = 0.1
"""The part of the text that is held out where documents are too few to choose from."""
DOCUMENT_SHARE = 0.05
"""The chance of a document to be held out where there are many."""
MANY_DOCUMENTS = 100


class TextSettings(BaseModel):
    """Settings of byte-level language modelling."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    length: int = Field(default=256, ge=2, description="bytes that a model reads per sequence")
    text: str | None = Field(
        default=None,
        description="a file, folder, glob or data set on disk (txt, md, jsonl, parquet, arrow, "
        "source code); absent: the source text of Python's standard library",
    )
    text_field: str = Field(
        default="text", description="the field of jsonl, parquet and arrow rows"
    )
    split: str = Field(
        default="train", description="the split of a data set on disk that has several"
    )
    max_bytes: int = Field(
        default=8_000_000, ge=1_000, description="bytes read, in sorted order of paths"
    )
    test_bytes: int = Field(default=65_536, ge=1, description="held-out bytes scored, about")


class TextTask:
    """Next byte of a text. `score` is 1 - bits per byte / 8, at least 0: 0 is a uniform guess.

    Training windows begin anywhere in the training part and may span documents, which end in a zero
    byte; the windows of a step are drawn by a generator of that step. The held-out part is a
    twentieth of the documents, chosen by a hash of their content so that copies fall on one side,
    where there are at least 100 and that leaves 1 to 20 % of the bytes; otherwise it is the last
    tenth of the bytes. It is scored on fixed windows, spread evenly over it, that do not overlap;
    each starts without context.
    """

    _more = 1
    """Bytes of a window beyond those that a model reads."""

    def __init__(self, settings: TextSettings, seed: int, corpus: Corpus) -> None:
        self._settings = settings
        self._seed = seed
        self.corpus_fingerprint = corpus.fingerprint()
        self.train_text, self.test_text, self.held_out = split_corpus(corpus)
        window = settings.length + self._more
        need = "length + 1" if self._more else "length"
        for part, name in ((self.train_text, "training"), (self.test_text, "held-out")):
            if len(part) < window:
                raise ProxyError(
                    f"text {corpus.source}: its {name} part has {len(part)} bytes, fewer than "
                    f"{need} = {window}; give a longer text or a smaller length"
                )
        fits = len(self.test_text) // window
        windows = min(fits, math.ceil(settings.test_bytes / settings.length))
        starts = np.arange(windows) * fits // windows * window
        self.test_windows = _windows(self.test_text, starts, window)

    @property
    def name(self) -> str:
        return NAME

    @property
    def vocab(self) -> int:
        return VOCAB

    @property
    def length(self) -> int:
        return self._settings.length

    @property
    def chance(self) -> float:
        return 0.0

    @property
    def bidirectional(self) -> bool:
        return False

    def describe(self) -> dict[str, Any]:
        return {
            "task": self.name,
            "seed": self._seed,
            **self._settings.model_dump(),
            "corpus_fingerprint": self.corpus_fingerprint,
            "held_out": self.held_out,
        }

    def train_batch(self, step: int, batch: int) -> Batch:
        """`batch` windows that begin at uniform places of the training part."""
        rng = generator(self._seed, NAME, "windows", step)
        windows = torch.from_numpy(self._draw(rng, batch))
        return Batch(windows[:, :-1], windows[:, 1:])

    def _draw(self, rng: np.random.Generator, batch: int) -> NDArray[np.int64]:
        """Windows from uniform places of the training part."""
        window = self.length + self._more
        starts = rng.integers(0, len(self.train_text) - window + 1, batch)
        return _windows(self.train_text, starts, window)

    def evaluate(
        self, model: nn.Module, batch: int, device: torch.device | str = "cpu"
    ) -> dict[str, float]:
        """`score`, `bits_per_byte`, `loss` (nats per byte, in float32), `accuracy`, all over the
        held-out windows."""
        loss = torch.zeros((), dtype=torch.float64, device=device)
        hits = torch.zeros((), dtype=torch.int64, device=device)
        with evaluating(model):
            for at in range(0, len(self.test_windows), batch):
                windows = torch.from_numpy(self.test_windows[at : at + batch]).to(device)
                targets = windows[:, 1:].flatten()
                output: Tensor = model(windows[:, :-1])[0]
                logits = output.flatten(0, 1).float()
                loss += F.cross_entropy(logits, targets, reduction="sum")
                hits += (logits.argmax(-1) == targets).sum()
        count = self.test_windows[:, 1:].size
        return byte_metrics(float(loss) / count, int(hits) / count)


def byte_metrics(nats: float, accuracy: float) -> dict[str, float]:
    """The metrics of a task on bytes from the loss per scored byte and the share that was right."""
    bits = nats / math.log(2)
    return {
        # Written so that nan stays nan.
        "score": 0.0 if bits > 8 else 1 - bits / 8,
        "bits_per_byte": bits,
        "loss": nats,
        "accuracy": accuracy,
    }


def split_corpus(corpus: Corpus) -> tuple[NDArray[np.uint8], NDArray[np.uint8], str]:
    """Training part, held-out part, and how they were parted, in words."""
    if len(corpus.documents) >= MANY_DOCUMENTS:
        train: list[bytes] = []
        test: list[bytes] = []
        for document in corpus.documents:
            number = int.from_bytes(hashlib.sha256(document).digest()[:8], "big")
            (test if number < DOCUMENT_SHARE * 2**64 else train).append(document)
        share = sum(len(d) + 1 for d in test) / corpus.bytes
        if 0.01 <= share <= 0.2:
            how = f"{len(test)} of {len(corpus.documents)} documents, by content hash"
            return join(train), join(test), how
    whole = join(list(corpus.documents))
    cut = len(whole) - int(len(whole) * HELD_OUT)
    return whole[:cut], whole[cut:], f"the last {HELD_OUT:.0%} of the bytes"


def _windows(text: NDArray[np.uint8], starts: NDArray[np.int64], window: int) -> NDArray[np.int64]:
    """Windows of the text, (len(starts), window)."""
    found: NDArray[np.int64] = text[starts[:, None] + np.arange(window)].astype(np.int64)
    return found


def make_text(settings: TextSettings, seed: int) -> TextTask:
    """Byte-level language modelling on the text that the settings name."""
    corpus = read_corpus(
        settings.text,
        text_field=settings.text_field,
        split=settings.split,
        max_bytes=settings.max_bytes,
    )
    return TextTask(settings, seed, corpus)
