"""A whole search in this process: small, real training, real files."""

import json
import os
from pathlib import Path
from typing import Any

import optuna
import pytest
from small_study import story, write

from mendel.search import store as store_module
from mendel.search.driver import Progress, search
from mendel.search.front import outcome_of
from mendel.search.run import open_run
from mendel.search.store import RunError, RunStore, heal, read_events
from mendel.search.study import load_study


def test_a_search_from_study_to_front(tmp_path: Path) -> None:
    said: list[Progress] = []
    run = search(write(tmp_path), progress=said.append)
    assert run.state == "complete"
    assert len(run.trials) == 9
    assert [t.number for t in run.trials] == list(range(9))
    assert {t.state for t in run.trials} == {"complete", "stopped"}
    assert run.trials[0].baseline == "transformer++"
    assert run.trials[0].state == "complete"
    assert len({t.hash for t in run.trials}) == 9
    for trial in run.trials:
        last = trial.rungs[-1]
        assert last.steps == {"text": 6 if trial.state == "complete" else 3}
        assert [r.rung for r in trial.rungs] == list(range(len(trial.rungs)))
        assert last.values["quality"] == last.scores["text"]["score"]
        folder = run.trial_folder(trial.number)
        assert json.loads((folder / "genome.json").read_text()) == trial.genome
        assert json.loads((folder / "result.json").read_text()) == trial.as_dict()
        assert run.curves(trial.number)["text"]
        kept = list(folder.glob("checkpoints/*/*.safetensors"))
        assert bool(kept) == (trial.state == "complete")
    found = outcome_of(run)
    assert found.front
    assert found.hypervolume > 0
    assert said[-1].state == "complete"
    assert said[-1].finished == 8
    assert said[-1].front == len(found.front)
    origin = run.provenance
    assert origin["seed"] == 0
    assert len(origin["proxies"]["text"]["corpus_fingerprint"]["sha256"]) == 64
    assert {"torch", "optuna", "python"} <= set(origin["versions"])


def test_optuna_reads_the_journal(tmp_path: Path) -> None:
    run = search(write(tmp_path))
    backend = optuna.storages.journal.JournalFileBackend(str(run.folder / "journal.log"))
    study = optuna.load_study(study_name="small", storage=optuna.storages.JournalStorage(backend))
    by_state = {"complete": "COMPLETE", "stopped": "PRUNED"}
    assert [t.state.name for t in study.trials] == [by_state[t.state] for t in run.trials]
    for stored, trial in zip(study.trials, run.trials, strict=True):
        if trial.state == "complete":
            assert stored.values == list(trial.values.values())


def test_a_finished_run_is_not_run_again(tmp_path: Path) -> None:
    path = write(tmp_path)
    first = search(path)
    before = story(first.folder)
    events = len(list(read_events(first.folder / "events.jsonl")))
    again = search(path)
    assert story(again.folder) == before
    # Only that a driver began and ended.
    assert len(list(read_events(again.folder / "events.jsonl"))) == events + 2
    assert len(again.provenance["lives"]) == 2


def test_equal_seeds_give_equal_runs_whatever_is_in_flight(tmp_path: Path) -> None:
    one = search(write(tmp_path / "a"))
    two = search(write(tmp_path / "b"))
    other = search(write(tmp_path / "c", search__seed=1))
    assert story(one.folder) == story(two.folder)
    assert story(one.folder) != story(other.folder)


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_other_samplers(tmp_path: Path, sampler: str) -> None:
    run = search(write(tmp_path, search__sampler=sampler, evaluate="chaos:quick"))
    assert len(run.trials) == 9
    assert run.trials[1].variation == sampler
    assert {t.variation for t in run.trials[1:]} <= {sampler, "random"}


def test_more_trials_go_on_with_a_finished_run(tmp_path: Path) -> None:
    path = write(tmp_path, evaluate="chaos:quick")
    few = {t.number: (t.hash, t.state) for t in search(path).trials}
    run = search(write(tmp_path, evaluate="chaos:quick", search__trials=16))
    many = {t.number: (t.hash, t.state) for t in run.trials}
    assert len(many) == 17
    assert {n: many[n] for n in few} == few
    assert all(t.state != "running" for t in run.trials)


def test_another_study_of_the_same_name_is_refused(tmp_path: Path) -> None:
    run = search(write(tmp_path, evaluate="chaos:quick"))
    before = story(run.folder)
    with pytest.raises(RunError, match=r"another study: search\.seed differs"):
        search(write(tmp_path, evaluate="chaos:quick", search__seed=5))
    with pytest.raises(RunError, match=r"search\.trials differs"):
        search(write(tmp_path, evaluate="chaos:quick", search__trials=2))
    assert story(run.folder) == before


def test_workers_may_change_but_not_under_a_measurement(tmp_path: Path) -> None:
    def opened(**changes: Any) -> None:
        with RunStore.open(load_study(write(tmp_path, **changes))):
            pass

    opened()
    opened(workers__threads=2, workers__device="auto")
    measured: dict[str, Any] = {"name": "timed", "objectives": ["quality", "latency_decode"]}
    opened(**measured)
    opened(**measured, workers__executor="ray", workers__time_limit=9)
    with pytest.raises(RunError, match=r"workers\.threads differs"):
        opened(**measured, workers__threads=2)
    with pytest.raises(RunError, match=r"workers\.device differs"):
        opened(**measured, workers__device="auto")


def test_changed_text_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, evaluate="chaos:quick")
    search(path)
    (tmp_path / "text.txt").write_text("another text " * 400)
    with pytest.raises(RunError, match="data has changed"):
        search(path)


def test_a_second_driver_is_refused(tmp_path: Path) -> None:
    study = load_study(write(tmp_path))
    with RunStore.open(study):
        assert open_run(study.folder).state == "running"
        with pytest.raises(RunError, match=f"another search is at work .*{os.getpid()}"):
            RunStore.open(study)
    assert open_run(study.folder).state == "new"


def test_constraints_hold(tmp_path: Path) -> None:
    run = search(
        write(tmp_path, evaluate="chaos:quick", space__constraints={"params": {"max": 1e4}})
    )
    for trial in run.trials[1:]:
        assert trial.constraints["params.max"] <= 0
        assert trial.state in ("complete", "stopped")


def test_a_baseline_beyond_the_constraints_runs_and_stands_off_the_front(tmp_path: Path) -> None:
    big = {"name": "big", "genome": "[gqa(heads=2) > swiglu(expansion=8.0)]*3"}
    changes = {"evaluate": "chaos:quick", "space__constraints": {"params": {"max": 12000}}}
    run = search(write(tmp_path, baselines=[big], **changes))
    assert run.trials[0].constraints["params.max"] > 0
    assert run.trials[0].state == "infeasible"
    assert len(run.trials[0].rungs) == 2
    assert 0 not in {t.number for t in outcome_of(run).front}


def test_an_exhausted_space_says_so(tmp_path: Path) -> None:
    operators = {"gqa": {"heads": [2], "kv_heads": [1, 2]}, "swiglu": {"expansion": [1.0]}}
    path = write(tmp_path, evaluate="chaos:quick", space__operators=operators, space__depth=2)
    run = search(path)
    assert run.state == "complete"
    assert len(run.trials) == 3
    assert "no more candidates" in run.remarks[0]


def test_measured_objectives(tmp_path: Path) -> None:
    measured: list[Any] = [
        "quality",
        {"latency_decode": {"context": 32}},
        {"latency_prefill": {"context": 32, "batch": 2}},
        {"throughput": {"length": 16, "batch": 2}},
        {"peak_memory": {"length": 16, "batch": 2}},
    ]
    run = search(write(tmp_path, objectives=measured, search__trials=2, baselines=[]))
    trial = outcome_of(run).front[0]
    found = trial.rungs[-1].measurements
    assert set(found) == {g.label for g in run.goals} - {"quality"}
    for label, one in found.items():
        assert one.low <= one.median <= one.high
        assert trial.values[label] == one.median
        conditions = {"device", "backend", "dtype", "batch", "threads", "versions"}
        assert conditions <= set(one.conditions)
        slots = len(trial.genome["slots"]) if label.startswith("latency") else 0
        assert len(one.slots) == slots
        assert all(seconds > 0 for seconds in one.slots)
    assert found["latency_decode"].conditions["context"] == 32
    assert found["latency_decode"].unit == "s"
    assert found["throughput"].median > 0


@pytest.mark.parametrize("cut", [1, 5, 40])
def test_half_written_lines_are_healed(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "lines"
    whole = b'{"a":1}\n{"b":"' + b"x" * 100_000 + b'"}\n'
    path.write_bytes(whole)
    heal(path)
    assert path.read_bytes() == whole
    path.write_bytes(whole[:-cut])
    heal(path)
    assert path.read_bytes() == b'{"a":1}\n'
    path.write_bytes(b'{"a":1}\n\0\0\0\n')
    heal(path)
    assert path.read_bytes() == b'{"a":1}\n'


def test_a_reader_survives_a_half_written_line(tmp_path: Path) -> None:
    run = search(write(tmp_path, evaluate="chaos:quick"))
    events = run.folder / "events.jsonl"
    text = events.read_bytes()
    events.write_bytes(text[: len(text) // 2])
    live = open_run(run.folder)
    assert 0 < len(live.trials) <= 9
    events.write_bytes(text)
    assert live.refresh()
    assert [t.as_dict() for t in live.trials] == [t.as_dict() for t in run.trials]
    assert not live.refresh()


def test_a_full_disk_is_one_line_and_the_run_goes_on_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, evaluate="chaos:quick")
    whole = story(search(write(tmp_path / "whole", evaluate="chaos:quick")).folder)
    calls = iter(range(1000))

    def replace(source: Any, target: Any) -> None:
        if next(calls) == 7:
            raise OSError(28, "No space left on device", str(target))
        real(source, target)

    real = os.replace
    monkeypatch.setattr(store_module.os, "replace", replace)
    with pytest.raises(RunError, match="no space is left; nothing finished is lost") as caught:
        search(path)
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    run = search(path)
    assert story(run.folder) == whole
    assert not list(run.folder.rglob("*.part"))


def test_a_disk_that_fills_under_a_candidate_is_no_fault_of_it(tmp_path: Path) -> None:
    whole = story(search(write(tmp_path / "whole", evaluate="chaos:quick")).folder)
    path = write(tmp_path, evaluate="chaos:full_once")
    with pytest.raises(RunError, match="checkpoint: no space is left; nothing finished is lost"):
        search(path)
    assert story(search(path).folder) == whole
