"""The generated tasks: what their sequences mean, how they are scored, what fixes them."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from mendel.proxies.synthetic import FiniteTask
from mendel.proxies.task import IGNORE, ProxyError, generator
from mendel.proxies.tasks import TASKS, ProxyConfig, find_task, make_task


def task(name: str, seed: int = 0, **settings: object) -> FiniteTask:
    small = {"train_examples": 300, "test_examples": 200}
    config = ProxyConfig.model_validate({"task": name, "steps": 1, **small, **settings})
    made = make_task(config, seed)
    assert isinstance(made, FiniteTask)
    return made


class Answers(nn.Module):
    """A model from a function of one sequence to one guess per position."""

    def __init__(self, vocab: int, guess: object) -> None:
        super().__init__()
        self.vocab, self.guess = vocab, guess

    def forward(self, tokens: Tensor) -> tuple[Tensor, None]:
        guesses = [self.guess(row) for row in tokens.tolist()]  # type: ignore[operator]
        return 50.0 * nn.functional.one_hot(torch.tensor(guesses), self.vocab).float(), None


def recall_oracle(row: list[int]) -> list[int]:
    """After each token, the token that followed its previous occurrence, else token 0."""
    followed: dict[int, int] = {}
    guesses = []
    for at, token in enumerate(row):
        guesses.append(followed.get(token, 0))
        if at + 1 < len(row):
            followed[token] = row[at + 1]
    return guesses


def copying_oracle(vocab: int) -> object:
    def guess(row: list[int]) -> list[int]:
        copy = row.index(vocab - 1)
        wanted = [t for t in row[:copy] if t != vocab - 2]
        return [0] * (copy + 1) + wanted

    return guess


class TestRecall:
    def test_defaults_are_mads(self) -> None:
        config = ProxyConfig.model_validate({"task": "in-context-recall", "steps": 1})
        assert config.settings.model_dump() == {
            "vocab": 16,
            "length": 128,
            "train_examples": 12_800,
            "test_examples": 1_280,
            "multi_query": True,
        }

    @pytest.mark.parametrize(("vocab", "length"), [(16, 128), (8, 10), (5, 12)])
    def test_sequences(self, vocab: int, length: int) -> None:
        made = task("in-context-recall", vocab=vocab, length=length)
        asked_anywhere = 0
        for inputs, targets in zip(made.test_inputs, made.test_targets, strict=True):
            assert len(inputs) == made.length == length - 1
            value_of: dict[int, int] = {}
            for at in range(0, length, 2):
                key = int(inputs[at])
                assert 0 <= key < vocab // 2
                repeated = key in value_of
                # The target at the key's position is the value that follows it.
                if repeated:
                    assert targets[at] == value_of[key]
                    asked_anywhere += 1
                else:
                    assert targets[at] == IGNORE
                if at + 1 < length - 1:
                    value = int(inputs[at + 1])
                    assert vocab // 2 <= value < vocab
                    assert value_of.setdefault(key, value) == value
                    assert targets[at + 1] == IGNORE
            assert targets[-1] != IGNORE
        assert asked_anywhere == (made.test_targets != IGNORE).sum()

    def test_training_targets_are_the_next_tokens_everywhere(self) -> None:
        made = task("in-context-recall")
        assert (made.train_targets[:, :-1] == made.train_inputs[:, 1:]).all()
        assert (made.train_targets >= 0).all()

    def test_one_question_only(self) -> None:
        made = task("in-context-recall", multi_query=False, length=20)
        assert made.length == 20
        for inputs, targets in zip(made.test_inputs, made.test_targets, strict=True):
            assert (targets[:-1] == IGNORE).all()
            assert inputs[-2] == 15
            assert (inputs[:-2] < 15).all()
            pairs = dict(zip(inputs[:-2:2].tolist(), inputs[1:-2:2].tolist(), strict=True))
            assert pairs[int(inputs[-1])] == targets[-1]
            assert max(pairs) < 7 <= min(pairs.values())

    def test_draws_are_uniform(self) -> None:
        made = task("in-context-recall", train_examples=4_000, length=8)
        keys = Counter(made.train_inputs[:, 0:6:2].ravel().tolist())
        # Three drawn keys of 4,000 sequences: 1,500 each, standard deviation 36.
        assert all(abs(keys[k] - 1_500) < 180 for k in range(8))
        values = Counter(made.train_inputs[:, 1].tolist())
        assert all(abs(values[v] - 500) < 105 for v in range(8, 16))
        # The last key is uniform over the distinct keys: with keys a, a, b it is a half the time.
        first, second, third, last = made.train_inputs[:, ::2].T
        doubled = (first == second) & (second != third)
        share = (last[doubled] == first[doubled]).mean()
        assert abs(share - 0.5) < 5 * 0.5 / math.sqrt(doubled.sum())

    def test_oracle_and_chance(self) -> None:
        made = task("in-context-recall")
        perfect = made.evaluate(Answers(16, recall_oracle), 64)
        assert perfect["score"] == perfect["accuracy"] == perfect["accuracy_macro"] == 1.0
        assert perfect["loss"] < 1e-6
        rng = generator(7, "guess")
        guesser = Answers(16, lambda row: rng.integers(8, 16, len(row)).tolist())
        asked = int((made.test_targets != IGNORE).sum())
        chance = made.evaluate(guesser, 64)["score"]
        assert made.chance == 1 / 8
        assert abs(chance - made.chance) < 5 * math.sqrt(1 / 8 * 7 / 8 / asked)

    def test_uniform_logits_lose_log_vocab(self) -> None:
        made = task("in-context-recall")
        flat = Answers(16, lambda row: row)
        flat.forward = lambda t: (torch.zeros(*t.shape, 16), None)  # type: ignore[method-assign]
        assert made.evaluate(flat, 33)["loss"] == pytest.approx(math.log(16), rel=1e-6)

    def test_only_repeated_keys_count(self) -> None:
        """Wrong guesses everywhere but at the values of repeated keys change nothing."""
        made = task("in-context-recall", length=32)

        def only(row: list[int]) -> list[int]:
            right = recall_oracle(row)
            return [right[i] if i % 2 == 0 and row[i] in row[:i:2] else 0 for i in range(len(row))]

        assert made.evaluate(Answers(16, only), 64)["score"] == 1.0


class TestCopying:
    def test_defaults_are_mads(self) -> None:
        config = ProxyConfig.model_validate({"task": "selective-copying", "steps": 1})
        assert config.settings.model_dump() == {
            "vocab": 16,
            "length": 256,
            "train_examples": 12_800,
            "test_examples": 1_280,
            "num_tokens_to_copy": 16,
        }

    @pytest.mark.parametrize(
        ("vocab", "length", "count"), [(16, 256, 16), (5, 20, 9), (8, 40, 4), (6, 24, 11)]
    )
    def test_sequences(self, vocab: int, length: int, count: int) -> None:
        made = task("selective-copying", vocab=vocab, length=length, num_tokens_to_copy=count)
        for inputs, targets in zip(made.test_inputs, made.test_targets, strict=True):
            row = inputs.tolist()
            copy = row.index(vocab - 1)
            assert len(row) == length == copy + 1 + count
            assert row[copy + 1 :] == [vocab - 2] * count
            wanted = [t for t in row[:copy] if t != vocab - 2]
            assert len(wanted) == count
            assert row[copy - 1] == wanted[-1]
            assert targets.tolist() == [IGNORE] * (copy + 1) + wanted
        assert (made.test_inputs[:, : length - count - 1] < vocab - 1).all()

    def test_training_is_on_the_copied_tokens(self) -> None:
        made = task("selective-copying")
        assert ((made.train_targets != IGNORE).sum(axis=1) == 16).all()
        assert (made.train_targets[:, :-16] == IGNORE).all()

    def test_blanks_are_inserted_uniformly(self) -> None:
        made = task("selective-copying", length=12, num_tokens_to_copy=3, train_examples=3_000)
        gaps = np.zeros(3, dtype=int)
        for row in made.train_inputs[:, :8]:
            place = np.flatnonzero(row != 14)
            gaps += np.diff(np.concatenate([[-1], place])) - 1
        # 5 blanks of 3,000 sequences over 3 gaps: 5,000 each, standard deviation 58.
        assert (abs(gaps - 5_000) < 290).all()

    def test_oracle_and_chance(self) -> None:
        made = task("selective-copying")
        perfect = made.evaluate(Answers(16, copying_oracle(16)), 64)
        assert perfect["score"] == perfect["accuracy_macro"] == 1.0
        assert made.chance == 1 / 14
        constant = made.evaluate(Answers(16, lambda row: [3] * len(row)), 64)
        asked = int((made.test_targets != IGNORE).sum())
        assert abs(constant["accuracy"] - 1 / 14) < 5 * math.sqrt(1 / 14 / asked)
        # Always one class: that class is always right and the 13 others never.
        assert constant["accuracy_macro"] == pytest.approx(1 / 14)


NAMES = ["in-context-recall", "selective-copying"]


class TestBoth:
    def test_accuracy_is_per_token_and_macro_per_class(self) -> None:
        """A model that is right for one value only, weighed by hand."""
        made = task("in-context-recall", length=16)
        model = Answers(16, lambda row: [9] * len(row))
        asked = made.test_targets[made.test_targets != IGNORE]
        metrics = made.evaluate(model, 32)
        assert metrics["accuracy"] == pytest.approx((asked == 9).mean())
        assert metrics["accuracy_macro"] == pytest.approx(1 / len(set(asked.tolist())))

    @pytest.mark.parametrize("name", NAMES)
    def test_seeds_fix_everything_and_global_generators_nothing(self, name: str) -> None:
        np.random.seed(0)
        one = task(name, seed=3)
        np.random.seed(1)
        torch.manual_seed(5)
        two, other = task(name, seed=3), task(name, seed=4)
        for array in ("train_inputs", "train_targets", "test_inputs", "test_targets"):
            assert (getattr(one, array) == getattr(two, array)).all()
        assert (one.train_inputs != other.train_inputs).any()
        assert torch.equal(one.train_batch(7, 64).inputs, two.train_batch(7, 64).inputs)
        assert one.describe() == two.describe() != other.describe()

    @pytest.mark.parametrize("name", NAMES)
    def test_no_test_sequence_is_trained_on(self, name: str) -> None:
        small = {"in-context-recall": {"vocab": 4, "length": 8}}.get(
            name, {"vocab": 4, "length": 10, "num_tokens_to_copy": 3}
        )
        made = task(name, train_examples=40, test_examples=20, **small)
        train = {tuple(row) for row in made.train_inputs.tolist()}
        test = [tuple(row) for row in made.test_inputs.tolist()]
        assert len(train) < 40, "the settings are meant to draw sequences twice"
        assert not train.intersection(test)
        assert len(set(test)) == 20

    def test_too_few_distinct_sequences(self) -> None:
        with pytest.raises(ProxyError, match="too few distinct sequences for 200 test") as error:
            task("in-context-recall", vocab=4, length=4)
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize("name", NAMES)
    def test_epochs_show_each_example_once_in_new_order(self, name: str) -> None:
        made = task(name, train_examples=60)
        rows = [tuple(r) for s in range(6) for r in made.train_batch(s, 25).inputs.tolist()]
        everything = Counter(tuple(row) for row in made.train_inputs.tolist())
        assert Counter(rows[:60]) == Counter(rows[60:120]) == everything
        assert rows[:60] != rows[60:120]
        # A pure function of the step: any order of the calls, a batch larger than the set.
        assert [tuple(r) for r in made.train_batch(0, 150).inputs.tolist()] == rows
        assert [tuple(r) for r in made.train_batch(1, 25).inputs.tolist()] == rows[25:50]

    @pytest.mark.parametrize("name", NAMES)
    def test_batches(self, name: str) -> None:
        made = task(name)
        batch = made.train_batch(0, 5)
        assert batch.inputs.shape == batch.targets.shape == (5, made.length)
        assert batch.inputs.dtype == batch.targets.dtype == torch.int64
        model = Answers(16, lambda row: row).train()
        assert made.evaluate(model, 7) == made.evaluate(model, 200)
        assert model.training


class TestTable:
    def test_rows(self) -> None:
        assert list(TASKS) == ["in-context-recall", "selective-copying", "byte-text", "masked-text"]
        for name, row in TASKS.items():
            assert row.name == name
            assert row.summary
            assert row.source
            assert row.score
            assert all(f.description for f in row.settings.model_fields.values())
        assert find_task("byte-text") is TASKS["byte-text"]
        with pytest.raises(ProxyError, match="no task is named 'recal'; there are in-context"):
            find_task("recal")

    def test_flat_round_trip(self) -> None:
        flat = {"task": "in-context-recall", "steps": 5, "batch": 8, "length": 64}
        config = ProxyConfig.model_validate(flat)
        assert config.model_dump().items() >= flat.items()
        assert "settings" not in config.model_dump()
        assert ProxyConfig.model_validate(config.model_dump()) == config

    @pytest.mark.parametrize(
        ("wrong", "place", "words"),
        [
            ({"task": "recal"}, ("task",), "there are in-context-recall"),
            ({"task": ["a"]}, ("task",), "string"),
            ({"task": "byte-text", "steps": 0}, ("steps",), "greater than or equal to 1"),
            ({"task": "byte-text", "lenght": 64}, ("lenght",), "not permitted"),
            ({"task": "byte-text", "settings": {}}, ("settings",), "not permitted"),
            ({"task": "in-context-recall", "length": "x"}, ("length",), "integer"),
            ({"task": "in-context-recall", "length": 7}, ("length",), "even"),
            (
                {"task": "selective-copying", "length": 33},
                ("num_tokens_to_copy",),
                "at length 33 it is at most 15, not 16",
            ),
        ],
    )
    def test_errors_name_the_key(
        self, wrong: dict[str, object], place: tuple[str, ...], words: str
    ) -> None:
        with pytest.raises(ValidationError, match=words) as error:
            ProxyConfig.model_validate({"steps": 5, **wrong})
        assert error.value.errors()[0]["loc"] == place
