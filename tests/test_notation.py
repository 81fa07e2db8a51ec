"""The one-line notation: reading, writing, and what a mistake is told."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mendel.genome.check import wide_space
from mendel.genome.genome import Genome, Op, Slot
from mendel.genome.header import MAX_SLOTS
from mendel.genome.notation import NotationError, parse, show, show_slots
from mendel.genome.sample import sample_valid
from mendel.primitives.catalogue import find, names

EXAMPLE = (
    "{width=64, norm=layernorm} [mamba2 > swiglu]*3 > [gqa(kv_heads=2) | mamba2] "
    "> moe(experts=8, top_k=2)"
)
A, B, C = Slot((Op("mha"),)), Slot((Op("swiglu"),)), Slot((Op("mamba2"),))


def test_the_example_means_what_it_says() -> None:
    genome = parse(EXAMPLE)
    assert genome.width == 64
    assert genome.norm == "layernorm"
    assert genome.slots[:6] == (C, B) * 3
    assert genome.slots[6] == Slot((Op("gqa", (("kv_heads", 2),)), Op("mamba2")))
    assert genome.slots[7] == Slot((Op("moe", (("experts", 8), ("top_k", 2))),))
    assert show(genome) == EXAMPLE


def test_random_genomes_come_back() -> None:
    space = wide_space()
    texts = set()
    for seed in range(400):
        genome = sample_valid(space, np.random.default_rng(seed))
        text = show(genome)
        assert parse(text) == genome
        assert parse("".join(text.split())) == genome
        texts.add(text)
    assert len(texts) > 350


@pytest.mark.parametrize(
    ("slots", "text"),
    [
        ((A,), "mha"),
        ((A, B), "mha > swiglu"),
        ((A,) * 3, "mha*3"),
        ((A, B) * 4, "[mha > swiglu]*4"),
        ((C, A, B, A, B, C), "mamba2 > [mha > swiglu]*2 > mamba2"),
        ((C, C, A) * 2, "[mamba2*2 > mha]*2"),
        ((C, B, C, B, A, B) * 2 + (A,), "[[mamba2 > swiglu]*2 > mha > swiglu]*2 > mha"),
        ((Slot((Op("mha"), Op("mamba2"))),) * 2, "[mha | mamba2]*2"),
        ((Slot((Op("mha"), Op("mamba2")), "sum"), B), "[mha | mamba2](join=sum) > swiglu"),
        ((Slot((Op("mha"),), "norm"),) * 2, "[mha](join=norm)*2"),
        ((Slot((Op("mha"),), tokens=0.125), B), "[mha](tokens=0.125) > swiglu"),
        (
            (Slot((Op("mha"), Op("mamba2")), "top1", 0.5),) * 2,
            "[mha | mamba2](join=top1, tokens=0.5)*2",
        ),
    ],
)
def test_repeats_are_written_short(slots: tuple[Slot, ...], text: str) -> None:
    assert show_slots(slots) == text
    assert parse(text).slots == slots


def test_brackets_without_effect_and_whitespace() -> None:
    assert parse(" [ [mha] ]*2>[swiglu]\n") == parse("mha > mha > swiglu")
    assert parse("mha()") == parse("mha")
    assert parse("{} mha") == parse("mha")


def test_the_width_comes_from_the_header_or_the_caller() -> None:
    assert parse("mha").width == 64
    assert parse("mha", width=128).width == 128
    assert parse("{width=32} mha", width=128).width == 32
    assert show(parse("mha")) == "{width=64} mha"


def test_every_header_gene_is_written_where_it_is_not_the_default() -> None:
    genome = Genome(32, (A,), "alibi", "layernorm", "sandwich", "plain", False, 50, True)
    text = (
        "{width=32, position=alibi, norm=layernorm, placement=sandwich, embedding_norm=true,"
        " tied=false, vocab=50} mha"
    )
    assert show(genome) == text
    assert parse(text) == genome


def test_sharing_labels() -> None:
    genome = parse("mha(features=@k, weights=@a) > mha(weights=@a, heads=2, features=@k)")
    assert genome.slots[1].branches[0] == Op("mha", (("heads", 2),), "a", "k")
    assert show(genome) == (
        "{width=64} mha(weights=@a, features=@k) > mha(heads=2, weights=@a, features=@k)"
    )


def test_values_take_the_type_of_their_axis() -> None:
    op = parse("swiglu(expansion=2)").slots[0].branches[0]
    assert dict(op.genes)["expansion"] == 2.0
    assert isinstance(dict(op.genes)["expansion"], float)
    op = parse("mha(qk_norm=true)").slots[0].branches[0]
    assert dict(op.genes)["qk_norm"] is True


def test_many_slots() -> None:
    assert parse(f"mha*{MAX_SLOTS}").slots == (A,) * MAX_SLOTS
    slots = tuple(np.random.default_rng(0).choice([0, 1, 2], size=MAX_SLOTS))
    genome = Genome(64, tuple((A, B, C)[int(i)] for i in slots))
    assert parse(show(genome)) == genome


HEADER_GENES = "width, position, norm, placement, residual, embedding_norm, tied, vocab"
ALL_NAMES = ", ".join(names())
MHA_AXES = ", ".join(axis.name for axis in find("mha")[0].axes)
MHA_PATTERNS = find("mha")[0].axis("pattern").allowed()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "column 1: expected an operator or '[', but the text ends"),
        ("mha >", "column 6: expected an operator or '[' after '>', but the text ends"),
        ("mha swiglu", "column 5: expected '>' or the end after the slot, not 'swiglu'"),
        ("mha | swiglu", "column 5: expected '>' or the end after the slot, not '|'"),
        (
            "mha(heads=2",
            "column 12: expected ')' or ',' after the value 2, but the text ends",
        ),
        ("mha(heads=2]", "column 12: expected ')' or ',' after the value 2, not ']'"),
        (
            "mha(weights=@a heads",
            "column 16: expected ')' or ',' after the value a, not 'heads'",
        ),
        ("mha(heads 2)", "column 11: expected '=' after heads, not '2'"),
        ("mha(,)", "column 5: expected an axis, 'weights' or 'features' after '(', not ','"),
        ("[mha > swiglu", "column 14: expected '>' or ']' after the slot, but the text ends"),
        (
            "[mha | swiglu",
            "column 14: expected '|' or ']' after a parallel branch, but the text ends",
        ),
        (
            "[mha | [swiglu]]",
            "column 8: expected an operator (a parallel branch is one operator) after '|', not '['",
        ),
        (
            "[mha > swiglu | mha]",
            "column 15: a parallel branch is one operator, without repeats or '>'",
        ),
        ("[mha*2 | mha]", "column 8: a parallel branch is one operator, without repeats or '>'"),
        ("[mha | mha](jion=sum)", "column 13: a slot has 'join' and 'tokens', not 'jion'"),
        (
            "[mha | mha](join=max)",
            "column 18: join is one of mean, sum, norm, gate, top1, chain, not max",
        ),
        ("[mha](tokens=0)", "column 14: tokens is a number from 0.001 to 1, not 0"),
        ("[mha](tokens=0.5, tokens=1)", "column 19: tokens is given twice"),
        (
            "[mha](tokens=0.5",
            "column 17: expected ')' or ',' after the value 0.5, but the text ends",
        ),
        ("[mha > swiglu](join=sum)", "column 15: expected '>' or the end after the slot, not '('"),
        ("mha*0", "column 5: repeats are a whole number of at least 1, not '0'"),
        ("mha*x", "column 5: repeats are a whole number of at least 1, not 'x'"),
        ("mha*", "column 5: expected a count of repeats after '*', but the text ends"),
        (f"mha*{'9' * 5000}", "column 5: a genome has at most 512 slots"),
        ("[mha*300]*2", "column 11: a genome has at most 512 slots"),
        ("mha*300 > swiglu*300", "column 11: a genome has at most 512 slots"),
        ("mha*2*2", "column 6: expected '>' or the end after the slot, not '*'"),
        ("[" * 33 + "mha", "column 33: brackets nest at most 32 deep"),
        ("mha(heads=2, heads=4)", "column 14: heads is given twice"),
        ("mha(weights=a)", "column 13: expected '@' after 'weights=', not 'a'"),
        (
            "mha(weights=@a-b)",
            "column 14: a label is up to 32 letters, digits and underscores, not 'a-b'",
        ),
        (
            "mha(heads=many)",
            "column 11: heads is a whole number from 1 to 1024, not many",
        ),
        ("mha(heads=inf)", "column 11: heads is a whole number from 1 to 1024, not inf"),
        ("mha(pattern=ful)", f"column 13: pattern is {MHA_PATTERNS}, not ful"),
        ("{width=0} mha", "column 8: width is a whole number from 1 to 65536, not 0"),
        ("{width=8 norm", "column 10: expected '}' or ',' after the value 8, not 'norm'"),
        ("{width=8, width=9} mha", "column 11: width is given twice"),
        (
            "{widht=8} mha",
            (
                f"column 2: the header has no gene 'widht'; it has {HEADER_GENES}; "
                "did you mean width?"
            ),
        ),
        (
            "swiglu > mamab2",
            (
                f"column 10: no primitive is named 'mamab2'; did you mean mamba2 or mamba? "
                f"There are {ALL_NAMES}"
            ),
        ),
        (
            "mha(windw=2)",
            f"column 5: attention has no axis 'windw'; it has {MHA_AXES}; did you mean window?",
        ),
    ],
)
def test_mistakes(text: str, sentence: str) -> None:
    with pytest.raises(NotationError) as caught:
        parse(text)
    assert str(caught.value) == sentence
    assert str(caught.value).startswith(f"column {caught.value.column}: ")


def test_a_wrong_default_width_is_refused() -> None:
    with pytest.raises(NotationError, match="width is a whole number from 1 to 65536, not -3"):
        parse("mha", width=-3)


TOKENS = st.sampled_from(
    [*"[]{}()|>*,=@", "mha", "mamba2", "swiglu", "heads", "width", "weights", "join", "2", "a", "é"]
)


@given(st.one_of(st.text(max_size=40), st.lists(TOKENS, max_size=20).map(" ".join)))
@settings(max_examples=400, deadline=None)
def test_any_text_is_read_or_refused_in_one_line(text: str) -> None:
    genome = error = None
    try:
        genome = parse(text)
    except NotationError as caught:
        error = caught
    if error is not None:
        assert 1 <= error.column <= len(text) + 1
        assert len(str(error).splitlines()) == 1
    if genome is not None:
        assert parse(show(genome)) == genome
