"""The trainer: schedule, learning, divergence, deadline, resuming, the grid of learning rates."""

from __future__ import annotations

import itertools
import json
import math
import os
import pickle
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import nn

from mendel.genome.genome import Genome, Op, Slot
from mendel.proxies import checkpoint
from mendel.proxies.recipe import TrainConfig, learning_rate, make_optimizer, resolve_dtype
from mendel.proxies.synthetic import Examples, FiniteTask, SyntheticSettings
from mendel.proxies.task import ProxyError
from mendel.proxies.tasks import ProxyConfig, make_task
from mendel.proxies.train import DIVERGED_STEPS, Diverged, TimeLimit, Training


def genome(*names: str, width: int = 16, **choices: Any) -> Genome:
    return Genome(width, tuple(Slot((Op(name),)) for name in names), **choices)


SMALL = genome("mha", "swiglu")
UNTIED = genome("mha", position="learned", tied=False)
SHARED = Genome(
    16,
    (
        Slot((Op("mingru", weights="a"),)),
        Slot((Op("moe"),)),
        Slot((Op("mingru", weights="a"), Op("mha")), join="norm"),
    ),
)
"""Tied tables, a shared operator, an expert balance kept in buffers, parallel branches."""


def recall(seed: int = 0, **settings: object) -> FiniteTask:
    flat = {"length": 16, "vocab": 8, "train_examples": 64, "test_examples": 32, **settings}
    config = ProxyConfig.model_validate({"task": "in-context-recall", "steps": 1, **flat})
    task = make_task(config, seed)
    assert isinstance(task, FiniteTask)
    return task


def successor() -> FiniteTask:
    """A trivial task: each token is the one before plus one."""

    def draw(rng: np.random.Generator, n: int) -> Examples:
        rows = (rng.integers(0, 12, (n, 1)) + np.arange(9)) % 12
        rows = np.concatenate([rng.integers(0, 12, (n, 3)), rows], axis=1)
        targets = np.where(np.arange(11) >= 3, rows[:, 1:], -100)
        return Examples(rows[:, :-1], targets, targets)

    settings = SyntheticSettings(vocab=12, length=12, train_examples=512, test_examples=64)
    return FiniteTask("successor", settings, 0, draw, answers=12)


def training(
    which: Genome = SMALL,
    steps: int = 12,
    seed: int = 0,
    task: FiniteTask | None = None,
    **train: Any,
) -> Training:
    return Training(which, task or recall(), TrainConfig(**train), steps, 4, seed)


def weights(run: Training) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in run.model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def without_time(curve: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in record.items() if k != "seconds"} for record in curve]


class TestRecipe:
    def test_schedule(self) -> None:
        config = TrainConfig(lr=1.0, min_lr=0.1, warmup=0.2)
        rates = [learning_rate(config, 1.0, step, 11) for step in range(11)]
        assert rates[:2] == [0.5, 1.0]
        assert rates[2] == 1.0
        assert rates[6] == pytest.approx(0.55)
        assert rates[4] == pytest.approx(0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2)
        assert rates[10] == pytest.approx(0.1)
        assert all(a >= b for a, b in itertools.pairwise(rates[2:]))

    @pytest.mark.parametrize("steps", [1, 2, 3])
    @pytest.mark.parametrize("warmup", [0.0, 0.5, 0.9])
    def test_schedule_of_few_steps(self, steps: int, warmup: float) -> None:
        config = TrainConfig(lr=1e-3, warmup=warmup)
        for step in range(steps):
            assert 0 < learning_rate(config, 1e-3, step, steps) <= 1e-3

    def test_the_schedule_reaches_the_optimiser(self) -> None:
        """The pitfall of a scheduler that is never stepped: the rates in use are looked at."""
        run = training(steps=10, lr=0.01, min_lr=0.001, warmup=0.2)
        used = []
        assert run._run is not None
        for step in range(1, 11):
            run.advance(step)
            used.append(run._run.optimizer.param_groups[0]["lr"])
        assert used == [learning_rate(run.train, 0.01, step, 10) for step in range(10)]
        assert [r["lr"] for r in run.curve] == used

    def test_decay_is_on_matrices_only(self) -> None:
        config = TrainConfig(weight_decay=0.5)
        model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3), nn.LayerNorm(3))
        optimizer = make_optimizer(model.parameters(), config)
        decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
        assert len(decay) == 5
        for parameter in model.parameters():
            assert decay[id(parameter)] == (0.5 if parameter.ndim >= 2 else 0.0)

    @pytest.mark.parametrize(
        ("wrong", "words"),
        [
            ({"lr": -1.0}, "above 0"),
            ({"lr": []}, "above 0"),
            ({"lr": [1e-3, 1e-3]}, "twice"),
            ({"lr": 1e-7}, r"min_lr \(1e-06\) is above lr \(1e-07\)"),
            ({"learning_rate": 1.0}, "not permitted"),
            ({"betas": [0.9, 1.0]}, "below 1"),
            ({"dtype": "fp16"}, "'auto', 'fp32' or 'bf16'"),
            ({"warmup": 1.0}, "less than 1"),
        ],
    )
    def test_mistakes(self, wrong: dict[str, Any], words: str) -> None:
        with pytest.raises(ValidationError, match=words):
            TrainConfig.model_validate(wrong)

    def test_dtype(self, monkeypatch: pytest.MonkeyPatch) -> None:
        cpu = torch.device("cpu")
        assert resolve_dtype("auto", cpu) == resolve_dtype("fp32", cpu) == torch.float32
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
        assert resolve_dtype("bf16", cpu) == torch.bfloat16
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
        with pytest.raises(ProxyError, match="cpu has no native bf16; use fp32 or auto"):
            resolve_dtype("bf16", cpu)


class TestLearning:
    def test_a_trivial_task(self) -> None:
        run = training(genome("mingru", "swiglu"), 120, task=successor(), lr=0.02)
        run.batch = 16
        assert run.evaluate()["score"] < 0.4
        run.advance(120)
        assert run.evaluate()["score"] > 0.97
        assert run.curve[-1]["eval"]["loss"] < 0.3

    def test_one_step_by_hand(self) -> None:
        """Cross-entropy over the batch's targets, clipped, decayed AdamW at the step's rate."""
        task = recall()
        run = training(task=task, steps=1, lr=0.01, min_lr=0.01, clip=0.05, weight_decay=0.3)
        start = weights(run)
        batch = task.train_batch(0, 4)
        logits = run.model(batch.inputs)[0]
        picked = logits.log_softmax(-1).gather(-1, batch.targets[..., None])
        loss = -picked.mean()
        names, params = zip(*run.model.named_parameters(), strict=True)
        grads = torch.autograd.grad(loss, params)
        norm = math.sqrt(sum(float(g.square().sum()) for g in grads))
        assert norm > 0.05, "the clip is meant to act"
        run.advance(1)
        assert run.curve[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)
        after = weights(run)
        for name, grad in zip(names, grads, strict=True):
            clipped = grad * 0.05 / norm
            # The first AdamW step: both moments are bias-corrected to the gradient itself.
            update = clipped / (clipped.abs() + 1e-8)
            decay = 0.3 if grad.ndim >= 2 else 0.0
            wanted = start[name] * (1 - 0.01 * decay) - 0.01 * update
            moved = clipped.abs() > 1e-6
            torch.testing.assert_close(after[name][moved], wanted[moved], rtol=1e-4, atol=1e-5)

    def test_weights_follow_the_seed_and_nothing_else(self) -> None:
        torch.manual_seed(1)
        one = weights(training(seed=3))
        torch.manual_seed(2)
        state = torch.get_rng_state()
        two = weights(training(seed=3))
        assert torch.equal(state, torch.get_rng_state()), "the caller's generator is left alone"
        assert same(one, two)
        assert not same(one, weights(training(seed=4)))

    def test_curve(self) -> None:
        run = training(steps=250, eval_every=100)
        steps: list[int] = []
        run.advance(130, on_step=steps.append)
        assert steps == list(range(1, 131))
        run.advance(1_000)
        losses = [r for r in run.curve if "loss" in r]
        evaluations = [r for r in run.curve if "eval" in r]
        assert [r["step"] for r in losses] == list(range(2, 251, 2))
        assert [r["step"] for r in evaluations] == [100, 200]
        assert losses[-1]["tokens"] == 250 * 4 * 15 == run.tokens
        assert losses[-1]["lr"] == pytest.approx(1e-6)
        seconds = [r["seconds"] for r in run.curve]
        assert seconds == sorted(seconds)
        assert seconds[-1] <= run.seconds
        assert set(evaluations[0]["eval"]) == {"score", "accuracy", "accuracy_macro", "loss"}
        json.dumps(run.curve, allow_nan=False)

    def test_bf16(self) -> None:
        try:
            run = training(steps=3, dtype="bf16")
        except ProxyError:
            pytest.skip("this CPU has no native bf16")
        run.advance(3)
        assert all(p.dtype == torch.float32 for p in run.model.parameters())
        full = training(steps=3)
        full.advance(3)
        assert run.curve[-1]["loss"] != full.curve[-1]["loss"]
        assert run.curve[-1]["loss"] == pytest.approx(full.curve[-1]["loss"], abs=0.1)


class TestFailures:
    def test_divergence(self) -> None:
        run = training(steps=300, lr=1e6, clip=1e9)
        with pytest.raises(Diverged, match="diverged at step") as error:
            run.advance(300)
        assert 2 <= error.value.step <= 100
        assert not error.value.loss < 3 * math.log(8)
        assert run.step >= error.value.step

    def test_a_high_loss_must_last(self) -> None:
        run = training(steps=100)
        inner = run._run
        assert inner is not None
        run.advance(1)
        for loss in [100.0] * (DIVERGED_STEPS - 1) + [1.0] + [100.0] * (DIVERGED_STEPS - 1):
            inner._unread.append(torch.tensor(loss))
            inner._read()
        inner._unread.append(torch.tensor(100.0))
        with pytest.raises(Diverged, match="loss 100"):
            inner._read()

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_a_loss_that_is_not_finite(self, bad: float) -> None:
        run = training(steps=4)
        run.advance(1)
        with torch.no_grad():
            run.model.embedding.weight.fill_(bad)
        with pytest.raises(Diverged) as error:
            run.advance(4)
        assert error.value.step == 2
        with pytest.raises(Diverged):
            run.evaluate()

    @pytest.mark.parametrize("error", [Diverged(3, math.inf), TimeLimit(5)])
    def test_errors_reach_another_process_whole(self, error: Exception) -> None:
        copied = pickle.loads(pickle.dumps(error))
        assert type(copied) is type(error)
        assert str(copied) == str(error)
        assert vars(copied) == vars(error)

    def test_deadline(self) -> None:
        run = training(steps=6)
        with pytest.raises(TimeLimit, match="out of time at step 0"):
            run.advance(6, deadline=time.monotonic() - 1)

        def tired(step: int) -> None:
            if step == 3:
                time.sleep(max(0.0, limit - time.monotonic()))

        limit = time.monotonic() + 1
        with pytest.raises(TimeLimit) as error:
            run.advance(6, limit, tired)
        assert error.value.step == run.step <= 3
        # The training can go on, and ends where it would have ended.
        run.advance(6)
        whole = training(steps=6)
        whole.advance(6)
        assert same(weights(run), weights(whole))


class TestResume:
    @pytest.mark.parametrize(
        "which", [SMALL, SHARED, genome("mha", position="learned", tied=False)]
    )
    def test_bit_equal(self, which: Genome, tmp_path: Path) -> None:
        whole = training(which, eval_every=5)
        whole.advance(12)
        broken = training(which, eval_every=5)
        for stop in (0, 1, 7, 7, 12):
            broken.advance(stop)
            path = broken.save(tmp_path)
            assert path == tmp_path / checkpoint.FILE
            torch.manual_seed(stop)
            broken = Training.load(tmp_path, which, recall(), broken.train, 12, 4, 0)
            assert broken.step == stop
        assert same(weights(whole), weights(broken))
        assert whole.evaluate() == broken.evaluate()
        assert without_time(whole.curve) == without_time(broken.curve)
        assert os.listdir(tmp_path) == [checkpoint.FILE]

    def test_rungs_are_a_prefix(self) -> None:
        whole, rungs = training(), training()
        whole.advance(12)
        for stop in (3, 4, 12):
            rungs.advance(stop)
            rungs.evaluate()
        assert same(weights(whole), weights(rungs))

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"which": genome("gqa", "swiglu")}, r'genome.slots\[0\].branches\[0\].name is "mha"'),
            ({"task": recall(seed=1)}, "task.seed is 0 there and 1 here"),
            ({"task": recall(length=18)}, "task.length is 16 there and 18 here"),
            ({"lr": 0.004}, "train.lr is 0.003 there and 0.004 here"),
            ({"steps": 13}, "steps is 12 there and 13 here"),
            ({"seed": 5}, "seed is 0 there and 5 here"),
        ],
    )
    def test_another_training_is_refused(
        self, change: dict[str, Any], words: str, tmp_path: Path
    ) -> None:
        run = training()
        run.advance(2)
        run.save(tmp_path)
        other = training(**change)
        with pytest.raises(ProxyError, match=words) as error:
            Training.load(
                tmp_path, other.genome, other.task, other.train, other.steps, 4, other.seed
            )
        assert "\n" not in str(error.value)

    def test_damage(self, tmp_path: Path) -> None:
        run = training()

        def load() -> Training:
            return Training.load(tmp_path, SMALL, recall(), run.train, 12, 4, 0)

        with pytest.raises(ProxyError, match="holds no checkpoint"):
            load()
        path = run.save(tmp_path)
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(ProxyError, match="is not readable"):
            load()
        checkpoint.write(tmp_path, {}, {"identity": run.identity(), "lr": 0.003})
        with pytest.raises(ProxyError, match="does not fit this model") as error:
            load()
        assert "\n" not in str(error.value)

    def test_a_failed_write_leaves_the_old_one(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run = training()
        old = run.save(tmp_path).read_bytes()
        run.advance(3)

        def full(*_: object) -> None:
            raise OSError("no space left")

        monkeypatch.setattr(checkpoint.os, "replace", full)
        with pytest.raises(OSError, match="no space"):
            run.save(tmp_path)
        assert (tmp_path / checkpoint.FILE).read_bytes() == old
        assert os.listdir(tmp_path) == [checkpoint.FILE]


class TestGrid:
    def test_the_best_goes_on_as_if_alone(self, tmp_path: Path) -> None:
        rates = [1e-5, 1e-2, 1e-4]
        run = training(steps=20, task=successor(), lr=rates, grid=0.3)
        with pytest.raises(ProxyError, match="has not chosen its learning rate"):
            run.save(tmp_path)
        run.advance(2)
        assert run.step == 6, "a grid is trained for its whole part"
        assert run.lr == 1e-2
        assert [row["lr"] for row in run.grid] == rates
        assert [row["chosen"] for row in run.grid] == [False, True, False]
        best = min(run.grid, key=lambda row: row["loss"])
        assert best["chosen"]
        run.save(tmp_path)
        run = Training.load(tmp_path, SMALL, successor(), run.train, 20, 4, 0)
        run.advance(20)
        assert run.spent_steps == 20 + 2 * 6
        assert run.tokens == 32 * 4 * 11
        assert run.statistics()["grid"] == run.grid
        alone = training(steps=20, task=successor(), lr=1e-2)
        alone.advance(20)
        assert same(weights(run), weights(alone))

    def test_loss_is_of_the_last_quarter(self) -> None:
        run = training(steps=20, lr=[1e-3, 1e-2], grid=0.4)
        run.advance(1)
        alone = training(steps=20, lr=1e-3)
        alone.advance(8)
        last = [record["loss"] for record in alone.curve][-2:]
        assert run.grid[0]["loss"] == sum(last) / 2

    def test_a_rate_that_diverges_is_out(self) -> None:
        run = training(steps=80, lr=[1e6, 1e-3], clip=1e9, grid=1.0)
        run.advance(80)
        assert run.lr == 1e-3
        assert run.grid[0]["loss"] is None
        assert run.grid[0]["steps"] < 80
        assert run.spent_steps == 80 + run.grid[0]["steps"]
        none = training(steps=80, lr=[1e6, 1e7], clip=1e9, grid=1.0)
        with pytest.raises(Diverged):
            none.advance(80)
