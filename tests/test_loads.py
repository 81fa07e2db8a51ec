"""What routers did in a trial: from the training to the record, the report and the dashboard."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from runs import made_run

from mendel.genome.notation import parse
from mendel.proxies.recipe import TrainConfig
from mendel.proxies.tasks import ProxyConfig, make_task
from mendel.proxies.train import Training
from mendel.search import loads
from mendel.search.dashboard import view_trial
from mendel.search.dashboard.watch import Watch
from mendel.search.records import RungResult, TrialRecord
from mendel.search.report import report
from mendel.search.run import RunView, open_run

ROUTED = (
    "{width=16} [mha | switch(experts=4, capacity=0.5, expansion=1)] > noisy-top-k(experts=4, "
    "top_k=2) > hash-layer(experts=4, expansion=1) > moh > swiglu"
)
SETTINGS = {"length": 16, "vocab": 8, "train_examples": 64, "test_examples": 32}


def training(steps: int) -> Training:
    config = ProxyConfig.model_validate({"task": "in-context-recall", "steps": 1, **SETTINGS})
    return Training(parse(ROUTED), make_task(config, 0), TrainConfig(), steps, 4, 0)


def test_training_says_load_drops_and_entropy_per_slot() -> None:
    run = training(4)
    run.advance(4)
    said = run.statistics()
    trial = TrialRecord(0, "complete", {}, ROUTED, "")
    assert loads.load_rows(trial) == []
    result = RungResult(0, {}, {}, {}, 0.0, 0, statistics={"device": "cpu", "recall": said})
    trial.rungs.append(result)
    rows = loads.load_rows(trial)
    assert [row[:3] for row in rows] == [
        ["0, branch 1", "recall", "4 experts"],
        ["1", "recall", "4 experts"],
        ["2", "recall", "4 experts"],
        ["3", "recall", said["slot3.0"] and f"{len(said['slot3.0']['head_load'])} heads"],
    ]
    shares = torch.tensor(said["slot0.1"]["load"])
    assert shares.sum().item() == pytest.approx(1.0)
    assert rows[0][3:5] == [f"{4 * shares.max():.2f}", f"{4 * shares.min():.2f}"]
    # Two of 16 tokens per expert have room.
    assert said["slot0.1"]["dropped"] >= 0.5
    assert rows[0][5] == f"{said['slot0.1']['dropped']:.1%}"
    assert 0 < said["slot1.0"]["entropy"] <= torch.tensor(4.0).log().item()
    assert rows[1][5:] == ["0.0%", f"{said['slot1.0']['entropy']:.3f}"]
    assert rows[2][6] == ""
    assert rows[3][5:] == ["", ""]


def test_noise_is_the_same_after_a_resume(tmp_path: Path) -> None:
    whole, broken = training(6), training(6)
    whole.advance(6)
    broken.advance(3)
    broken.save(tmp_path)
    broken = Training.load(tmp_path, whole.genome, whole.task, whole.train, 6, 4, 0)
    broken.advance(6)
    for (name, one), (_, two) in zip(
        whole.model.state_dict().items(), broken.model.state_dict().items(), strict=True
    ):
        assert torch.equal(one, two), name
    assert whole.statistics() == broken.statistics()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_run(tmp_path_factory.mktemp("made"))


def routed_winner(run: RunView, html: str) -> TrialRecord:
    """A front member with experts, which the report draws."""
    found = [t for t in run.trials if f"<h3>Trial {t.number}" in html and loads.load_rows(t)]
    assert found
    return found[0]


def test_the_report_and_the_dashboard_show_it(folder: Path) -> None:
    run = open_run(folder)
    html = report(run)
    trial = routed_winner(run, html)
    rows = loads.load_rows(trial)
    assert rows[0][3:] == ["1.60", "0.40", "5.0%", "1.200"]
    card = html.split(f"<h3>Trial {trial.number}")[1].split("<h3>")[0]
    assert loads.CAPTION in card
    assert "".join(f'<td class="n">{cell}</td>' for cell in rows[0][3:]) in card
    watch = Watch(folder.parent)
    watch.poll()
    watched = watch.get(folder.name)
    assert watched is not None
    shown = str(view_trial.make(watch, watched, {"trial": str(trial.number)}))
    assert loads.CAPTION in shown
    assert '<td class="n">1.60</td>' in shown
    plain = next(t for t in run.trials if t.rungs and not loads.load_rows(t))
    shown = str(view_trial.make(watch, watched, {"trial": str(plain.number)}))
    assert loads.CAPTION not in shown
