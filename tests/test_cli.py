"""Every command for real, and every mistake: one line, exit code 2, nothing created."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import Call, caller, loads
from runs import REASON, made_run

from mendel.search import commands_setup
from mendel.search.cli import app
from mendel.search.template import TEMPLATE

STUDY = """\
name: tiny
question: does it end?
space:
  width: 16
  depth: [2, 3]
  operators: {mha: {heads: [2]}, mamba2: {key_dim: [8]}, swiglu: {expansion: [1.0, 2.0]}}
proxies:
  recall:
    {task: in-context-recall, steps: 4, batch: 4, length: 16, train_examples: 64, test_examples: 32}
objectives: [quality, params]
search: {trials: 4, population: 4, rungs: [0.5, 1.0], eta: 2}
baselines: [transformer++]
workers: {executor: serial, time_limit: 60}
"""


@pytest.fixture
def call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Call:
    return caller(tmp_path, monkeypatch, capsys)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_run(tmp_path_factory.mktemp("made"))


def test_every_command_has_help_with_an_example(call: Call) -> None:
    commands = [c.name or c.callback.__name__ for t in app.registered_groups
                for c in t.typer_instance.registered_commands if c.callback]  # fmt: skip
    assert len(commands) >= 13
    for name in commands:
        code, out, _ = call(name, "--help")
        assert code == 0
        assert f"Example: mendel {name}" in out, name
    assert all(name in call("--help")[1] for name in commands)


def test_version_and_help(call: Call) -> None:
    assert call("--version")[:2] == (0, "mendel 0.1.0\n")
    code, out, _ = call()
    assert code == 2
    assert "Usage: mendel" in out


def test_front(call: Call, made: Path) -> None:
    code, out, _ = call("front", str(made), "--all")
    assert code == 0
    assert "knee" in out
    assert "transformer++" in out
    assert "it needs more than the limit" in " ".join(out.split())
    found = loads(call("front", str(made), "--json"))
    assert found["failed"][0]["failure"]["reason"] == REASON
    assert {b["baseline"] for b in found["baselines"]} >= {"transformer++", "mamba2"}
    assert found["knee"] in [t["trial"] for t in found["front"]]
    fewer = loads(call("front", str(made), "--objectives", "cache_bytes", "--json"))
    assert [o["label"] for o in fewer["objectives"]] == ["cache_bytes"]


def test_report_and_export(call: Call, made: Path, tmp_path: Path) -> None:
    assert call("report", str(made), "--out", "r.html")[0] == 0
    assert (tmp_path / "r.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    found = loads(call("export", f"{made}:0", "--out", "won", "--json"))
    assert "genome.yaml" in found["files"]
    assert (
        loads(call("show", "won/genome.json", "--json"))["hash"]
        == loads(call("show", f"{made}:0", "--json"))["hash"]
    )


def test_doctor(call: Call) -> None:
    code, out, _ = call("doctor", "--json")
    found = json.loads(out)
    names = {f["name"] for f in found["findings"]}
    assert {"python", "torch", "ray", "bf16", "triton kernels", "cores", "disk", "text"} <= names
    assert code == (0 if found["ready"] else 1)
    out = call("doctor")[1]
    assert "torch" in out
    assert f"Python is {sys.executable}" in out.splitlines()


def test_init_writes_a_study_that_is_accepted(call: Call, tmp_path: Path) -> None:
    code, out, _ = call("init", "first.yaml")
    assert code == 0
    assert "first.yaml" in out
    text = (tmp_path / "first.yaml").read_text(encoding="utf-8")
    assert text == TEMPLATE.format(file="first.yaml", name="first")
    small = ["--set", "proxies.text.test_bytes=256", "--set", "proxies.recall.test_examples=8"]
    found = loads(call("search", "first.yaml", "--dry-run", "--json", *small))
    assert found["trials"] == 24
    assert found["time"]["seconds"] > 0
    assert len(found["samples"]) == 5
    assert not (tmp_path / "runs").exists()


def test_search_ends_with_table_report_and_winners(call: Call, tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(STUDY, encoding="utf-8")
    code, out, err = call("search", "tiny.yaml")
    assert code == 0, err
    assert "The front of tiny" in out
    assert "runs/tiny/report.html" in out
    assert "4/4 trials" in err
    assert "hv " in err
    folder = tmp_path / "runs" / "tiny"
    assert (folder / "report.html").is_file()
    found = loads(call("front", "tiny", "--json"))
    own = [t["trial"] for t in found["front"] if t["baseline"] is None]
    assert sorted(p.name for p in (folder / "winners").iterdir()) == [
        f"trial-{n:05d}" for n in sorted(own)
    ]
    # The same command again finds everything done and changes no result.
    again = loads(call("search", "tiny.yaml", "--json"))
    assert again["front"] == found["front"]
    assert again["state"] == "complete"
    more = loads(call("search", "tiny.yaml", "--trials", "5", "--json"))
    assert sum(len(more[k]) for k in ("front", "dominated", "stopped", "failed")) == 6


def test_train_resumes_and_spreads(call: Call, tmp_path: Path) -> None:
    base = ["train", "{width=16} mha(heads=2) > swiglu", "--proxy", "in-context-recall"]
    base += ["--out", "t", "--batch", "4", "--set", "length=16", "--set", "train_examples=32"]
    base += ["--set", "test_examples=16", "--json"]
    first = loads(call(*base, "--steps", "6", "--seeds", "0,1"))
    assert [r["seed"] for r in first["seeds"]] == [0, 1]
    assert first["summary"]["score"]["count"] == 2
    assert first["summary"]["score"]["std"] is not None
    assert (tmp_path / "t" / "seed-1" / "checkpoint.safetensors").is_file()
    assert "seed 1" in (tmp_path / "t" / "curves.html").read_text(encoding="utf-8")
    curve = json.loads((tmp_path / "t" / "seed-0" / "curve.json").read_text())
    assert [r["step"] for r in curve if "loss" in r][-1] == 6
    second = loads(call(*base, "--steps", "6", "--seeds", "0,1,2"))
    assert second["seeds"][0]["scores"] == first["seeds"][0]["scores"]
    assert second["summary"]["score"]["count"] == 3
    code, _, err = call(*base, "--steps", "7")
    assert code == 2
    assert "another training: proxy.steps is 6 there and 7 here; the learning-rate" in err


def test_train_uses_the_proxies_of_a_run(call: Call, made: Path) -> None:
    arguments = ["--steps", "2", "--set", "train_examples=16", "--set", "test_examples=8"]
    found = loads(
        call("train", f"{made}:0", "--proxy", "recall", *arguments, "--out", "t", "--json")
    )
    assert found["proxy"]["length"] == 16
    assert found["proxy"]["batch"] == 4


def test_verify_genomes(call: Call) -> None:
    found = loads(call("verify-genomes", "--count", "3", "--json"))
    assert found["count"] == 3
    assert found["disagree"] == []


def write(tmp_path: Path, old: str = "", new: str = "") -> None:
    assert old in STUDY
    (tmp_path / "bad.yaml").write_text(STUDY.replace(old, new, 1), encoding="utf-8")


BAD_STUDIES = {
    "unknown key": ("search: {", "serach: {", ["bad.yaml:11:1", "serach", "search"]),
    "unknown key below": ("eta: 2", "etaa: 2", ["bad.yaml:11", "search.etaa", "eta"]),
    "wrong type": ("trials: 4", "trials: four", ["bad.yaml:11", "search.trials", "four"]),
    "wrong range": ("eta: 2", "eta: 1", ["bad.yaml:11", "search.eta", "2"]),
    "empty space": (
        "{mha: {heads: [2]}, mamba2: {key_dim: [8]}, swiglu: {expansion: [1.0, 2.0]}}",
        "{}",
        ["bad.yaml:6", "operators"],
    ),
    "no value of an axis": ("heads: [2]", "heads: []", ["bad.yaml:6", "heads"]),
    "unknown operator": ("mha:", "mhaa:", ["bad.yaml:6", "mhaa", "mha"]),
    "unknown axis": ("key_dim", "keydim", ["bad.yaml:6", "keydim", "key_dim"]),
    "impossible constraint": (
        "  operators:",
        "  constraints: {params: {max: 10}}\n  operators:",
        ["bad.yaml:6", "constraints", "params"],
    ),
    "unknown task": ("in-context-recall", "recall-in-context", ["bad.yaml", "in-context-recall"]),
    "missing text": (
        "proxies:",
        "proxies:\n  text: {task: byte-text, steps: 2, text: nowhere.txt}",
        ["bad.yaml:8", "nowhere.txt"],
    ),
    "unknown objective": ("params]", "speed]", ["bad.yaml:10", "speed", "params"]),
    "unknown baseline": ("[transformer++]", "[bert]", ["bad.yaml:12", "bert", "transformer++"]),
    "runs is a file": ("name: tiny", "runs: bad.yaml/x\nname: tiny", ["bad.yaml:1", "runs"]),
    "no YAML": ("name: tiny", "name: [tiny", ["bad.yaml"]),
    "a key twice": ("name: tiny", "name: tiny\nname: two", ["bad.yaml:2", "name"]),
    "bad name": ("name: tiny", "name: ../up", ["bad.yaml:1", "name"]),
}


@pytest.mark.parametrize("case", BAD_STUDIES)
def test_a_bad_study_is_one_line(call: Call, tmp_path: Path, case: str) -> None:
    old, new, words = BAD_STUDIES[case]
    write(tmp_path, old, new)
    for options in ([], ["--dry-run"]):
        code, out, err = call("search", "bad.yaml", *options)
        assert code == 2, err
        assert out == ""
        assert len(err.splitlines()) == 1, err
        for word in words:
            assert word in err, err
        assert [p.name for p in tmp_path.iterdir()] == ["bad.yaml"]


def test_a_folder_that_cannot_be_made(call: Call, tmp_path: Path) -> None:
    # Not even root can make a folder there, and permissions do not say so beforehand.
    write(tmp_path, "name: tiny", "runs: /proc/none\nname: tiny")
    code, out, err = call("search", "bad.yaml")
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert "/proc/none" in err
    assert [p.name for p in tmp_path.iterdir()] == ["bad.yaml"]


MISTAKES: dict[str, tuple[list[str], list[str]]] = {
    "no study": (["search", "none.yaml"], ["none.yaml"]),
    "study is a folder": (["search", "."], ["."]),
    "executor": (["search", "s.yaml", "--executor", "dask"], ["--executor", "serial", "dask"]),
    "set": (["search", "s.yaml", "--set", "search.seed"], ["--set", "key=value"]),
    "address of nobody": (
        ["search", "s.yaml", "--address", "127.0.0.1:1"],
        ["--address: nobody answers at 127.0.0.1:1", "refused"],
    ),
    "address": (["search", "s.yaml", "--address", "head"], ["'head' is no address", "HOST:PORT"]),
    "workers": (["search", "s.yaml", "--workers", "0"], ["--workers", "1"]),
    "notation": (["show", "[mha > swiglu"], ["column 14", "']'"]),
    "notation axis": (["show", "mha(headz=2)"], ["column 5", "headz", "heads"]),
    "notation value": (["show", "mha(heads=two)"], ["column 11", "two", "whole number"]),
    "invalid genome": (["show", "swiglu"], ["mixer"]),
    "operators do not fit": (["show", "{width=10} mha(heads=4)"], ["heads", "10"]),
    "unknown preset": (
        ["show", "transfomer++"],
        ["named 'transfomer++'; did you mean transformer++"],
    ),
    "empty": (["show", ""], ["empty"]),
    "no file": (["show", "none.yaml"], ["none.yaml"]),
    "a folder": (["show", "/proc"], ["/proc is a folder and no genome", ".yaml"]),
    "a file that is none": (["show", "/proc/version"], ["/proc/version is a file and no genome"]),
    "no run": (["show", "none:3"], ["none"]),
    "dtype": (["show", "mha", "--dtype", "int8"], ["--dtype", "bf16", "int8"]),
    "context": (["show", "mha", "--context", "0"], ["--context"]),
    "width of a notation's depth": (["show", "mha > swiglu", "--depth", "3"], ["--depth"]),
    "svg": (["show", "mha", "--svg", "a.png"], ["--svg", "a.png"]),
    "compare one": (["compare", "mamba2"], ["two to four", "1"]),
    "compare five": (["compare", *["mamba2"] * 5], ["two to four", "5"]),
    "primitive": (
        ["primitives", "mambo"],
        ["no primitive is named 'mambo'; did you mean mamba or mamba2? There are"],
    ),
    "task": (["tasks", "recal"], ["recal", "in-context-recall"]),
    "front of nothing": (["front", "none"], ["none"]),
    "front of an empty folder": (["front", "."], ["no run here"]),
    "report of nothing": (["report", "none"], ["none"]),
    "export without out": (["export", "mamba2"], ["--out"]),
    "export format": (["export", "mamba2", "--out", "x", "--format", "onnx"], ["onnx", "genome"]),
    "export seed": (
        ["export", "mamba2", "--out", "x", "--format", "hf", "--seed", "1"],
        ["--seed", "mamba2"],
    ),
    "export of what reads ahead": (
        ["export", "bilstm", "--out", "x", "--format", "hf"],
        ["--format hf", "bilstm reads later tokens"],
    ),
    "export of another preset": (["export", "mambo", "--out", "x"], ["mambo", "mamba2"]),
    "verify nothing": (["verify", "x"], ["x is no folder"]),
    "train task": (["train", "mamba2", "--proxy", "rec", "--out", "x"], ["rec", "byte-text"]),
    "train seeds": (
        ["train", "mamba2", "--proxy", "byte-text", "--out", "x", "--seeds", "0,a"],
        ["--seeds", "0,a"],
    ),
    "train lr": (
        ["train", "mamba2", "--proxy", "byte-text", "--out", "x", "--lr", "-1"],
        ["mendel: --lr is a number above 0"],
    ),
    "train setting": (
        ["train", "mamba2", "--proxy", "byte-text", "--out", "x", "--set", "lenght=4"],
        ["--set: there is no setting 'lenght'; mendel tasks"],
    ),
    "train setting's value": (
        ["train", "mamba2", "--proxy", "in-context-recall", "--out", "x", "--set", "length=1"],
        ["--set: length: it should be greater than or equal to 4"],
    ),
    "train device": (
        ["train", "mamba2", "--proxy", "byte-text", "--out", "x", "--device", "tpu"],
        ["--device", "tpu", "cpu"],
    ),
    "train without the device": (
        ["train", "mamba2", "--proxy", "byte-text", "--out", "x", "--device", "cuda:99"],
        ["--device: ", "cuda:99", "auto, cpu"],
    ),
    "init name": (["init", "study.txt"], ["study.txt", ".yaml"]),
    "init folder": (["init", "no/study.yaml"], ["no"]),
    "unknown command": (["serach"], ["serach"]),
    "unknown option": (["presets", "--colour"], ["--colour"]),
    "missing argument": (["show"], ["'what'"]),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line(call: Call, tmp_path: Path, case: str) -> None:
    arguments, words = MISTAKES[case]
    if "s.yaml" in arguments:
        (tmp_path / "s.yaml").write_text(STUDY, encoding="utf-8")
    before = sorted(tmp_path.iterdir())
    code, out, err = call(*arguments)
    assert code == 2, (out, err)
    assert out == ""
    assert len(err.splitlines()) == 1, err
    assert "Traceback" not in err
    for word in words:
        assert word in err, err
    assert sorted(tmp_path.iterdir()) == before


def test_nothing_is_overwritten(call: Call, tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_text("mine", encoding="utf-8")
    assert call("init")[0] == 2
    assert (tmp_path / "study.yaml").read_text() == "mine"
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine").write_text("mine", encoding="utf-8")
    for command in (["export", "mamba2"], ["train", "mamba2", "--proxy", "byte-text"]):
        code, _, err = call(*command, "--out", "folder")
        assert code == 2
        assert "folder" in err
    assert [p.name for p in (tmp_path / "folder").iterdir()] == ["mine"]


def test_another_trial_of_a_run(call: Call, made: Path) -> None:
    code, _, err = call("show", f"{made}:999")
    assert code == 2
    assert "999" in err
    assert "0 to 24" in err
    code, _, err = call("front", str(made), "--objectives", "quality,speed")
    assert code == 2
    assert "cache_bytes" in err


def test_the_installed_command_in_a_terminal_without_unicode(tmp_path: Path) -> None:
    done = subprocess.run(
        [Path(sys.executable).with_name("mendel"), "show", "[mamba2 > swiglu]*2"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONIOENCODING": "ascii", "COLUMNS": "80"},
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.isascii()
    assert b"x2" in done.stdout


def test_debugging_shows_where(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MENDEL_DEBUG", "1")
    code, _, err = call("show", "mha >")
    assert code == 2
    assert "Traceback" in err
    assert err.splitlines()[-1].startswith("mendel: column")


def test_a_fault_of_ours_is_told_apart(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(folder: Path) -> list[object]:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr(commands_setup, "examine", broken)
    code, _, err = call("doctor")
    assert code == 1
    assert len(err.splitlines()) == 1
    assert "ZeroDivisionError: division by zero (a fault of mendel" in err


def test_ctrl_c_is_one_line(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(folder: Path) -> list[object]:
        raise KeyboardInterrupt

    monkeypatch.setattr(commands_setup, "examine", interrupted)
    code, out, err = call("doctor")
    assert (code, out, err) == (130, "", "mendel: interrupted\n")


def test_a_closed_pipe_is_no_error(tmp_path: Path) -> None:
    program = Path(sys.executable).with_name("mendel")
    done = subprocess.run(
        ["bash", "-c", f"{program} primitives --json | head -c 1; exit ${{PIPESTATUS[0]}}"],
        cwd=tmp_path,
        capture_output=True,
    )
    assert done.stderr == b""
    assert done.stdout == b"["
    assert done.returncode in (0, 141)
