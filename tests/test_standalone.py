"""Training one design: stopped and resumed it ends as if it had not been; seeds and divergence."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from mendel.genome.notation import parse
from mendel.proxies.recipe import TrainConfig
from mendel.proxies.tasks import ProxyConfig
from mendel.search.standalone import Plan, claim, spread, train_seed, write_outcome
from mendel.search.terminal import Mistake

SMALL = {"task": "in-context-recall", "length": 16, "train_examples": 32, "test_examples": 16}


def plan(lr: float = 0.01, steps: int = 12) -> Plan:
    return Plan(
        parse("{width=16} mamba2(key_dim=8) > swiglu"),
        "small",
        ProxyConfig.model_validate({**SMALL, "steps": steps, "batch": 4}),
        TrainConfig.model_validate({"lr": lr}),
        "cpu",
    )


def quiet(seed: int, step: int) -> None:
    pass


def test_a_stopped_training_goes_on_bit_for_bit(tmp_path: Path) -> None:
    def stop(seed: int, step: int) -> None:
        if step == 7:
            raise KeyboardInterrupt

    whole = train_seed(plan(), 0, tmp_path / "whole", quiet)
    with pytest.raises(KeyboardInterrupt):
        train_seed(plan(), 0, tmp_path / "broken", stop)
    seen: list[int] = []
    resumed = train_seed(plan(), 0, tmp_path / "broken", lambda _, step: seen.append(step))
    assert seen == list(range(8, 13))
    assert resumed["scores"] == whole["scores"]
    name = "seed-0/checkpoint.safetensors"
    weights = [(tmp_path / f / name).read_bytes() for f in ("whole", "broken")]
    # The header holds the seconds, which differ; the tensors follow it.
    tails = [w[8 + int.from_bytes(w[:8], "little") :] for w in weights]
    assert tails[0] == tails[1]


def test_seeds_differ_and_are_summarised(tmp_path: Path) -> None:
    results = [train_seed(plan(), seed, tmp_path, quiet) for seed in (0, 1)]
    assert results[0]["scores"]["loss"] != results[1]["scores"]["loss"]
    found = write_outcome(plan(), results, tmp_path)
    losses = [r["scores"]["loss"] for r in results]
    assert found["summary"]["loss"]["mean"] == pytest.approx(sum(losses) / 2)
    assert found["summary"]["loss"]["std"] == pytest.approx(abs(losses[0] - losses[1]) / 2**0.5)
    assert json.loads((tmp_path / "scores.json").read_text()) == json.loads(json.dumps(found))
    assert (tmp_path / "curves.html").is_file()


def test_divergence_is_a_result(tmp_path: Path) -> None:
    results = [train_seed(plan(lr=1e8, steps=60), 0, tmp_path, quiet)]
    assert "diverged at step" in results[0]["failure"]
    assert results[0]["scores"] == {}
    found = write_outcome(plan(lr=1e8, steps=60), results, tmp_path)
    assert found["failed"] == [0]
    assert found["summary"] == {}


def test_a_folder_holds_one_training(tmp_path: Path) -> None:
    claim(plan(), tmp_path / "out")
    claim(plan(), tmp_path / "out")
    with pytest.raises(
        Mistake, match=r"train\.lr is 0\.01 there and 0\.02 here; choose a new --out"
    ):
        claim(plan(lr=0.02), tmp_path / "out")
    other = replace(plan(), genome=parse("{width=16} mha(heads=2) > swiglu"))
    with pytest.raises(Mistake, match=r"notation is .*mamba2.* there and .*mha.* here"):
        claim(other, tmp_path / "out")
    asked = plan().as_dict() | {"train": {}}
    (tmp_path / "out" / "plan.json").write_text(json.dumps(asked), encoding="utf-8")
    with pytest.raises(Mistake, match=r"train\.\w+ is absent there"):
        claim(plan(), tmp_path / "out")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter").touch()
    with pytest.raises(Mistake, match="holds no training"):
        claim(plan(), tmp_path / "thesis")


def test_spread_of_one_has_no_deviation() -> None:
    assert spread([0.5]) == {"mean": 0.5, "std": None, "min": 0.5, "max": 0.5, "count": 1}
    assert math.isclose(spread([0.0, 1.0])["std"] or 0.0, 0.5**0.5)
