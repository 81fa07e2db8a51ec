"""Routed slots in the grammar of a study, in drawings, in training and in a search."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.text import Text
from small_study import story, write
from torch import Tensor

from mendel.genome.cost import cost
from mendel.genome.genome import Genome
from mendel.genome.notation import parse, show
from mendel.genome.repair import repair
from mendel.genome.routing import Chosen, Depth
from mendel.genome.rules import space_violations, violations
from mendel.genome.sample import PART_CHANCE, sample_valid
from mendel.genome.space import Space
from mendel.genome.space_check import SpaceError, read_space
from mendel.genome.variation import mutate
from mendel.proxies.recipe import TrainConfig
from mendel.proxies.tasks import ProxyConfig, make_task
from mendel.proxies.train import Training
from mendel.search import measure as measure_module
from mendel.search.draw import drawing
from mendel.search.driver import search
from mendel.search.effects import traits
from mendel.search.loads import load_rows
from mendel.search.measure import measure
from mendel.search.objectives import OBJECTIVES, Goal, LatencySettings
from mendel.search.outline import outline
from mendel.search.picture import picture

SPACE: dict[str, Any] = {
    "width": 16,
    "depth": [2, 4],
    "join": ["mean", "gate", "top1"],
    "tokens": [1.0, 0.5, 0.25],
    "operators": {
        "gqa": {"heads": [2], "kv_heads": [1, 2]},
        "mamba2": {"heads": [2]},
        "moe": {"experts": [4], "expansion": [0.5], "score": ["softmax", "sigmoid"]},
    },
    "parallel": {"branches": 2, "share": 0.6},
    "sharing": {"weights": True, "features": True},
}
ROUTED = parse(
    "{width=16} [gqa(heads=2) | mamba2(heads=2)](join=top1) > [moe(experts=4)](tokens=0.5) > "
    "[gqa(heads=2) | mamba2(heads=2)](join=gate, tokens=0.3)"
)


def test_sampling_draws_every_join_and_share() -> None:
    space = Space.model_validate(SPACE)
    genomes = [sample_valid(space, np.random.default_rng(seed)) for seed in range(150)]
    slots = [slot for genome in genomes for slot in genome.slots]
    assert {slot.join for slot in slots if len(slot.branches) > 1} == {"mean", "gate", "top1"}
    assert {slot.tokens for slot in slots} == {1.0, 0.5, 0.25}
    share = sum(slot.tokens < 1 for slot in slots) / len(slots)
    # About 450 slots: five standard deviations are 0.1.
    assert abs(share - PART_CHANCE) < 0.1
    assert any(op.features for genome in genomes for *_, op in genome.ops())
    halves = Space.model_validate(SPACE | {"tokens": [0.5]})
    genome = sample_valid(halves, np.random.default_rng(0))
    assert {slot.tokens for slot in genome.slots} == {0.5}


def test_mutation_changes_joins_and_shares_and_nothing_else() -> None:
    space = Space.model_validate(SPACE | {"sharing": {}})
    parent = repair(ROUTED, space)
    said = set()
    for seed in range(60):
        child, words = mutate(parent, space, np.random.default_rng(seed), ["header"])
        assert violations(child) == space_violations(child, space) == []
        changed = [(a, b) for a, b in zip(parent.slots, child.slots, strict=True) if a != b]
        assert len(changed) == 1
        (a, b) = changed[0]
        assert a.branches == b.branches
        assert (a.join == b.join) == ("tokens of slot" in words)
        said.add(words)
    assert "mutation: tokens of slot 0 from 1.0 to 0.25" in said
    assert any(words.startswith("mutation: join of slot 0 from top1 to ") for words in said)


def test_repair_brings_shares_into_the_space_and_ends_features_in_such_slots() -> None:
    space = Space.model_validate(SPACE)
    outside = parse("{width=16} [gqa(heads=2)](tokens=0.4) > moe > gqa(heads=2)")
    inside = repair(outside, space)
    assert [slot.tokens for slot in inside.slots] == [0.5, 1.0, 1.0]
    lending = parse(
        "{width=32} mha(features=@k) > [mha(features=@k)](tokens=0.5) > mha(features=@k)"
    )
    found = violations(lending)
    assert [v.rule for v in found] == ["tokens"]
    assert str(found[0]) == (
        "slot 1: features=@k where tokens=0.5; operators share features in slots that take all "
        "tokens"
    )
    assert show(repair(lending)) == (
        "{width=32} mha(features=@k) > [mha](tokens=0.5) > mha(features=@k)"
    )


def test_a_branch_that_is_left_alone_has_no_join() -> None:
    parent = parse("{width=16} [gqa(heads=2) | mamba2(heads=2)](join=top1) > moe(experts=4)")
    narrow = Space.model_validate(SPACE | {"parallel": {"branches": 1}})
    assert [slot.join for slot in repair(parent, narrow).slots] == ["mean", "mean"]
    space = Space.model_validate(SPACE | {"sharing": {}})
    parent = repair(parent, space)
    serial = []
    for seed in range(40):
        child, words = mutate(parent, space, np.random.default_rng(seed), ["parallel"])
        if "serial" in words:
            serial.append(child.slots[0])
    assert serial
    assert all(len(slot.branches) == 1 and slot.join == "mean" for slot in serial)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"tokens": [0.5, 2]}, "space.tokens.1: tokens is a number from 0.001 to 1, not 2"),
        ({"tokens": []}, "space.tokens: the list is empty; tokens is a number from 0.001 to 1"),
        (
            {"join": ["best"]},
            "space.join.0: join is one of mean, sum, norm, gate, top1, chain, not best",
        ),
    ],
)
def test_mistakes(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(SpaceError) as caught:
        read_space(SPACE | changes)
    assert str(caught.value) == sentence


def plain(lines: list[Text]) -> str:
    return "\n".join(line.plain for line in lines)


def test_drawings_and_traits_say_where_tokens_go() -> None:
    content = outline(ROUTED, cost(ROUTED))
    text = plain(drawing(content))
    assert " top1 " in text
    assert "tokens=0.5" in text
    assert "╭─── tokens=0.3 ────╮" in text
    assert "╰────── gate ───────╯" in text
    assert " tokens=0.3 " in plain(drawing(content, unicode=False))
    svg = picture(content, "routed")
    assert "gate · tokens=0.3" in svg
    assert ">tokens=0.5<" in svg
    whole = parse("{width=16} [mha(heads=2)](tokens=0.5) > mha(heads=2)")
    assert len(outline(whole, cost(whole)).rows) == 2, "not folded into one"
    found = traits({"width": 16, "slots": [{"op": "mha"}, {"parallel": [{"op": "mha"}] * 2}]})
    assert (found["routed joins"], found["tokens per slot"]) == (0.0, 1.0)
    routed = {"parallel": [{"op": "mha"}] * 2, "join": "top1", "tokens": 0.5}
    found = traits({"width": 16, "slots": [{"op": "mha"}, routed]})
    assert (found["routed joins"], found["tokens per slot"]) == (1.0, 0.75)


def training(genome: Genome, steps: int) -> Training:
    settings = {
        "task": "in-context-recall",
        "steps": 1,
        "length": 16,
        "vocab": 8,
        "train_examples": 64,
        "test_examples": 32,
    }
    task = make_task(ProxyConfig.model_validate(settings), 0)
    return Training(genome, task, TrainConfig(lr=0.01), steps, 8, 0)


@pytest.mark.parametrize("residual", ["plain", "reversible"])
def test_training_learns_resumes_to_the_bit_and_reports_loads(
    residual: str, tmp_path: Path
) -> None:
    genome = parse(show(ROUTED).replace("width=16", f"width=16, residual={residual}"))
    whole = training(genome, 60)
    whole.advance(60)
    losses = [record["loss"] for record in whole.curve if "loss" in record]
    assert losses[-1] < losses[0]
    part = training(genome, 60)
    part.advance(25)
    part.save(tmp_path / "half")
    again = Training.load(tmp_path / "half", genome, part.task, TrainConfig(lr=0.01), 60, 8, 0)
    again.advance(60)
    assert again.statistics() == whole.statistics()
    for name, value in whole.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value), name
    said = whole.statistics()
    assert sum(said["slot0"]["load"]) == pytest.approx(1)
    assert sum(said["slot1.0"]["load"]) == pytest.approx(1)
    assert sum(said["slot2"]["load"]) == pytest.approx(1)
    # The second loss teaches the threshold: what passes it comes near the share.
    assert abs(said["slot1"]["passed"] - 0.5) < 0.25
    assert abs(said["slot2"]["passed"] - 0.3) < 0.25
    assert 0 <= whole.evaluate()["score"] <= 1


def test_a_search_over_all_three_kinds_of_routing(tmp_path: Path) -> None:
    changes = {"space": SPACE, "search__trials": 10, "baselines": ["moeut-like"]}
    run = search(write(tmp_path / "a", **changes))
    assert run.state == "complete"
    assert {t.state for t in run.trials} <= {"complete", "stopped"}
    genomes = [t.genome for t in run.trials]
    slots = [slot for genome in genomes for slot in genome["slots"]]
    assert {slot.get("join", "mean") for slot in slots} > {"mean"}
    assert {slot.get("tokens", 1.0) for slot in slots} > {1.0}
    reports: dict[str, Any] = {}
    for trial in run.trials:
        for rung in trial.rungs:
            reports |= rung.statistics["text"]
    assert any("passed" in report for report in reports.values() if isinstance(report, dict))
    assert any("load" in report for report in reports.values() if isinstance(report, dict))
    entering = 0
    parts = set()
    for trial in run.trials:
        for place, _, part, *_ in load_rows(trial):
            parts.add(part)
            if part.startswith("lets in "):
                entering += 1
                meant = trial.genome["slots"][int(place)]["tokens"]
                assert part.endswith(f"% of the tokens; {meant:.1%} in training")
    assert entering > 0
    assert {"2 branches", "4 experts"} < parts
    assert story(run.folder) == story(search(write(tmp_path / "b", **changes)).folder)


@pytest.mark.parametrize("batch", [1, 4])
def test_latencies_let_the_share_in_whatever_a_random_router_says(
    batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[float, list[tuple[int, int]]] = {}
    choose = Depth.choose

    def watched(depth: Depth, x: Tensor, whole: bool, earlier: Tensor | None = None) -> Chosen:
        chosen = choose(depth, x, whole, earlier)
        assert chosen.counts is not None
        seen.setdefault(depth.tokens, []).append((x.shape[1], sum(chosen.counts)))
        return chosen

    monkeypatch.setattr(Depth, "choose", watched)
    monkeypatch.setattr(measure_module, "ENOUGH_SECONDS", 0.0)
    genome = parse("{width=16} [mha(heads=2)](tokens=0.3) > [swiglu](tokens=0.75)")
    settings = LatencySettings(context=40, batch=batch)
    goals = [
        Goal(name, OBJECTIVES[name], settings) for name in ("latency_prefill", "latency_decode")
    ]
    for seed in range(2):
        seen.clear()
        found = measure(genome, goals, "cpu", seed, None)
        assert all(len(one["slots"]) == 2 for one in found.values())
        for share, calls in seen.items():
            whole = [entered for length, entered in calls if length == 40]
            assert len(whole) >= 10
            assert all(abs(n - share * 40 * batch) < batch for n in whole)
            alone = [entered for length, entered in calls if length == 1]
            assert len(alone) > 100
            assert sum(alone) == pytest.approx(share * batch * len(alone), abs=batch)
            assert all(abs(n - share * batch) < 1 for n in alone), "the same at every step"
