"""Genomes as JSON and YAML."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from mendel.genome.check import wide_space
from mendel.genome.files import GenomeFileError, dump, from_dict, load, to_dict
from mendel.genome.genome import GRAMMAR_VERSION, Genome
from mendel.genome.notation import parse
from mendel.genome.sample import sample_valid

GENOME = parse(
    "{width=32, tied=false} gqa(kv_heads=2, features=@a) > [gqa(features=@a) | mamba2](join=sum) "
    "> [swiglu](join=norm) > [mamba2](tokens=0.5)"
)


def with_slot(slot: Any) -> dict[str, Any]:
    return {"grammar": 1, "slots": [{"op": "mha"}, slot]}


def test_the_form() -> None:
    assert to_dict(GENOME) == {
        "grammar": 1,
        "width": 32,
        "position": "rope",
        "norm": "rmsnorm",
        "placement": "pre",
        "residual": "plain",
        "embedding_norm": False,
        "tied": False,
        "vocab": 256,
        "slots": [
            {"op": "gqa", "genes": {"kv_heads": 2}, "features": "a"},
            {"parallel": [{"op": "gqa", "features": "a"}, {"op": "mamba2"}], "join": "sum"},
            {"parallel": [{"op": "swiglu"}], "join": "norm"},
            {"parallel": [{"op": "mamba2"}], "join": "mean", "tokens": 0.5},
        ],
    }


def test_random_genomes_come_back() -> None:
    space = wide_space()
    for seed in range(300):
        genome = sample_valid(space, np.random.default_rng(seed))
        data = to_dict(genome)
        assert from_dict(json.loads(json.dumps(data))) == genome
        assert from_dict(yaml.safe_load(yaml.safe_dump(data))) == genome


@pytest.mark.parametrize("suffix", [".json", ".yaml", ".yml"])
def test_files_come_back(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"genome{suffix}"
    dump(GENOME, path)
    assert load(path) == GENOME


def test_absent_header_genes_take_their_defaults() -> None:
    assert from_dict({"grammar": 1, "slots": [{"op": "mha"}]}) == parse("mha")


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        ([], "the genome is a mapping, not a list"),
        ({"slots": []}, "grammar is missing: write grammar: 1"),
        ({"grammar": "1"}, "grammar is a whole number of at least 1, not '1'"),
        (
            {"grammar": GRAMMAR_VERSION + 1, "future": 1},
            (
                f"grammar {GRAMMAR_VERSION + 1} is newer than this version of mendel, which reads "
                f"grammar {GRAMMAR_VERSION}"
            ),
        ),
        ({"grammar": 1}, "slots is missing: a list of slots"),
        ({"grammar": 1, "slots": {}}, "slots is a list, not a mapping"),
        (
            {"grammar": 1, "slots": [{"op": "mha"}] * 513},
            "slots has 513 entries; a genome has at most 512",
        ),
        (
            {"grammar": 1, "slots": [], "widht": 4},
            (
                "widht is unknown; allowed are grammar, width, position, norm, placement, "
                "residual, embedding_norm, tied, vocab, slots; did you mean width?"
            ),
        ),
        ({"grammar": 1, "slots": [], 5: 4}, "the genome has the key 5, which is no text"),
        (
            {"grammar": 1, "slots": [], "width": "64"},
            "width is a whole number from 1 to 65536, not 64",
        ),
        ({"grammar": 1, "slots": [], "tied": 1}, "tied is one of false, true, not 1"),
        (with_slot("mha"), "slots[1] is a mapping, not 'mha'"),
        (with_slot({}), "slots[1].op is missing: the name of a primitive"),
        (with_slot({"op": 3}), "slots[1].op is the name of a primitive, not 3"),
        (
            with_slot({"op": "mha", "join": "sum"}),
            "slots[1].join is unknown; allowed are op, genes, weights, features",
        ),
        (with_slot({"op": "mha", "genes": [1]}), "slots[1].genes is a mapping, not a list"),
        (
            with_slot({"op": "mha", "genes": {"heads": True}}),
            "slots[1].genes.heads: heads is a whole number from 1 to 1024, not true",
        ),
        (
            with_slot({"op": "mha", "weights": 3}),
            "slots[1].weights is a label of up to 32 letters, digits and underscores, not 3",
        ),
        (
            with_slot({"parallel": []}),
            "slots[1].parallel is a list of one operator or more, not a list",
        ),
        (
            with_slot({"parallel": [{"op": "mha"}, {"op": "mha", "genes": {"heads": 0}}]}),
            "slots[1].parallel[1].genes.heads: heads is a whole number from 1 to 1024, not 0",
        ),
        (
            with_slot({"parallel": [{"op": "mha"}], "join": "max"}),
            "slots[1].join: join is one of mean, sum, norm, gate, top1, chain, not max",
        ),
        (
            with_slot({"parallel": [{"op": "mha"}], "tokens": 2}),
            "slots[1].tokens: tokens is a number from 0.001 to 1, not 2",
        ),
    ],
)
def test_mistakes(data: Any, sentence: str) -> None:
    with pytest.raises(GenomeFileError) as caught:
        from_dict(data)
    assert str(caught.value) == sentence


def test_an_unknown_primitive_is_told_the_nearest_name() -> None:
    with pytest.raises(
        GenomeFileError, match=r"^slots\[1\]\.op: no primitive is named 'mamba3'"
    ) as caught:
        from_dict(with_slot({"op": "mamba3"}))
    assert "'mamba3'; did you mean mamba or mamba2? There are " in str(caught.value)


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("g.json", "{", "line 1, column 2: not JSON: Expecting property name enclosed in double"),
        ("g.yaml", "a: [", "line 1, column 5: not YAML: expected the node content"),
        ("g.yaml", "!!python/object:os.system {}", "not YAML: could not determine a constructor"),
        ("g.yaml", "", "the genome is a mapping, not none"),
        ("g.yaml", "grammar: 1\nslots: [{op: mha, genes: {heads: x}}]", "slots[0].genes.heads: "),
        ("g.txt", "", "a genome file ends in .json, .yaml, .yml"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, text: str, sentence: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(GenomeFileError) as caught:
        load(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert sentence in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_missing_and_unwritable_files(tmp_path: Path) -> None:
    with pytest.raises(GenomeFileError, match="cannot be read: No such file or directory"):
        load(tmp_path / "none.json")
    with pytest.raises(GenomeFileError, match="cannot be written: No such file or directory"):
        dump(GENOME, tmp_path / "none" / "g.json")
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(GenomeFileError, match="is not a text file in UTF-8"):
        load(tmp_path / "bytes.json")


def test_dumping_leaves_the_genome_alone(tmp_path: Path) -> None:
    before = Genome(**{f: getattr(GENOME, f) for f in Genome.__dataclass_fields__})
    to_dict(GENOME)["slots"].clear()
    assert before == GENOME
