"""STAR's integers, both ways."""

import numpy as np
import pytest

from mendel.genome import star
from mendel.genome.genome import Genome, Slot
from mendel.genome.hash import canonical_hash
from mendel.genome.notation import parse, show
from mendel.genome.rules import violations
from mendel.genome.star import CLASSES, StarError

KNOWN = [number for number, known in CLASSES.items() if known.op is not None]


def test_the_papers_example() -> None:
    genome = star.read("21211-31112-21221-32112")
    assert show(genome) == "{width=64} [mha(conv=3, weights=@a) > gqa(features=@a)]*2"
    assert violations(genome) == []
    assert star.read(star.write(genome)) == genome


def test_the_alphabet() -> None:
    assert sorted(CLASSES) == list(range(1, 18))
    assert KNOWN == [1, 2, 3, 4, 5, 6, 7, 9]
    for number in KNOWN:
        genome = star.read(f"{number}1111", width=128)
        assert genome.width == 128
        assert star.write(genome) == f"{number}1111"


def test_random_genomes_come_back() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        livs = []
        for _ in range(int(rng.integers(1, 30))):
            number = int(rng.choice(KNOWN))
            five = [number, int(rng.integers(1, 14)), int(rng.integers(1, 3))]
            lends = number <= 4
            five += [int(rng.integers(1, 14)), int(rng.integers(1, 3)) if lends else 1]
            livs.append(".".join(map(str, five)))
        genome = star.read("-".join(livs))
        text = star.write(genome)
        assert star.read(text) == genome
        assert star.write(star.read(text)) == text


def test_numbers_above_nine_are_written_with_dots() -> None:
    pairs = "-".join(f"1.{n}.2.1.1" for n in range(1, 11))
    genome = star.read(f"{pairs}-{pairs}")
    livs = star.write(genome).split("-")
    assert livs[0] == "11211"
    assert livs[9] == livs[19] == "1.10.2.1.1"
    assert star.read("-".join(livs)) == genome


def test_a_group_with_strategy_one_means_nothing() -> None:
    assert star.read("13141-15181") == star.read("11111-11111") == parse("mha*2")


def test_a_point_under_another_name_is_the_same_class() -> None:
    genome = parse("attention(kv_heads=1) > mlp(gated=true, activation=silu)")
    assert star.write(genome) == "41111-91111"
    assert canonical_hash(star.read("41111-91111")) == canonical_hash(genome)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "LIV 0: five integers, such as 21211 or 10.1.1.1.1, are expected, not ''"),
        (
            "11111-1111",
            "LIV 1: five integers, such as 21211 or 10.1.1.1.1, are expected, not '1111'",
        ),
        (
            "101111",
            "LIV 0: five integers, such as 21211 or 10.1.1.1.1, are expected, not '101111'",
        ),
        (
            "1.1.1.1.x",
            "LIV 0: five integers, such as 21211 or 10.1.1.1.1, are expected, not '1.1.1.1.x'",
        ),
        ("1.1111111.1.1.1", "LIV 0: an integer of '1.1111111.1.1.1' is too large"),
        ("01111", "LIV 0: STAR's classes are 1 to 17, not 0"),
        ("18.1.1.1.1", "LIV 0: STAR's classes are 1 to 17, not 18"),
        (
            "81111",
            (
                "LIV 0: this version has no operator for class 8 (GConv-2), a gated long "
                "convolution with an implicit filter"
            ),
        ),
        (
            "11111-14.1.1.1.1",
            (
                "LIV 1: this version has no operator for class 14 (Rec-1-Diff), the difference "
                "of two parallel copies"
            ),
        ),
        (
            "11311",
            "LIV 0: the strategies of sharing weights are 1 (none) and 2 (all), not 3",
        ),
        (
            "11113",
            "LIV 0: the strategies of sharing features are 1 (none) and 2 (all), not 3",
        ),
        ("51112", "LIV 0: this version shares no features of class 5 (Rec-1)"),
        ("-".join(["11111"] * 513), "513 LIVs; a genome has at most 512 slots"),
    ],
)
def test_mistakes(text: str, sentence: str) -> None:
    with pytest.raises(StarError) as caught:
        star.read(text)
    assert str(caught.value) == sentence


@pytest.mark.parametrize(
    ("notation", "sentence"),
    [
        ("[mha | mamba2]", "slot 0: STAR's integers cannot say parallel operators"),
        ("[mha](tokens=0.5)", "slot 0: STAR's integers cannot say tokens=0.5"),
        ("{norm=layernorm} mha", "STAR's integers cannot say norm=layernorm"),
        (
            "mha > mha(heads=2, weights=@a)",
            (
                "slot 1: mha(heads=2) is not in STAR's alphabet, which has mha, mha(conv=3), gqa, "
                "mqa, mamba2(key_dim=16), mamba2(key_dim=2), lfm2-conv, swiglu"
            ),
        ),
    ],
)
def test_genomes_outside_the_alphabet(notation: str, sentence: str) -> None:
    with pytest.raises(StarError) as caught:
        star.write(parse(notation))
    assert str(caught.value) == sentence


def test_reading_does_not_judge_what_is_shared() -> None:
    genome = star.read("11211-91111")
    assert [found.rule for found in violations(genome)] == ["group"]
    assert isinstance(genome, Genome)
    assert all(isinstance(slot, Slot) for slot in genome.slots)
