"""The trainer's loss without stored logits: the same training, chosen by the number of logits."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from mendel.genome.build import build
from mendel.genome.genome import Genome, Op, Slot
from mendel.kernels.backend import used_backends
from mendel.proxies import train
from mendel.proxies.recipe import TrainConfig
from mendel.proxies.tasks import ProxyConfig, make_task
from mendel.proxies.train import Training

SLOTS = (Slot((Op("mha"),)), Slot((Op("swiglu"),)))
GENOMES = [
    Genome(16, SLOTS),
    Genome(16, SLOTS, tied=False),
    Genome(16, SLOTS, residual="ngpt", norm="none"),
    Genome(16, SLOTS, residual="reversible"),
]
TASK = ProxyConfig.model_validate(
    {"task": "in-context-recall", "steps": 1, "length": 16, "vocab": 8, "train_examples": 64}
)


def trained(genome: Genome, **recipe: object) -> Training:
    config = TrainConfig.model_validate({"lr": 0.01, **recipe})
    training = Training(genome, make_task(TASK, 0), config, steps=4, batch=8, seed=0)
    training.advance(4)
    return training


@pytest.mark.parametrize("genome", GENOMES, ids=["tied", "untied", "ngpt", "reversible"])
def test_training_is_the_same(genome: Genome, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four steps of the optimiser from the same weights: losses and weights to rounding."""
    with used_backends() as used:
        stored = trained(genome)
    assert "linear_cross_entropy" not in used
    monkeypatch.setattr(train, "MOST_LOGITS", 0)
    with used_backends() as used:
        free = trained(genome)
    assert used["linear_cross_entropy"] == {"chunked"}
    for one, other in zip(stored.curve, free.curve, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-5)
    right = dict(stored.model.named_parameters())
    for name, weight in free.model.named_parameters():
        assert (weight - right[name]).norm() <= 1e-3 * right[name].norm() + 1e-6, name


def test_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "MOST_LOGITS", 0)
    low = trained(GENOMES[0], dtype="bf16")
    monkeypatch.setattr(train, "MOST_LOGITS", 2**27)
    stored = trained(GENOMES[0], dtype="bf16")
    for one, other in zip(stored.curve, low.curve, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-2)


def test_the_loss_of_a_model() -> None:
    model = build(GENOMES[2], 11)
    tokens = torch.randint(0, 11, (2, 9))
    targets = tokens.roll(-1, 1)
    targets[:, -1] = -100
    logits = model(tokens)[0]
    want = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(model.loss(model.hidden(tokens), targets, -100), want)
