"""The commands that show, compare and list designs, for real."""

import shutil
from pathlib import Path

import pytest
from command_line import Call, caller, loads
from runs import made_run

from mendel.genome.files import dump
from mendel.genome.notation import parse
from mendel.primitives.catalogue import CATALOGUE
from mendel.proxies.tasks import TASKS

NOTATION = "{width=32} [mamba2(key_dim=8) > swiglu]*2 > [mha | mamba2(key_dim=8)]"


@pytest.fixture
def call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Call:
    return caller(tmp_path, monkeypatch, capsys)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_run(tmp_path_factory.mktemp("made"))


def test_show_draws(call: Call) -> None:
    code, out, _ = call("show", NOTATION)
    assert code == 0
    assert "whole model" in out
    assert max(map(len, out.splitlines())) <= 80


SHOW_KEYS = {"genome", "notation", "hash", "params", "active_params", "flops_per_token"} | {
    "cache_bytes",
    "context",
    "dtype",
    "slots",
    "training",
}


def test_show_takes_every_form_of_a_genome(call: Call, tmp_path: Path, made: Path) -> None:
    genome = parse(NOTATION)
    dump(genome, tmp_path / "g.yaml")
    dump(genome, tmp_path / "g.json")
    shown = [loads(call("show", what, "--json")) for what in (NOTATION, "g.yaml", "g.json")]
    assert set(shown[0]) == SHOW_KEYS
    assert shown[0] == shown[1] == shown[2]
    assert len(shown[0]["slots"]) == 5
    trial = loads(call("show", f"{made}:0", "--json"))
    preset = loads(call("show", "transformer++", "--width", "32", "--depth", "6", "--json"))
    assert trial == preset
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "mine").symlink_to(made)
    assert loads(call("show", "mine:0", "--json")) == trial


def test_show_tells_what_became_of_a_trial_and_writes_svg(
    call: Call, made: Path, tmp_path: Path
) -> None:
    code, out, _ = call("show", f"{made}:0", "--svg", "a.svg")
    assert code == 0
    assert "trial 0, complete" in out
    assert "quality 0." in out
    assert (tmp_path / "a.svg").read_text(encoding="utf-8").startswith("<svg")


def test_show_counts_at_a_context(call: Call) -> None:
    def cache(*options: str) -> int:
        return int(loads(call("show", "mha > swiglu", "--json", *options))["cache_bytes"])

    assert cache("--context", "8192") == 2 * cache("--context", "4096")
    assert cache("--dtype", "fp32") == 2 * cache("--dtype", "bf16")


def test_compare(call: Call, made: Path) -> None:
    code, out, _ = call("compare", f"{made}:0", "mamba2", "[mha > swiglu]*2")
    assert code == 0
    assert "FLOPs per token" in out
    assert max(map(len, out.splitlines())) <= 80
    rows = loads(call("compare", f"{made}:0", "{width=32} mha > swiglu", "--json"))
    assert [r["name"] for r in rows] == ["transformer++", "genome"]
    assert rows[0]["scores"]["recall"]["score"] > 0
    assert rows[1]["scores"] == {}


def test_compare_sizes_presets_to_the_trial(call: Call, made: Path) -> None:
    trial, own, sized = loads(call("compare", f"{made}:7", "mamba2", "retnet", "--json"))
    baseline = loads(call("show", f"{made}:1", "--json"))
    assert (trial["note"], own["hash"]) == (None, baseline["hash"])
    assert own["scores"]["recall"]["score"] > 0
    assert (sized["genome"]["width"], len(sized["slots"]), sized["scores"]) == (32, 6, {})
    out = " ".join(call("compare", f"{made}:7", "mamba2", "retnet")[1].split())
    assert "mamba2 is the baseline of made, trial 1." in out
    assert "retnet stands at width 32 with 6 slots" in out
    _, asked = loads(call("compare", f"{made}:7", "mamba2", "--width", "64", "--json"))
    assert (asked["genome"]["width"], len(asked["slots"]), asked["scores"]) == (64, 6, {})


def test_costs_of_a_trial_are_counted_as_its_study_counts(
    call: Call, made: Path, tmp_path: Path
) -> None:
    run = tmp_path / "runs" / "long"
    shutil.copytree(made, run)
    text = (run / "study.yaml").read_text(encoding="utf-8")
    assert "context: 4096, dtype: bf16" in text
    text = text.replace("context: 4096, dtype: bf16", "context: 512, dtype: fp32")
    (run / "study.yaml").write_text(text, encoding="utf-8")
    shown = loads(call("show", "long:0", "--json"))
    assert (shown["context"], shown["dtype"]) == (512, "fp32")
    out = " ".join(call("show", "long:0")[1].split())
    assert "one sequence of 512 tokens in fp32, as made counts cache_bytes; FLOPs" in out
    compared = loads(call("compare", "long:0", "long:1", "--json"))
    assert [(c["context"], c["dtype"]) for c in compared] == [(512, "fp32")] * 2
    asked = loads(call("show", "long:0", "--context", "64", "--json"))
    assert (asked["context"], asked["dtype"]) == (64, "bf16")


def test_listings(call: Call) -> None:
    assert [p["name"] for p in loads(call("primitives", "--json"))] == [p.name for p in CATALOGUE]
    assert [t["name"] for t in loads(call("tasks", "--json"))] == list(TASKS)
    assert "transformer++" in {p["name"] for p in loads(call("presets", "--json"))}
    for name in ("primitives", "tasks", "presets"):
        code, out, _ = call(name)
        assert code == 0
        assert max(map(len, out.splitlines())) <= 80
    for one_row in (("primitives", "mamba2"), ("primitives", "delta"), ("tasks", "byte-text")):
        assert max(map(len, call(*one_row)[1].splitlines())) <= 80
    one = loads(call("primitives", "mamba2", "--json"))
    assert "mamba2" in [p["name"] for p in one["points"]]
    assert "2405.21060" in call("primitives", "mamba2")[1]
    assert "length" in loads(call("tasks", "byte-text", "--json"))["settings"]
    assert "bits per byte" in call("tasks", "byte-text")[1]


def test_published_models_are_listed_and_shown(call: Call) -> None:
    rows = {p["name"]: p for p in loads(call("presets", "--context", "262144", "--json"))}
    jamba = rows["jamba-v0.1"]
    assert (jamba["params"], jamba["active_params"]) == (51_570_323_328, 12_110_311_296)
    assert (jamba["attention"], jamba["mixers"]) == (4, 32)
    assert rows["llama-3.1-8b"]["cache_bytes"] == 32 * 2**30
    shown = loads(call("show", "llama-3.1-8b", "--context", "262144", "--json"))
    for key in ("params", "active_params", "cache_bytes", "flops_per_token"):
        assert shown[key] == rows["llama-3.1-8b"][key]
    assert "51,570,323,328 parameters · 12,110,311,296 active" in call("show", "jamba-v0.1")[1]
    out = call("presets")[1]
    row = next(line for line in out.splitlines() if line.startswith("jamba-v0.1"))
    assert row.split()[1:3] == ["51.6G", "12.1G"]
    assert "count embedding and head" in " ".join(out.split())
    assert jamba["embedding_params"] == 65_536 * 4_096
    assert "embedding 268,435,456 in both" in " ".join(call("show", "jamba-v0.1")[1].split())
    out = call("show", "rwkv7-0.1b")[1]
    assert "layernorm (pre, embedding)" in out
    assert "embedding 65536 × 768 · layernorm" in out
    out = call("presets", "deepseek-v3")[1]
    assert "671,026,404,352" in out
    assert "YaRN" in out
    assert max(map(len, out.splitlines())) <= 80
    for wrong in (("presets", "llama-3.1-8"), ("show", "llama-3.1-8")):
        code, _, err = call(*wrong)
        assert (code, len(err.splitlines())) == (2, 1)
        assert "llama-3.1-8b" in err
    code, _, err = call("show", "llama-3.1-8b", "--width", "64")
    assert (code, len(err.splitlines())) == (2, 1)


def test_no_name_of_the_list_is_cut(call: Call) -> None:
    out = call("primitives")[1]
    assert max(map(len, out.splitlines())) <= 80
    words = set(out.replace(",", " ").split())
    assert {p.name for each in CATALOGUE for p in (each, *each.points)} <= words


def test_one_preset_is_explained(call: Call) -> None:
    code, out, _ = call("presets", "samba-like")
    assert code == 0
    assert max(map(len, out.splitlines())) <= 80
    for word in ("2406.07522", "mamba2 > swiglu > swa > swiglu", "window=32", "below 512"):
        assert word in out
    found = loads(call("presets", "samba-like", "--json"))
    shown = loads(call("show", "samba-like", "--json"))
    assert found["genome"] == shown["notation"]
    assert found["small"]["below"] == 512
    assert loads(call("presets", "retnet", "--json"))["small"] is None
    code, _, err = call("presets", "samba")
    assert (code, len(err.splitlines())) == (2, 1)
    assert "samba-like" in err
