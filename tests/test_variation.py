"""Mutation and crossover: pure, valid, inside the space, and said in words."""

import itertools
from collections import Counter

import numpy as np
import pytest

from mendel.genome.check import wide_space
from mendel.genome.constraints import satisfied
from mendel.genome.genome import Genome
from mendel.genome.notation import parse, show
from mendel.genome.rules import space_violations, violations
from mendel.genome.sample import sample_valid
from mendel.genome.space import Space
from mendel.genome.variation import MUTATIONS, cross, mutate

STUDY = Space.model_validate(
    {
        "width": [32, 64],
        "depth": [2, 8],
        "join": ["mean", "sum"],
        "operators": {
            "gqa": {"heads": [4], "kv_heads": [1, 2]},
            "mamba2": {"key_dim": [16, 32]},
            "swiglu": {"expansion": [2.0, 3.0]},
        },
        "slots": [{"at": -1, "operators": ["swiglu"]}],
        "parallel": {"branches": 2, "share": 0.25},
        "sharing": {"weights": True, "features": True},
        "constraints": {"params": {"max": "150k"}},
    }
)
WIDE = wide_space()


def is_inside(genome: Genome, space: Space) -> bool:
    return (
        violations(genome) == []
        and space_violations(genome, space) == []
        and satisfied(genome, space.constraints)
    )


@pytest.mark.parametrize("space", [STUDY, WIDE], ids=["study", "wide"])
def test_children_are_inside_the_space_and_differ(space: Space) -> None:
    rng = np.random.default_rng(0)
    population = [sample_valid(space, rng) for _ in range(20)]
    crossed = 0
    for turn in range(150):
        parent, other = population[turn % 20], population[(turn * 7 + 3) % 20]
        child, words = mutate(parent, space, rng)
        assert is_inside(child, space), words
        assert child != parent
        assert words.startswith("mutation: ")
        both, words = cross(parent, other, space, rng, points=1 + turn % 3)
        assert is_inside(both, space), words
        crossed += words.startswith("crossover: slots cut at ")
        population[turn % 20] = child
    # Parents of one slot have nothing to exchange.
    assert crossed > 130


@pytest.mark.parametrize("kind", MUTATIONS)
def test_every_kind_of_mutation_does_what_it_says(kind: str) -> None:
    rng = np.random.default_rng(1)
    changed = 0
    for seed in range(40):
        parent = sample_valid(STUDY, np.random.default_rng(seed))
        child, words = mutate(parent, STUDY, rng, [kind])
        if words.startswith("unchanged"):
            assert child == parent
            continue
        changed += 1
        counts = [len(g.slots) for g in (parent, child)]
        branches = [[len(slot.branches) for slot in g.slots] for g in (parent, child)]
        names = [Counter(op.name for *_, op in g.ops()) for g in (parent, child)]
        labels = [[(op.weights, op.features) for *_, op in g.ops()] for g in (parent, child)]
        if kind == "insert":
            assert counts[1] > counts[0]
        elif kind == "delete":
            assert counts[1] < counts[0]
        else:
            assert counts[1] == counts[0]
        if kind == "class":
            assert branches[0] == branches[1]
            assert (names[1] - names[0]).total() == 1
        if kind in ("axis", "swap", "header"):
            assert names[0] == names[1]
        if kind == "parallel":
            assert sum(a != b for a, b in zip(*branches, strict=True)) == 1
        if kind == "share":
            assert labels[0] != labels[1]
    assert changed >= 10


def test_a_change_of_an_axis_keeps_shared_weights() -> None:
    parent = parse(
        "gqa(heads=4, kv_heads=1) > swiglu(expansion=2.0, weights=@a) > gqa(heads=4, kv_heads=1) "
        "> swiglu(expansion=2.0, weights=@a)"
    )
    seen = set()
    for seed in range(60):
        child, words = mutate(parent, STUDY, np.random.default_rng(seed), ["axis"])
        if "expansion" in words:
            seen.add(show(child))
    assert (
        seen
        == {
            "{width=64} [gqa(kv_heads=1) > swiglu(expansion=3.0, weights=@a)]*2",
            "{width=64} [gqa(heads=4, kv_heads=1) > swiglu(expansion=3.0, weights=@a)]*2",
        }
        & seen
    )
    assert len(seen) == 1


def test_crossover_takes_slots_of_both_parents_of_different_depths() -> None:
    a = parse("[gqa(kv_heads=1) > swiglu(expansion=2.0)]*4")
    b = parse("[mamba2(key_dim=16) > swiglu(expansion=3.0)]*2")
    depths, mixed = set(), 0
    for seed in range(60):
        child, _ = cross(a, b, STUDY, np.random.default_rng(seed))
        depths.add(len(child.slots))
        mixed += {op.name for *_, op in child.ops()} >= {"gqa", "mamba2"}
        # With pattern alternate the cuts keep mixers and channel mixers in turn.
        assert [slot.branches[0].name == "swiglu" for slot in child.slots[:-1]] == [
            i % 2 == 1 for i in range(len(child.slots) - 1)
        ]
    assert len(depths) >= 3
    assert mixed > 20


def test_labels_of_the_two_parents_stay_apart() -> None:
    a = parse(
        "swiglu(expansion=2.0, weights=@a) > gqa(kv_heads=1) > swiglu(expansion=2.0, weights=@a)"
    )
    b = parse(
        "swiglu(expansion=2.0, weights=@a) > gqa(kv_heads=2) > swiglu(expansion=2.0, weights=@a)"
    )
    space = Space.model_validate(
        STUDY.model_dump() | {"pattern": "free", "slots": [], "depth": (2, 3)}
    )
    for seed in range(40):
        child, _ = cross(a, b, space, np.random.default_rng(seed), points=1)
        ops = [op for *_, op in child.ops()]
        if len(ops) == 3 and [op.name for op in ops] == ["swiglu", "gqa", "swiglu"]:
            # One cut: the ends come from different parents, so nothing is shared.
            assert [op.weights for op in ops] == [None, None, None]


def test_variation_is_a_function_of_the_seed_and_leaves_parents_alone() -> None:
    parents = [sample_valid(WIDE, np.random.default_rng(seed)) for seed in range(20)]
    before = [show(parent) for parent in parents]
    for seed, (a, b) in enumerate(itertools.pairwise(parents)):
        one, other = (mutate(a, WIDE, np.random.default_rng(seed)) for _ in range(2))
        assert one == other
        one, other = (cross(a, b, WIDE, np.random.default_rng(seed)) for _ in range(2))
        assert one == other
    assert [show(parent) for parent in parents] == before


def test_where_nothing_else_is_allowed_the_words_say_so() -> None:
    space = Space.model_validate({"depth": 2, "operators": {"mha": {}, "swiglu": {}}, "width": 64})
    only = parse("mha > swiglu")
    rng = np.random.default_rng(0)
    assert mutate(only, space, rng) == (
        only,
        "unchanged: none of 64 mutations stayed inside the space",
    )
    assert cross(only, only, space, rng) == (
        only,
        "unchanged: none of 64 crossovers stayed inside the space",
    )


def test_a_parent_from_outside_is_brought_inside() -> None:
    outside = parse("{width=128, norm=layernorm} [retnet > gelu-mlp]*6")
    rng = np.random.default_rng(0)
    for genome in (mutate(outside, STUDY, rng)[0], cross(outside, outside, STUDY, rng)[0]):
        assert is_inside(genome, STUDY)


def test_points_must_be_positive() -> None:
    with pytest.raises(ValueError, match="points is at least 1, not 0"):
        cross(parse("mha"), parse("mha"), STUDY, np.random.default_rng(0), points=0)
