"""Motifs, blocks, and what sharing labels mean in more or fewer of them."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mendel.genome.genome import Genome, Slot
from mendel.genome.header import MAX_SLOTS
from mendel.genome.motif import (
    LEAST_SHARE,
    WHOLE,
    Motif,
    Repeated,
    Stretched,
    find_motif,
    pattern_of,
)
from mendel.genome.notation import parse, show_slots
from mendel.genome.resolve import groups, primitive_of
from mendel.genome.rules import violations

UNITS = [parse(text).slots[0] for text in ("mha", "mamba2(key_dim=8)", "swiglu", "gelu-mlp", "gru")]

PAIRS = parse(
    "gqa(features=@a) > swiglu > gqa(features=@a) > gelu-mlp > "
    "gqa(features=@b) > swiglu > gqa(features=@b) > gelu-mlp"
)
"""Two repeats in which two attentions share keys and values."""


def genome(slots: tuple[Slot, ...]) -> Genome:
    return Genome(64, slots)


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.integers(0, 4), max_size=2),
    st.lists(st.integers(0, 4), min_size=1, max_size=5),
    st.integers(2, 6),
    st.lists(st.integers(0, 4), max_size=2),
)
def test_a_motif_is_found_and_is_the_smallest(
    before: list[int], body: list[int], repeats: int, after: list[int]
) -> None:
    order = before + body * repeats + after
    made = genome(tuple(UNITS[i] for i in order))
    found = find_motif(made)
    covered = max(
        (
            period * count
            for start in range(len(order))
            for period in range(1, (len(order) - start) // 2 + 1)
            for count in range(2, (len(order) - start) // period + 1)
            if order[start : start + period] * count == order[start : start + period * count]
        ),
        default=0,
    )
    if found is None:
        # Too little of it repeats, or a mixer beside the repeats is not in any that long.
        mixers = {i for i in before + after if i not in (2, 3)}
        assert covered < LEAST_SHARE * len(order) or not mixers <= set(body)
        return
    stretch = order[found.start : found.end]
    unit = stretch[: found.period]
    assert stretch == unit * found.repeats
    assert found.repeats >= 2
    shorter = [p for p in range(1, found.period) if found.period % p == 0]
    assert all(unit != unit[:p] * (found.period // p) for p in shorter)
    assert found.period * found.repeats <= covered
    outside = {i for i in order[: found.start] + order[found.end :] if i not in (2, 3)}
    assert outside <= set(unit)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=12), st.integers(1, 40), st.booleans())
def test_every_number_has_its_depth_and_sources(order: list[int], place: int, repeat: bool) -> None:
    made = genome(tuple(UNITS[i] for i in order))
    pattern = pattern_of(made, repeat)
    counts = pattern.counts()
    assert pattern.make(made, pattern.own) == made
    count = counts[min(place, len(counts) - 1)]
    grown = pattern.make(made, count)
    assert len(grown.slots) == pattern.depth(count) <= MAX_SLOTS
    sample = pattern.make(made, pattern.sample)
    assert grown.slots == tuple(sample.slots[i] for i in pattern.sources(count))
    assert set(grown.slots) == set(made.slots) or isinstance(pattern, Repeated)
    assert len(set(counts)) == len(counts)
    depths = [pattern.depth(n) for n in counts]
    assert depths == sorted(depths)


@pytest.mark.parametrize(
    ("text", "motif"),
    [
        ("[mha > swiglu]*4", Motif(0, 2, 4)),
        ("mamba2*6", Motif(0, 1, 6)),
        ("mla > swiglu > [mla > moe]*5", Motif(2, 2, 5)),
        ("[[mamba2 > swiglu]*3 > mha > swiglu]*2", Motif(0, 8, 2)),
        ("swiglu > [mha > swiglu]*4", Motif(1, 2, 4)),
        # A first layer may be special.
        ("rwkv7(value_mix=lend) > rwkv7-channel > [rwkv7(value_mix=mix) > rwkv7-channel]*4",
         Motif(2, 2, 4)),
        # Repeating the three would leave one attention however deep the model.
        ("[mamba2 > swiglu]*3 > mha > swiglu", None),
        ("mha > swiglu > mamba2 > swiglu", None),
        # A label inside each repeat, one across all, and one that joins pairs of repeats.
        ("[gqa(features=@a) > gqa(features=@a)] > gqa(features=@b) > gqa(features=@b)",
         Motif(0, 2, 2)),
        ("[mha(weights=@a) > swiglu]*4", Motif(0, 2, 4)),
        (
            "[mha(weights=@a) > swiglu]*2 > [mha(weights=@b) > swiglu]*2",
            Motif(0, 4, 2),
        ),
    ],
)  # fmt: skip
def test_motifs_of_known_genomes(text: str, motif: Motif | None) -> None:
    assert find_motif(parse(text)) == motif


def test_a_repeat_shares_among_its_own() -> None:
    five = pattern_of(PAIRS).make(PAIRS, 10)
    assert list(groups(five, "features").values()) == [
        [(4 * i, 0), (4 * i + 2, 0)] for i in range(5)
    ]
    assert violations(five) == []


def test_a_label_across_repeats_stays_one() -> None:
    made = parse("[mamba2(key_dim=8) > swiglu > mha(weights=@z) > swiglu]*2")
    grown = pattern_of(made).make(made, 10)
    assert list(groups(grown, "weights").values()) == [[(4 * i + 2, 0) for i in range(5)]]
    assert violations(grown) == []
    # One repeat alone has nobody to share with.
    assert groups(pattern_of(made).make(made, 2), "weights") == {}


def test_a_cut_leaves_no_lone_label() -> None:
    cut = pattern_of(PAIRS).make(PAIRS, 3)
    assert len(cut.slots) == 6
    assert list(groups(cut, "features").values()) == [[(0, 0), (2, 0)]]
    assert violations(cut) == []


def test_a_short_genome_without_a_motif_is_repeated_whole() -> None:
    made = parse("[mamba2 > swiglu]*3 > mha(weights=@a) > swiglu > mha(weights=@a) > swiglu")
    grown = pattern_of(made).make(made, 2 * 5)
    assert grown.slots[:10] == made.slots
    assert [op.name for *_, op in grown.ops()] == [op.name for *_, op in made.ops()] * 2
    # Each repeat shares among its own.
    assert list(groups(grown, "weights").values()) == [[(6, 0), (8, 0)], [(16, 0), (18, 0)]]
    assert isinstance(pattern_of(parse(f"[mamba2 > swiglu]*{WHOLE // 4} > mha*{WHOLE}")), Stretched)


def test_stretching_keeps_order_and_proportion() -> None:
    made = parse("[mamba2 > swiglu]*2 > [mha | gru] > gelu-mlp > mha > swiglu")
    pattern = pattern_of(made, repeat=False)
    assert show_slots(pattern.make(made, 12).slots) == (
        "[mamba2 > swiglu]*6 > [[mha | gru] > gelu-mlp]*3 > [mha > swiglu]*3"
    )
    for count in pattern.counts()[:30]:
        slots = pattern.make(made, count).slots
        mixers = [slot for slot in slots if primitive_of(slot.branches[0]).kind == "mixer"]
        assert len([slot for slot, _ in itertools.groupby(mixers)]) == 3
        assert abs(mixers.count(made.slots[0]) - count / 2) <= 1


@pytest.mark.parametrize("count", [3, 5, 8, 13])
def test_stretched_lenders_stand_before_their_borrowers(count: int) -> None:
    made = parse("gqa(features=@a) > swiglu > mamba2(key_dim=8) > gqa(features=@a) > gelu-mlp")
    grown = pattern_of(made, repeat=False).make(made, count)
    assert violations(grown) == []
    found = list(groups(grown, "features").values())
    first = [slot for slot, _ in itertools.groupby(grown.slots)].index(made.slots[2])
    assert first > 0
    middle = grown.slots.index(made.slots[2])
    # Every group has members of both attentions, and there are as many as the rarer one has copies.
    assert all(members[0][0] < middle < members[-1][0] for members in found)
    copies = [sum(i < middle for i, _ in members) for members in found]
    others = [len(members) - n for members, n in zip(found, copies, strict=True)]
    assert len(found) == min(sum(copies), sum(others))
    assert (
        sum(copies) + sum(others)
        == sum(op.features is not None for _, _, op in grown.ops())
        == sum(op.name == "gqa" for _, _, op in grown.ops())
    )
