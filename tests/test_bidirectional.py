"""Designs that read later tokens: what trains on them, what refuses them, the masked-text task."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from command_line import caller
from torch import Tensor, nn

from mendel.genome.build import build
from mendel.genome.cost import cost
from mendel.genome.notation import parse
from mendel.genome.resolve import acausal, is_causal
from mendel.primitives.base import BidirectionalError
from mendel.proxies.masked import MASK, MaskedSettings, MaskedTextTask, make_masked
from mendel.proxies.recipe import TrainConfig
from mendel.proxies.task import IGNORE, ProxyError
from mendel.proxies.tasks import TASKS, ProxyConfig, make_task
from mendel.proxies.train import Training
from mendel.search.measure import measure
from mendel.search.objectives import goals
from mendel.search.study import Study, StudyError, load_study

BOTH_WAYS = "mha > [bilstm | mamba2] > swiglu"
WORDS = "slot 1, branch 0: bilstm reads later tokens"


@pytest.fixture
def book(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    path = tmp_path / "book.txt"
    path.write_text(" ".join(rng.choice(["alpha", "beta", "gamma", "delta"], 4_000)))
    return path


def task(book: Path, seed: int = 0, **settings: Any) -> MaskedTextTask:
    return make_masked(MaskedSettings(text=str(book), **settings), seed)


def test_a_genome_is_causal_where_every_operator_is() -> None:
    assert is_causal(parse("mha > mamba2"))
    assert acausal(parse("mha > mamba2")) is None
    assert not is_causal(parse(BOTH_WAYS))
    assert acausal(parse(BOTH_WAYS)) == WORDS
    given = parse("swiglu > mha > longformer(causal=false)")
    assert acausal(given) == "slot 2: longformer with causal=false reads later tokens"


def test_no_state_and_nothing_to_cache() -> None:
    genome = parse(f"{{width=32}} {BOTH_WAYS}")
    with pytest.raises(BidirectionalError) as caught:
        build(genome).init_state(1, 8)
    assert str(caught.value) == f"{WORDS}, so the model has no state and decodes nothing"
    causal = parse("{width=32} mha > mamba2 > swiglu")
    assert cost(genome, 64).total.state_bytes == cost(causal, 64).total.state_bytes


class TestMaskedText:
    def test_positions_are_hidden_as_in_bert(self, book: Path) -> None:
        made = task(book, length=40)
        text = bytes(made.train_text)
        seen = {"mask": 0, "own": 0, "other": 0}
        for step in range(60):
            batch = made.train_batch(step, 16)
            asked = batch.targets != IGNORE
            assert (asked.sum(1) == 6).all()
            whole = torch.where(asked, batch.targets, batch.inputs)
            assert all(bytes(row) in text for row in whole.tolist())
            assert whole.max() < MASK
            shown, own = batch.inputs[asked], batch.targets[asked]
            seen["mask"] += int((shown == MASK).sum())
            seen["own"] += int((shown == own).sum())
            seen["other"] += int(((shown != MASK) & (shown != own)).sum())
        total = 60 * 16 * 6
        assert sum(seen.values()) == total
        # 80, 10 and 10 %; a random byte is the own one in 1 of 256. Four standard deviations.
        for name, share in (("mask", 0.8), ("own", 0.1 + 0.1 / 256), ("other", 0.1 * 255 / 256)):
            spread = 4 * math.sqrt(share * (1 - share) / total)
            assert seen[name] / total == pytest.approx(share, abs=spread), name

    def test_every_position_is_asked_in_turn(self, book: Path) -> None:
        made = task(book, length=12)
        asked = [(made.train_batch(s, 64).targets != IGNORE).sum(0) for s in range(20)]
        assert (torch.stack(asked).sum(0) > 0.5 * 64 * 20 * 2 / 12).all()

    @pytest.mark.parametrize(("length", "share", "count"), [(2, 0.15, 1), (20, 0.5, 10), (9, 1, 9)])
    def test_how_many(self, book: Path, length: int, share: float, count: int) -> None:
        made = task(book, length=length, share=share)
        assert ((made.train_batch(0, 8).targets != IGNORE).sum(1) == count).all()
        assert ((made.test_targets != IGNORE).sum(1) == count).all()

    def test_seed(self, book: Path) -> None:
        one, two, other = task(book), task(book), task(book, seed=1)
        a, b = one.train_batch(5, 4), two.train_batch(5, 4)
        assert torch.equal(a.inputs, b.inputs)
        assert torch.equal(a.targets, b.targets)
        assert not torch.equal(a.inputs, one.train_batch(6, 4).inputs)
        assert not torch.equal(a.inputs, other.train_batch(5, 4).inputs)
        assert (one.test_inputs == other.test_inputs).all()
        assert (one.test_targets == other.test_targets).all()

    def test_windows_are_apart(self, book: Path) -> None:
        made = task(book, length=32, test_bytes=640)
        assert made.test_windows.shape == (20, 32)
        starts = [bytes(made.test_text).index(bytes(r.astype(np.uint8))) for r in made.test_windows]
        assert all(a != b for a, b in itertools.pairwise(starts))

    def test_score_is_at_the_hidden_bytes_alone(self, book: Path) -> None:
        made = task(book, length=64)

        class Knows(nn.Module):
            """Gives its guess the chance `p`, right where it sees the byte, 0 elsewhere."""

            def __init__(self, p: float) -> None:
                super().__init__()
                self.logit = math.log(p * 256 / (1 - p))

            def forward(self, tokens: Tensor) -> tuple[Tensor, None]:
                guess = nn.functional.one_hot(torch.where(tokens == MASK, 0, tokens), 257)
                return guess * self.logit, None

        even = made.evaluate(Knows(1 / 257), 7)
        assert even["loss"] == pytest.approx(math.log(257), rel=1e-6)
        assert even["score"] == 0
        metrics = made.evaluate(Knows(0.9), 7)
        wanted, shown = made.test_targets, made.test_inputs
        right = (shown == wanted)[wanted != IGNORE]
        nats = -np.where(right, math.log(0.9), math.log(0.1 / 256)).mean()
        assert metrics["loss"] == pytest.approx(nats, rel=1e-5)
        assert metrics["bits_per_byte"] == pytest.approx(nats / math.log(2), rel=1e-5)
        assert metrics["accuracy"] == pytest.approx(right.mean())

    def test_description_names_the_task_and_the_text(self, book: Path) -> None:
        found = task(book, share=0.3).describe()
        assert (found["task"], found["share"], found["length"]) == ("masked-text", 0.3, 256)
        assert found["corpus_fingerprint"]["bytes"] == book.stat().st_size + 1

    def test_a_text_that_is_too_short(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_text("x" * 100)
        with pytest.raises(ProxyError, match=r"has 10 bytes, fewer than length = 64"):
            task(tmp_path / "a.txt", length=64)


@pytest.mark.parametrize("slots", ["mha > swiglu", "bilstm > swiglu", "fnet > [bimamba | mha]"])
def test_masked_text_is_learned_from_one_side_and_from_both(book: Path, slots: str) -> None:
    made = task(book, length=32, test_bytes=2_000)
    genome = parse(f"{{width=32}} {slots}")
    training = Training(genome, made, TrainConfig(lr=0.01), steps=60, batch=16, seed=0)
    before = build(genome, made.vocab)
    training.advance(60)
    assert training.evaluate()["loss"] < 0.7 * made.evaluate(before, 16)["loss"]


def settings_of(name: str, book: Path) -> dict[str, Any]:
    text = (
        {"text": str(book)} if name.endswith("-text") else {"train_examples": 8, "test_examples": 4}
    )
    return {"task": name, "steps": 1, "length": 48, **text}


@pytest.mark.parametrize("name", TASKS)
def test_what_a_task_says_of_itself_is_what_its_row_says(name: str, book: Path) -> None:
    made = make_task(ProxyConfig.model_validate(settings_of(name, book)), 0)
    assert made.bidirectional == TASKS[name].bidirectional
    genome = parse(f"{{width=32}} {BOTH_WAYS}")
    if made.bidirectional:
        Training(genome, made, TrainConfig(), 1, 2, 0)
        return
    with pytest.raises(ProxyError) as caught:
        Training(genome, made, TrainConfig(), 1, 2, 0)
    assert str(caught.value) == (
        f"{WORDS}; next-token tasks such as {name} would leak (masked-text takes it)"
    )


@pytest.mark.parametrize("name", TASKS)
def test_the_answer_is_not_among_the_inputs_after_it_where_a_task_allows_both_ways(
    name: str, book: Path
) -> None:
    """The target of a next-token task is the next input; of the others it is not."""
    made = make_task(ProxyConfig.model_validate(settings_of(name, book)), 0)
    batch = made.train_batch(0, 4)
    shifted = batch.inputs[:, 1:] == batch.targets[:, :-1]
    asked = batch.targets[:, :-1] != IGNORE
    leaks = bool(shifted[asked].float().mean() > 0.5) if asked.any() else False
    assert leaks != made.bidirectional


def test_train_refuses_in_one_line_and_creates_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    call = caller(tmp_path, monkeypatch, capsys)
    out = tmp_path / "out"
    status, _, err = call(
        "train", BOTH_WAYS, "--width", "32", "--proxy", "byte-text", "--out", str(out)
    )
    assert status == 2
    assert f"--proxy: {WORDS}; next-token tasks such as byte-text would leak" in err
    assert not out.exists()


STUDY: dict[str, Any] = {
    "name": "both-ways",
    "space": {"width": 32, "depth": 2, "operators": {"mha": {}, "bilstm": {}, "swiglu": {}}},
    "proxies": {"text": {"task": "masked-text", "steps": 2, "batch": 2, "length": 16}},
    "objectives": ["quality"],
    "baselines": [],
}


def read(tmp_path: Path, **changes: Any) -> Study:
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump({**STUDY, "runs": str(tmp_path / "runs"), **changes}))
    return load_study(path)


NEXT = {"next": {"task": "byte-text", "steps": 2, "batch": 2, "length": 16}}
LEAK = "next-token tasks such as byte-text (proxies.next) would leak (masked-text takes it)"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"proxies": NEXT},
            f"space.operators.bilstm: bilstm reads later tokens; {LEAK}",
        ),
        (
            {"proxies": STUDY["proxies"] | NEXT},
            f"space.operators.bilstm: bilstm reads later tokens; {LEAK}",
        ),
        (
            {
                "proxies": NEXT,
                "space": {
                    **STUDY["space"],
                    "operators": {"attention": {"causal": [True, False]}, "swiglu": {}},
                },
            },
            f"space.operators.attention: attention with causal=false reads later tokens; {LEAK}",
        ),
        (
            {
                "proxies": NEXT,
                "space": {
                    **STUDY["space"],
                    "operators": {"mha": {}, "swiglu": {}},
                    "slots": [{"at": 0, "operators": {"fnet": {}}}],
                },
            },
            f"space.slots.0.operators.fnet: fnet reads later tokens; {LEAK}",
        ),
        (
            {
                "proxies": NEXT,
                "space": {**STUDY["space"], "operators": {"mha": {}, "swiglu": {}}},
                "baselines": ["transformer++", {"name": "mine", "genome": "bilstm > swiglu"}],
            },
            f"baselines.1: slot 0: bilstm reads later tokens; {LEAK}",
        ),
        (
            {"objectives": ["quality", "latency_decode"]},
            (
                "space.operators.bilstm: bilstm reads later tokens; it decodes nothing, so it has "
                "no latency_decode"
            ),
        ),
    ],
)
def test_a_study_that_would_leak_is_refused_when_it_is_read(
    tmp_path: Path, changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(StudyError) as caught:
        read(tmp_path, **changes)
    assert str(caught.value).endswith(sentence)
    assert not (tmp_path / "runs").exists()


def test_a_study_whose_proxies_take_both_ways_is_read(tmp_path: Path) -> None:
    assert read(tmp_path).name == "both-ways"
    assert read(tmp_path, objectives=["quality", "latency_prefill", "cache_bytes"]).goals
    pinned = {
        **STUDY["space"],
        "operators": {"longformer": {"causal": [True]}, "swiglu": {}},
    }
    assert read(tmp_path, proxies=NEXT, space=pinned)


def test_prefill_is_one_pass_and_decoding_says_why_not(tmp_path: Path) -> None:
    genome = parse("{width=32} bilstm > swiglu")
    chosen = read(tmp_path, objectives=["quality", {"latency_prefill": {"context": 16}}]).goals
    found = measure(genome, chosen, "cpu", 0, None)
    assert len(found) == 1
    space = {**STUDY["space"], "operators": {"mha": {}, "swiglu": {}}}
    decoded = read(tmp_path, space=space, objectives=["quality", "latency_decode"])
    with pytest.raises(BidirectionalError, match="bilstm reads later tokens"):
        measure(genome, decoded.goals, "cpu", 0, None)
    assert goals(decoded.objectives) == decoded.goals
