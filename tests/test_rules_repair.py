"""What is valid, and the way back to it."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mendel.genome.check import wide_space
from mendel.genome.genome import Genome, Op, Slot
from mendel.genome.notation import parse, show
from mendel.genome.repair import repair
from mendel.genome.resolve import configs
from mendel.genome.rules import (
    RULES,
    InvalidGenome,
    Violation,
    require_valid,
    space_violations,
    violations,
)
from mendel.genome.sample import chooser, sample
from mendel.genome.space import Space, first_buildable
from mendel.primitives.catalogue import CATALOGUE, names

NARROW = Space.model_validate(
    {
        "width": [32, 64],
        "depth": [3, 6],
        "operators": {
            "gqa": {"heads": [4, 8], "kv_heads": [1, 2]},
            "mamba2": {"key_dim": [16, 32]},
            "swiglu": {"expansion": [2.0, 3.0]},
        },
        "slots": [{"at": -1, "operators": ["swiglu"]}, {"at": 0, "operators": ["lfm2-conv"]}],
        "parallel": {"branches": 2, "share": 0.5},
    }
)
SHARING = Space.model_validate(
    {
        "width": 64,
        "depth": [2, 5],
        "position": ["rope", "none"],
        "join": ["sum", "norm"],
        "operators": {"mha": {}, "mqa": {"pattern": ["full", "sliding"]}, "geglu": {}},
        "pattern": "free",
        "parallel": {"branches": 3, "share": 0.5},
        "sharing": {"weights": True, "features": True},
    }
)
SPACES = [wide_space(), NARROW, SHARING]


@pytest.mark.parametrize(
    ("text", "rule", "sentence"),
    [
        ("swiglu*2", "mixer", "genome: there is no mixer; a genome has at least one mixer"),
        (
            "mha(kv_heads=3)",
            "operator",
            "slot 0: mha: kv_heads=3 does not divide heads=4",
        ),
        (
            "[mha | mha(heads=3)]",
            "operator",
            "slot 0, branch 1: mha: heads=3 does not divide the width 64; set head_dim as well",
        ),
        (
            "mha(weights=@a)",
            "group",
            "slot 0: nothing else has weights=@a; a sharing group has at least two members",
        ),
        (
            "mha > mha(features=@x)",
            "group",
            "slot 1: nothing else has features=@x; a sharing group has at least two members",
        ),
        (
            "mha(weights=@a) > [mamba2 | mha(heads=2, weights=@a)]",
            "weights",
            (
                "slot 1, branch 1: weights=@a are those of slot 0, whose config differs; operators "
                "that share weights have equal configs"
            ),
        ),
        (
            "mamba2(features=@a) > mha(features=@a)",
            "lender",
            (
                "slot 0: features=@a: mamba2 lends no features; the first operator of a feature "
                "group is of a primitive that lends features"
            ),
        ),
        (
            "mha(features=@a) > mamba2(features=@a)",
            "borrower",
            "slot 1: features=@a: mamba2 takes no features",
        ),
        (
            "mha(features=@a) > gqa(features=@a)",
            "borrower",
            (
                "slot 1: features=@a: the lender has kv_heads=4 and the borrower kv_heads=2; they "
                "must agree"
            ),
        ),
        (
            "mha(features=@a) > [mha(features=@a) | mha(features=@a)]",
            "slots of a group",
            (
                "slot 1, branch 1: two members of features=@a; the members of a feature group "
                "stand in different slots"
            ),
        ),
        (
            "mha(features=@a) > mha(features=@a) > [mha(features=@a)](tokens=0.5)",
            "tokens",
            (
                "slot 2: features=@a where tokens=0.5; operators share features in slots that "
                "take all tokens"
            ),
        ),
    ],
)
def test_every_rule_says_what_is_wrong(text: str, rule: str, sentence: str) -> None:
    genome = parse(text)
    found = violations(genome)
    assert [v.rule for v in found] == [rule]
    assert rule in RULES
    assert str(found[0]) == sentence
    repaired = repair(genome)
    assert violations(repaired) == []
    assert repair(repaired) is repaired


@pytest.mark.parametrize(
    ("genome", "rule", "sentence"),
    [
        (
            Genome(0, (Slot((Op("mamba2"),)),)),
            "header",
            "genome: width is a whole number from 1 to 65536, not 0",
        ),
        (
            replace(parse("mha"), position="sinus"),
            "header",
            "genome: position is one of rope, alibi, t5, xl, learned, sinusoidal, none, not sinus",
        ),
        (Genome(64, ()), "depth", "genome: 0 slots; a genome has from 1 to 512 slots"),
        (Genome(64, (Slot(()),)), "slot", "slot 0: the slot holds no operator"),
        (
            Genome(64, (Slot((Op("mha"),), "max"),)),
            "slot",
            "slot 0: join is one of mean, sum, norm, gate, top1, chain, not max",
        ),
        (
            Genome(64, (Slot((Op("mha", (("heds", 2),)),)),)),
            "operator",
            None,
        ),
        (Genome(64, (Slot((Op("nothing"),)),)), "operator", None),
        (
            Genome(64, (Slot((Op("mha", (), "a b"),)), Slot((Op("mha", (), "a b"),)))),
            "label",
            "slot 0: 'a b' is no label",
        ),
    ],
)
def test_rules_that_no_notation_can_break(genome: Genome, rule: str, sentence: str | None) -> None:
    found = violations(genome)
    assert found[0].rule == rule
    if sentence is not None:
        assert str(found[0]) == sentence
    assert violations(repair(genome)) == []


def test_one_line_for_an_invalid_genome() -> None:
    require_valid(parse("mha"))
    with pytest.raises(InvalidGenome) as caught:
        require_valid(parse("swiglu > mlp(weights=@a)"))
    assert str(caught.value) == (
        "genome: there is no mixer; a genome has at least one mixer (and 1 more)"
    )


@pytest.mark.parametrize(
    ("text", "rules"),
    [
        ("lfm2-conv > swiglu > mamba2(key_dim=16) > swiglu", []),
        ("lfm2-conv > swiglu", ["space depth"]),
        ("{norm=layernorm} lfm2-conv > swiglu > mamba2(key_dim=16) > swiglu", ["space header"]),
        ("mamba2(key_dim=16) > swiglu > mamba2(key_dim=16) > swiglu", ["space operator"]),
        ("lfm2-conv > swiglu > mamba2(key_dim=64) > swiglu", ["space genes"]),
        ("lfm2-conv > swiglu > mamba2(key_dim=16, conv=3) > swiglu", ["space genes"]),
        (
            "lfm2-conv > swiglu > [mamba2(key_dim=16) | mamba2(key_dim=16)](join=sum) > swiglu",
            ["space parallel"],
        ),
        (
            "lfm2-conv > swiglu > [mamba2(key_dim=16) | mamba2(key_dim=32) | gqa] > swiglu",
            ["space parallel"],
        ),
        (
            "lfm2-conv > swiglu(weights=@a) > gqa > swiglu(weights=@a)",
            ["space sharing", "space sharing"],
        ),
    ],
)
def test_the_rules_of_a_space(text: str, rules: list[str]) -> None:
    genome = parse(text.replace("swiglu", "swiglu(expansion=2.0)").replace(")(", ", "))
    found = space_violations(genome, NARROW)
    assert [v.rule for v in found] == rules
    assert all(isinstance(v, Violation) and v.sentence for v in found)
    assert space_violations(repair(genome, NARROW), NARROW) == []


def test_repair_keeps_what_it_can() -> None:
    genome = parse(
        "mha(weights=@a) > swiglu(expansion=5.0, weights=@a) > mamba2 > geglu > mha(weights=@a)"
    )
    assert show(repair(genome)) == (
        "{width=64} mha(weights=@a) > swiglu(expansion=5.0) > mamba2 > geglu > mha(weights=@a)"
    )
    # In the space: a gene goes to the nearest value, an operator out of place to a neighbour.
    assert show(repair(genome, NARROW)) == (
        "{width=64} lfm2-conv > swiglu(expansion=3.0) > mamba2(key_dim=32) > "
        "swiglu(expansion=3.0)*2"
    )
    # As few axes as possible change where a combination cannot be built.
    assert (
        show(repair(parse("mha(heads=3, qk_norm=true)"))) == "{width=64} mha(heads=1, qk_norm=true)"
    )


# Built here and not while drawing: the type checks of the test run draw random numbers themselves.
LABELS = st.sampled_from([None, None, None, "a", "b", "no label"])
VALUES = st.sampled_from([-1, 0, 1, 2, 3, 4, 16, 1000, 0.5, 2.0, True, "full", None, "x"])
AXES = st.sampled_from(sorted({a.name for row in CATALOGUE for a in row.axes} | {"nothing"}))
OPS = st.builds(
    lambda name, genes, weights, features: Op(name, tuple(genes.items()), weights, features),
    st.sampled_from([*names(), "nothing"]),
    st.dictionaries(AXES, VALUES, max_size=4),
    LABELS,
    LABELS,
)
SLOTS = st.builds(
    lambda ops, join, tokens: Slot(tuple(ops), join, tokens),
    st.lists(OPS, max_size=3),
    st.sampled_from(["mean", "sum", "norm", "top1", "max"]),
    st.sampled_from([1.0, 1.0, 0.5, 0.0, 7.0]),
)
JUNK = st.builds(
    Genome,
    st.sampled_from([-1, 0, 1, 7, 30, 32, 64, 100, 10**9]),
    st.lists(SLOTS, max_size=7).map(tuple),
    st.sampled_from(["rope", "alibi", "xl", "learned", "sinusoidal", "none", "sinus"]),
    st.sampled_from(["rmsnorm", "none", "batchnorm"]),
    st.sampled_from(["pre", "post", "sandwich", "mid"]),
    st.sampled_from(["plain", "reversible", "ngpt", "highway"]),
    st.booleans(),
    st.sampled_from([1, 2, 256]),
)


@given(JUNK)
@settings(max_examples=150, deadline=None)
def test_every_repaired_genome_is_valid_and_repair_is_idempotent(genome: Genome) -> None:
    repaired = repair(genome)
    assert violations(repaired) == []
    assert repair(repaired) is repaired
    assert len(configs(repaired)) == len(repaired.slots)
    assert parse(show(repaired)) == repaired
    if not violations(genome):
        assert repaired is genome
    for space in SPACES:
        inside = repair(genome, space)
        assert violations(inside) == []
        assert space_violations(inside, space) == []
        assert repair(inside, space) is inside
        assert repair(genome, space) == inside


@pytest.mark.parametrize("space", SPACES, ids=["wide", "narrow", "sharing"])
def test_sampled_genomes_are_repaired_into_their_space(space: Space) -> None:
    for seed in range(100):
        genome = sample(space, chooser(np.random.default_rng(seed)))
        repaired = repair(genome, space)
        assert violations(repaired) == []
        assert space_violations(repaired, space) == []
        # An operator goes only where no setting of it can stand.
        depth = len(genome.slots)
        for i, (slot, allowed) in enumerate(zip(genome.slots, space.slots_at(depth), strict=True)):
            site = repaired.site_at(i, depth)
            ranges = allowed.operators
            stands = sum(
                first_buildable((op.name,), ranges, site) is not None for op in slot.branches
            )
            kept = len(repaired.slots[i].branches)
            assert max(1, stands) <= kept <= len(slot.branches)
