"""Exported designs: complete, read back, honest about where they came from."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from command_line import caller
from runs import made_run

from mendel.genome.cost import cost
from mendel.genome.files import load
from mendel.genome.hash import canonical_hash
from mendel.genome.notation import parse
from mendel.search.exports.folder import export
from mendel.search.exports.formats import FORMATS, Format
from mendel.search.exports.genome import write_genome
from mendel.search.exports.order import Order
from mendel.search.front import outcome_of
from mendel.search.run import RunView, open_run
from mendel.search.source import Source, find_genome
from mendel.search.terminal import Mistake
from mendel.search.winners import write_winners

FILES = {
    "genome.yaml",
    "genome.json",
    "costs.json",
    "scores.json",
    "provenance.json",
    "README.md",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunView:
    return open_run(made_run(tmp_path_factory.mktemp("made")))


@pytest.fixture
def winner(run: RunView) -> Source:
    return find_genome(f"{run.folder}:{outcome_of(run).knee}")


def test_a_trial_is_exported_whole(winner: Source, tmp_path: Path) -> None:
    folder = export(Order(winner), tmp_path / "out")
    assert {p.name for p in folder.iterdir()} == FILES
    assert load(folder / "genome.yaml") == winner.genome
    written = json.loads((folder / "genome.json").read_text())
    assert written["grammar"] == 1
    assert load(folder / "genome.json") == winner.genome
    facts = json.loads((folder / "provenance.json").read_text())
    assert facts["genome"]["hash"] == canonical_hash(winner.genome)
    assert parse(facts["genome"]["notation"]) == winner.genome
    assert facts["run"]["versions"] == {"torch": "2.13"}
    assert winner.trial is not None
    assert facts["trial"]["number"] == winner.trial.number
    for name, digest in facts["files"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
    assert set(facts["files"]) == FILES - {"provenance.json"}


def test_scores_stand_with_their_budget_and_the_baselines(winner: Source, tmp_path: Path) -> None:
    scores = json.loads((export(Order(winner), tmp_path / "out") / "scores.json").read_text())
    assert winner.trial is not None
    assert scores["values"] == winner.trial.values
    assert [r["rung"] for r in scores["rungs"]] == [0, 1]
    assert scores["rungs"][1]["steps"] == {"recall": 40, "copying": 40}
    assert set(scores["baselines"]) == {
        "transformer++",
        "mamba2",
        "striped",
        "jamba-like",
        "griffin-like",
    }
    assert scores["seeds"] == [0]
    assert "no spread" in scores["note"]


def test_costs_are_the_genome_s(winner: Source, tmp_path: Path) -> None:
    costs = json.loads((export(Order(winner), tmp_path / "out") / "costs.json").read_text())
    total = cost(winner.genome).total
    at = next(c for c in costs["at"] if (c["context"], c["dtype"]) == (4096, "bf16"))
    assert costs["params"] == total.params
    assert at["cache_bytes"] == total.state_bytes
    assert len(at["slots"]) == len(winner.genome.slots)


def test_the_card_says_what_it_is_not(winner: Source, tmp_path: Path) -> None:
    card = (export(Order(winner), tmp_path / "out") / "README.md").read_text()
    assert "not a language model" in card
    assert "transformer++" in card
    assert "No weights" in card


def test_a_design_without_a_run(tmp_path: Path) -> None:
    folder = export(Order(find_genome("[mamba2 > swiglu]*2")), tmp_path / "deep" / "out")
    assert {p.name for p in folder.iterdir()} == FILES
    scores = json.loads((folder / "scores.json").read_text())
    assert scores["rungs"] == []
    assert "nothing was trained" in scores["note"]


def test_nothing_is_overwritten_unasked(winner: Source, tmp_path: Path) -> None:
    folder = export(Order(winner), tmp_path / "out")
    (folder / "mine.txt").write_text("keep")
    with pytest.raises(Mistake, match="exists already"):
        export(Order(winner), folder)
    assert (folder / "mine.txt").exists()
    export(Order(winner), folder, force=True)
    assert not (folder / "mine.txt").exists()


def test_the_folder_of_the_command_stays(
    winner: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Mistake, match="name one inside it"):
        export(Order(winner), Path())


def test_force_replaces_only_an_export(winner: Source, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("x")
    with pytest.raises(Mistake, match="is no exported design"):
        export(Order(winner), tmp_path / "thesis", force=True)
    assert (tmp_path / "thesis" / "chapter.tex").exists()


def test_what_cannot_be_read_back_is_not_handed_over(
    winner: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A disk that loses a byte, at the one place where the folder is written.
    def losing(order: Order, folder: Path) -> dict[str, Any]:
        more = write_genome(order, folder)
        path = folder / "genome.yaml"
        path.write_text(path.read_text().replace("width: 32", "width: 64"))
        return more

    monkeypatch.setitem(FORMATS, "genome", Format("genome", "", losing))
    with pytest.raises(RuntimeError, match="not the genome that was meant"):
        export(Order(winner), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_winners_follow_the_front(run: RunView) -> None:
    found = outcome_of(run)
    own = {f"trial-{t.number:05d}" for t in found.front if t.baseline is None}
    gone = run.folder / "winners" / "trial-99999"
    gone.mkdir(parents=True)
    written = write_winners(run, found)
    assert {p.name for p in written} == own
    assert {p.name for p in (run.folder / "winners").iterdir()} == own
    assert write_winners(run, found) == written


def test_an_export_is_no_genome_but_has_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    call = caller(tmp_path, monkeypatch, capsys)
    assert call("export", "mamba2", "--format", "flame", "--out", "mine")[0] == 0
    for command in ("show", "import"):
        code, out, err = call(command, "mine")
        assert (code, out) == (2, "")
        assert err == "mendel: mine is an export of mendel; its genome is mine/genome.yaml\n"
    assert call("show", "mine/genome.yaml")[0] == 0


ENDED = """
import os, signal, sys, time
from mendel.search import cli
from mendel.search.exports import folder

# A shell's job in the background begins with the signal ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
ended = signal.Signals[sys.argv.pop()]

def seal(*_):
    os.kill(os.getpid(), ended)
    time.sleep(60)

folder.seal = seal
cli.main()
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_an_export_that_is_ended_leaves_nothing(name: str, tmp_path: Path) -> None:
    arguments = ["export", "mamba2", "--out", "deep/out", name]
    done = subprocess.run(
        [sys.executable, "-c", ENDED, *arguments], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (130, "mendel: interrupted\n")
    assert list(tmp_path.iterdir()) == []
