"""The proof of an export: what is whole passes, and any file that was touched is found."""

import builtins
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import Call, caller, loads
from exported import trained
from safetensors.torch import load_file, save_file

from mendel.search.exports.folder import export
from mendel.search.exports.order import Order
from mendel.search.exports.proof import OWN, own_hash, seal
from mendel.search.exports.verify import Result, verify
from mendel.search.source import find_genome
from mendel.search.terminal import Mistake

MODEL_CHECKS = {
    *("config", "code", "weights", "load", "logits", "cache", "generation", "padding", "tied"),
    *("gradients", "save", "tokenizer"),
}
MIXTURE = (
    "mixtral(activation=relu, copy=1, expansion=1.0, experts=16, gated=false, "
    "router_residual=true, score=sigmoid)"
)
DESIGN_CHECKS = {"files", "genome", "hash", "costs"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    training = trained(tmp_path_factory.mktemp("training") / "small")
    order = Order(find_genome(str(training)))
    return export(order, tmp_path_factory.mktemp("out") / "proved", "hf")


@pytest.fixture(scope="module")
def design(tmp_path_factory: pytest.TempPathFactory) -> Path:
    order = Order(find_genome("{width=16} [mamba2 > swiglu]*2"))
    return export(order, tmp_path_factory.mktemp("out") / "design")


@pytest.fixture
def call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Call:
    return caller(tmp_path, monkeypatch, capsys)


def failures(folder: Path) -> dict[str, str]:
    return {r.name: r.said for r in verify(folder) if r.state == "failed"}


def copied(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy" / folder.name))


def test_a_model_is_proved(model: Path, call: Call) -> None:
    found = loads(call("verify", str(model), "--json"))
    assert found["verified"]
    assert {c["name"] for c in found["checks"]} == MODEL_CHECKS | DESIGN_CHECKS
    assert {c["state"] for c in found["checks"]} == {"passed"}


def test_a_design_without_weights_is_proved_with_fresh_ones(tmp_path: Path) -> None:
    genome = find_genome("{width=16, residual=ngpt} mha(heads=2) > swiglu")
    results = list(verify(export(Order(genome), tmp_path / "fresh", "hf")))
    assert {r.name for r in results if r.state == "skipped"} == {"weights"}
    assert not [r for r in results if r.state == "failed"]


def test_experts_behind_a_router_are_the_same_after_saving(tmp_path: Path) -> None:
    # Their products round otherwise where a file's tensors lie, which no alignment holds.
    header = "{width=64, position=t5, norm=none, placement=sandwich}"
    genome = find_genome(f"{header} attention > [{MIXTURE}](tokens=0.4)")
    results = list(verify(export(Order(genome), tmp_path / "fresh", "hf")))
    assert [(r.name, r.said) for r in results if r.state == "failed"] == []


def test_other_formats_are_proved(design: Path, tmp_path: Path, call: Call) -> None:
    code, out, _ = call("verify", str(design))
    assert code == 0
    assert "is verified" in out
    assert "skipped" not in out
    card = export(Order(find_genome("mamba2")), tmp_path / "card", "card")
    assert "is verified but for what was skipped (costs)" in call("verify", str(card))[1]
    assert {r.name: r.state for r in verify(card)} == {
        "files": "passed",
        "genome": "passed",
        "hash": "passed",
        "costs": "skipped",
    }


@pytest.mark.parametrize(
    "name",
    [
        *("README.md", "config.json", "costs.json", "genome.json", "genome.yaml", "scores.json"),
        *("generation_config.json", "model.safetensors", "tokenizer.json", "verify.safetensors"),
        *("tokenizer_config.json", "modeling_mendel.py", "mendel_genome_model.py"),
        "provenance.json",
    ],
)
def test_every_touched_file_is_found(name: str, model: Path, tmp_path: Path) -> None:
    folder = copied(model, tmp_path)
    path = folder / name
    content = path.read_bytes()
    if name == "provenance.json":
        path.write_bytes(content.replace(b'"seed": 0', b'"seed": 1', 1))
    else:
        path.write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
    assert f"{name} was changed" in failures(folder)["files"]
    path.unlink()
    if name == "provenance.json":
        with pytest.raises(Mistake, match="is no export"):
            list(verify(folder))
    else:
        assert f"{name} is missing" in failures(folder)["files"]


def test_touched_code_is_not_run(model: Path, tmp_path: Path) -> None:
    folder, trace = copied(model, tmp_path), tmp_path / "trace"
    path = folder / "modeling_mendel.py"
    path.write_text(f"{path.read_text()}\nopen({str(trace)!r}, 'w').close()\n")
    last = list(verify(folder))[-1]
    assert (last.name, last.state) == ("model", "skipped")
    assert not trace.exists()
    sealed(folder)
    assert list(verify(folder))[-1].name == "tokenizer"
    assert trace.exists()


def test_the_seal_tells_one_folder_from_another_sealed_anew(
    design: Path, tmp_path: Path, call: Call
) -> None:
    """Hashes are no signature; the seal that the export printed is what is compared."""
    folder = tmp_path / "out"
    given = loads(call("export", "{width=16} mamba2", "--out", str(folder), "--json"))["seal"]
    assert loads(call("verify", str(folder), "--json"))["seal"] == given
    (folder / "README.md").write_text("better scores")
    sealed(folder)
    code, out, _ = call("verify", str(folder))
    assert code == 0
    assert "its seal is" in out
    assert given not in out


def test_what_a_hub_adds_is_no_difference(design: Path, tmp_path: Path) -> None:
    folder = copied(design, tmp_path)
    (folder / ".git").mkdir()
    (folder / ".git" / "HEAD").write_text("x")
    (folder / ".gitattributes").write_text("x")
    assert failures(folder) == {}


def test_a_provenance_without_its_genome_fails(model: Path, tmp_path: Path) -> None:
    folder = copied(model, tmp_path)
    facts = json.loads((folder / "provenance.json").read_text())
    kept = {k: v for k, v in facts.items() if k not in ("files", OWN)}
    seal(folder, {**kept, "genome": {**facts["genome"], "notation": "{width=16} nothing"}})
    assert set(failures(folder)) == {"genome"}
    seal(folder, {k: v for k, v in kept.items() if k != "genome"})
    assert failures(folder) == {"genome": "provenance.json names no genome"}


def test_an_added_file_is_found(design: Path, tmp_path: Path) -> None:
    folder = copied(design, tmp_path)
    (folder / "extra.py").write_text("")
    assert failures(folder) == {"files": "extra.py was added"}


def sealed(folder: Path) -> None:
    """Hash the files anew, as somebody would who changes a model on purpose."""
    facts = json.loads((folder / "provenance.json").read_text())
    seal(folder, {k: v for k, v in facts.items() if k not in ("files", OWN)})


def other_weights(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.embedding.weight"] += 0.01
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def other_shape(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.embedding.weight"] = torch.zeros(3, 3)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def infinite(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.embedding.weight"][0, 0] = float("inf")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def edited(name: str, old: str, new: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new))

    return change


CHANGES: dict[str, tuple[Callable[[Path], None], set[str]]] = {
    "weights of another model": (other_weights, {"logits"}),
    "weights that do not fit": (other_shape, {"weights"}),
    "weights that are not finite": (infinite, {"weights"}),
    "another blueprint": (edited("config.json", '"top_k": 2', '"top_k": 1'), {"config"}),
    "code from elsewhere": (
        edited("config.json", '"modeling_mendel.Mendel', '"some/where--modeling_mendel.Mendel'),
        {"config"},
    ),
    "another genome": (edited("genome.json", '"width": 32', '"width": 64'), {"genome"}),
    "other costs": (edited("costs.json", '"context": 4096', '"context": 4097'), {"costs"}),
    "a cache that forgets": (
        edited(
            "modeling_mendel.py",
            "self.groups[number] = (rows, new)",
            "self.groups[number] = (rows, model.init_state(len(rows), self.room))",
        ),
        {"cache", "generation"},
    ),
    "padding that is read": (
        edited("modeling_mendel.py", "pads: list[int] = first.tolist()", "pads = [0] * len(told)"),
        {"padding"},
    ),
    "a code that does not run": (
        edited("modeling_mendel.py", "import torch\n", "import to\n"),
        {"load"},
    ),
    "a tokenizer of characters": (
        edited("tokenizer.json", '"type": "ByteLevel"', '"type": "Whitespace"'),
        {"tokenizer"},
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_checks_find_what_hashes_cannot(name: str, model: Path, tmp_path: Path) -> None:
    change, wanted = CHANGES[name]
    folder = copied(model, tmp_path)
    change(folder)
    sealed(folder)
    found = failures(folder)
    assert "files" not in found
    assert set(found) >= wanted, found


def sealed_by(folder: Path, **facts: Any) -> None:
    """Hash the files anew as another version would have done it."""
    held = json.loads((folder / "provenance.json").read_text())
    kept = {k: v for k, v in held.items() if k not in ("files", OWN)}
    seal(folder, kept | facts)


@pytest.mark.parametrize("other", [{"mendel": "0.0.1"}, {"commit": "f" * 40}])
def test_what_another_version_wrote_is_said_to_be_its(
    other: dict[str, str], model: Path, tmp_path: Path, call: Call
) -> None:
    folder = copied(model, tmp_path)
    for name in ("mendel_genome_model.py", "mendel_genome_blueprint.py"):
        edited(name, "from __future__", "# As it was once.\nfrom __future__")(folder)
    edited("costs.json", '"context": 4096', '"context": 4097')(folder)
    sealed_by(folder, **other)
    found = {r.name: r for r in verify(folder)}
    assert {r.name for r in found.values() if r.state != "passed"} == {"code", "costs"}
    assert {found[name].state for name in ("code", "costs")} == {"skipped"}
    said = found["code"].said
    assert "mendel_genome_blueprint.py and 1 other file of code are not what this version" in said
    assert "written by mendel 0." in said
    assert other.get("mendel", "fffffffff;") in said
    code, out, _ = call("verify", str(folder))
    assert code == 0
    assert "is verified but for what was skipped (costs, code)" in " ".join(out.split())


def test_what_this_version_did_not_write_fails_where_it_is_named(
    model: Path, tmp_path: Path
) -> None:
    folder = copied(model, tmp_path)
    edited("mendel_genome_model.py", "from __future__", "# More.\nfrom __future__")(folder)
    sealed(folder)
    words = "mendel_genome_model.py is not what this version writes, though it says that this"
    found = failures(folder)
    assert set(found) == {"code"}
    assert found["code"].startswith(words)


def test_the_exit_code_and_the_words_name_the_check(
    design: Path, tmp_path: Path, call: Call
) -> None:
    folder = copied(design, tmp_path)
    (folder / "README.md").write_text("better scores")
    code, out, _ = call("verify", str(folder))
    assert code == 1
    assert "failed: files" in out
    assert "README.md was changed" in " ".join(out.split())


def test_what_is_no_export_is_a_mistake(tmp_path: Path, call: Call, design: Path) -> None:
    (tmp_path / "empty").mkdir()
    newer = copied(design, tmp_path)
    edited("provenance.json", '"grammar": 1', '"grammar": 99')(newer)
    for folder, words in (
        ("absent", "is no folder"),
        ("empty", "is no export"),
        (str(newer), "grammar 99 is newer"),
    ):
        code, out, err = call("verify", folder)
        assert (code, out) == (2, "")
        assert words in err
        assert err.count("\n") == 1


def test_without_transformers_it_says_what_is_missing(
    model: Path, monkeypatch: pytest.MonkeyPatch, call: Call
) -> None:
    real = builtins.__import__

    def absent(name: str, *more: Any) -> Any:
        if name == "transformers":
            raise ImportError(name)
        return real(name, *more)

    monkeypatch.setattr(builtins, "__import__", absent)
    code, _, err = call("verify", str(model))
    assert code == 2
    assert "pip install 'mendel[hf]'" in err
    assert err.count("\n") == 1


def test_the_own_hash_covers_every_fact() -> None:
    facts = {"a": 1, "files": {"x": "1"}}
    assert own_hash(facts) == own_hash({**facts, OWN: "whatever"})
    assert own_hash(facts) != own_hash({**facts, "a": 2})
    assert Result("files", "passed").said == ""
