"""Tasks on a finite set of generated examples: the shared part of MAD's token-manipulation tasks.

From "Mechanistic Design and Scaling of Hybrid Architectures" (MAD, arXiv 2403.17844). Three
pitfalls of the public code are avoided here:

* Its accuracy is torchmetrics' default, the mean over classes of each class' accuracy ("macro").
  Here `accuracy`, which is the score, is per scored token; the macro mean stands beside it as
  `accuracy_macro`. They differ where the targets' classes are not equally frequent.
* Its cosine schedule is handed to the trainer under a key that the trainer ignores, so the
  published runs have a constant learning rate. `recipe.py` applies its schedule in every step.
* Selective copying draws from numpy's global generator. Here each split of each seed has a
  generator of its own.

No test sequence occurs among the training sequences, and none occurs twice: test draws that do are
drawn again, and a task whose settings leave too few distinct sequences is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from .task import IGNORE, Batch, ProxyError, evaluating, generator

Tokens = NDArray[np.int64]

_REDRAWS = 50


class SyntheticSettings(BaseModel):
    """What the generated tasks share. Defaults are MAD's."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    vocab: int = Field(
        default=16, ge=4, description="size of the alphabet, special tokens included"
    )
    length: int = Field(default=128, ge=4, description="tokens of a sequence")
    train_examples: int = Field(
        default=12_800, ge=1, description="training sequences, seen in epochs"
    )
    test_examples: int = Field(default=1_280, ge=1, description="held-out sequences")


@dataclass(frozen=True)
class Examples:
    """n sequences: `inputs`, `targets` of the loss, and `scored`, the targets that count.

    All are (n, T) int64, with `IGNORE` where nothing is to be predicted.
    """

    inputs: Tokens
    targets: Tokens
    scored: Tokens


Draw = Callable[[np.random.Generator, int], Examples]


class FiniteTask:
    """A task on `train_examples` fixed sequences, reshuffled each epoch, and as fixed a test set.

    `draw(generator, n)` makes n examples. Raises ProxyError where the settings do not have enough
    distinct sequences for a test set that is disjoint from the training set.
    """

    def __init__(
        self,
        name: str,
        settings: SyntheticSettings,
        seed: int,
        draw: Draw,
        answers: int,
        bidirectional: bool = False,
    ) -> None:
        self._name = name
        self._settings = settings
        self._seed = seed
        self._chance = 1.0 / answers
        self._bidirectional = bidirectional
        train = draw(generator(seed, name, "train"), settings.train_examples)
        self.train_inputs, self.train_targets = train.inputs, train.targets
        test = _disjoint(name, draw, generator(seed, name, "test"), settings.test_examples, train)
        self.test_inputs, self.test_targets = test.inputs, test.scored
        self._epochs: dict[int, NDArray[np.int64]] = {}

    @property
    def name(self) -> str:
        return self._name

    @property
    def vocab(self) -> int:
        return self._settings.vocab

    @property
    def length(self) -> int:
        return int(self.train_inputs.shape[1])

    @property
    def chance(self) -> float:
        """The score of a uniform guess among the tokens that can be an answer."""
        return self._chance

    @property
    def bidirectional(self) -> bool:
        return self._bidirectional

    def describe(self) -> dict[str, Any]:
        return {"task": self._name, "seed": self._seed, **self._settings.model_dump()}

    def _order(self, epoch: int) -> NDArray[np.int64]:
        """The epoch's order of the training examples."""
        order = self._epochs.get(epoch)
        if order is None:
            rng = generator(self._seed, self._name, "order", epoch)
            order = rng.permutation(len(self.train_inputs))
            if len(self._epochs) > 1:
                self._epochs.clear()
            self._epochs[epoch] = order
        return order

    def train_batch(self, step: int, batch: int) -> Batch:
        """Examples step * batch onwards of an endless series of shuffled epochs."""
        size = len(self.train_inputs)
        at, end = step * batch, (step + 1) * batch
        parts = []
        while at < end:
            epoch, offset = divmod(at, size)
            part = self._order(epoch)[offset : offset + end - at]
            parts.append(part)
            at += len(part)
        rows = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return Batch(
            torch.from_numpy(self.train_inputs[rows]), torch.from_numpy(self.train_targets[rows])
        )

    def evaluate(
        self, model: nn.Module, batch: int, device: torch.device | str = "cpu"
    ) -> dict[str, float]:
        """`score` = `accuracy` (per scored token), `accuracy_macro` (mean of the accuracies of the
        classes that occur), `loss` (nats per scored token, in float32)."""
        counts = torch.zeros(self.vocab, dtype=torch.int64, device=device)
        hits = torch.zeros_like(counts)
        loss = torch.zeros((), dtype=torch.float64, device=device)
        with evaluating(model):
            for at in range(0, len(self.test_inputs), batch):
                inputs = torch.from_numpy(self.test_inputs[at : at + batch]).to(device)
                targets = torch.from_numpy(self.test_targets[at : at + batch]).to(device)
                logits: Tensor = model(inputs)[0]
                asked = targets != IGNORE
                answers, guesses = targets[asked], logits[asked].float()
                loss += F.cross_entropy(guesses, answers, reduction="sum")
                right = answers[guesses.argmax(-1) == answers]
                counts += torch.bincount(answers, minlength=self.vocab)
                hits += torch.bincount(right, minlength=self.vocab)
        total = int(counts.sum())
        occurs = counts > 0
        accuracy = int(hits.sum()) / total
        return {
            "score": accuracy,
            "accuracy": accuracy,
            "accuracy_macro": float((hits[occurs].double() / counts[occurs]).mean()),
            "loss": float(loss) / total,
        }


def _disjoint(
    name: str, draw: Draw, rng: np.random.Generator, wanted: int, train: Examples
) -> Examples:
    """`wanted` examples whose inputs differ from all training inputs and from each other."""
    seen = {row.tobytes() for row in train.inputs}
    parts: list[Examples] = []
    found = 0
    for _ in range(_REDRAWS):
        drawn = draw(rng, wanted)
        rows: list[int] = []
        for i, row in enumerate(drawn.inputs):
            key = row.tobytes()
            if key not in seen and found + len(rows) < wanted:
                seen.add(key)
                rows.append(i)
        parts.append(Examples(drawn.inputs[rows], drawn.targets[rows], drawn.scored[rows]))
        found += len(rows)
        if found == wanted:
            return Examples(
                np.concatenate([p.inputs for p in parts]),
                np.concatenate([p.targets for p in parts]),
                np.concatenate([p.scored for p in parts]),
            )
    raise ProxyError(
        f"{name}: these settings have too few distinct sequences for {wanted} test examples that "
        f"are not among the {len(train.inputs)} training examples; raise vocab or length, or lower "
        "train_examples or test_examples"
    )
