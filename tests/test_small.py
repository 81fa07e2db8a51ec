"""Genomes in small, and the studies around them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import Call, caller
from model_configs import CONFIGS

from mendel.genome import presets, published
from mendel.genome.check import TOLERANCE, difference
from mendel.genome.cost import cost
from mendel.genome.genome import Genome
from mendel.genome.notation import parse
from mendel.genome.resolve import is_causal, primitive_of
from mendel.genome.rules import space_violations, violations
from mendel.genome.small import WIDTH, SmallError, small
from mendel.search.study import baseline_genome, load_study
from mendel.search.study_around import study_around


def primitives(genome: Genome) -> set[str]:
    return {primitive_of(op).name for *_, op in genome.ops()}


@pytest.mark.parametrize("name", published.names())
def test_every_published_model_has_a_small_form_with_all_its_operators(name: str) -> None:
    genome = published.load(name)
    made = small(genome)
    assert violations(made) == []
    assert primitives(made) == primitives(genome)
    assert (made.width, len(made.slots) <= 8) == (WIDTH, True)
    assert cost(made).total.params < 500_000


@pytest.mark.parametrize("name", ["jamba-v0.1", "kimi-linear-48b-a3b", "qwen3-next-80b-a3b"])
def test_a_small_form_works(name: str) -> None:
    assert difference(small(published.load(name)), seed=1) <= TOLERANCE


def test_kinds_of_layers_keep_their_order_and_proportion() -> None:
    genome = parse("{width=512} [gla > swiglu]*9 > [mha(window=999) > swiglu]*3")
    assert small(genome) == parse("{width=64} [gla > swiglu]*3 > mha > swiglu")
    gpt = small(published.load("gpt-oss-20b"))
    patterns = [dict(slot.branches[0].genes).get("pattern") for slot in gpt.slots[::2]]
    assert patterns == [None, "full", None, "full"]


@pytest.mark.parametrize("name", [*CONFIGS, "gpt-oss-20b", "rwkv7-0.1b", "recurrentgemma-2b"])
def test_the_study_around_a_model_runs_and_holds_it(name: str, tmp_path: Path) -> None:
    genome = published.load(name)
    path = tmp_path / "around.yaml"
    path.write_text(study_around(genome, "the model", "config.json", path), encoding="utf-8")
    study = load_study(path)
    own = baseline_genome(study.baselines[0], study.space)
    assert own == small(genome)
    assert space_violations(own, study.space) == []
    assert primitives(genome) < {primitive_of(op).name for op in _ops(list(study.space.operators))}


def _ops(names: list[str]) -> list[object]:
    return [op for name in names for *_, op in parse(name).ops()]


CAUSAL = [name for name in presets.names() if is_causal(presets.load(name))]


@pytest.mark.parametrize("name", CAUSAL)
def test_a_study_around_a_preset_runs(name: str, tmp_path: Path) -> None:
    path = tmp_path / "around.yaml"
    path.write_text(study_around(presets.load(name), name, "x", path), encoding="utf-8")
    study = load_study(path)
    assert space_violations(baseline_genome(study.baselines[0], study.space), study.space) == []


def test_what_has_no_small_form_is_one_line() -> None:
    with pytest.raises(SmallError) as caught:
        small(parse("{width=512} linformer(max_length=1000000, landmarks=4096, heads=3)"))
    assert str(caught.value).startswith("in small, at width 64: slot 0")


@pytest.fixture
def call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Call:
    return caller(tmp_path, monkeypatch, capsys)


def test_import_starts_a_search(tmp_path: Path, call: Call) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["jamba-v0.1"]), encoding="utf-8")
    code, out, _ = call("import", ".", "--study", "around.yaml", "--out", "mine.yaml")
    assert code == 0
    assert "mendel search around.yaml --dry-run" in out
    assert (tmp_path / "mine.yaml").exists()
    assert load_study(tmp_path / "around.yaml").baselines[0].name == "around-small"


def test_where_one_file_cannot_be_written_none_stays(tmp_path: Path, call: Call) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["llama-2-7b"]), encoding="utf-8")
    # A name so long that its scratch file cannot be made.
    long = "a" * 248 + ".yaml"
    code, _, err = call("import", ".", "--out", "mine.yaml", "--study", long)
    assert (code, "cannot be written: File name too long" in err) == (2, True)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_one_name_for_two_files_writes_neither(tmp_path: Path, call: Call) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["llama-2-7b"]), encoding="utf-8")
    code, _, err = call("import", ".", "--study", "a.yaml", "--out", "a.yaml")
    assert (code, "both name" in err) == (2, True)
    assert not (tmp_path / "a.yaml").exists()
