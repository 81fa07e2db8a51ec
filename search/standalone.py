"""Training one design on one proxy, outside a search: several seeds, curves, resumable."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..genome.files import to_dict
from ..genome.genome import Genome
from ..genome.notation import show
from ..proxies.checkpoint import FILE as CHECKPOINT
from ..proxies.recipe import TrainConfig
from ..proxies.tasks import ProxyConfig, make_task
from ..proxies.train import Diverged, Training
from .figures import curves_figure
from .measure import device_name
from .new_files import remove_empty
from .page import Page, table, text
from .source import PLAN
from .store import difference, write_json, write_text
from .terminal import Mistake, clean

SAVES = 10
"""Checkpoints per training, evenly over its steps; Ctrl-C saves too."""

Progress = Callable[[int, int], None]
"""Called with the seed and the steps done."""


@dataclass(frozen=True)
class Plan:
    """What is trained. A folder holds one plan, so that going on cannot mix two."""

    genome: Genome
    name: str
    proxy: ProxyConfig
    train: TrainConfig
    device: str

    def as_dict(self) -> dict[str, Any]:
        """As JSON; the device is left out, because a training may go on elsewhere."""
        found: dict[str, Any] = json.loads(
            json.dumps(
                {
                    "genome": to_dict(self.genome),
                    "notation": show(self.genome),
                    "proxy": self.proxy.model_dump(mode="json"),
                    "train": self.train.model_dump(mode="json"),
                }
            )
        )
        return found


def claim(plan: Plan, out: Path) -> None:
    """Make the folder for this plan, or take up one that holds the same plan.

    Raises Mistake where the folder holds something else; nothing is touched then."""
    path = out / PLAN
    if path.is_file():
        try:
            held = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            raise Mistake(f"{path} is not readable; choose another folder") from None
        key = difference(held, plan.as_dict())
        if key is not None:
            raise Mistake(f"{out} holds another training: {_change(held, plan, key)}")
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise Mistake(f"{out} exists and holds no training; choose a new or empty folder")
    missing = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_json(path, plan.as_dict())
    except OSError:
        remove_empty(missing)
        raise


def _change(held: Any, plan: Plan, key: str) -> str:
    """What the folder's plan has at the first key that differs, what was asked, and what to do."""
    asked = plan.as_dict()
    words = "choose a new --out"
    if key.partition(".")[0] == "genome":
        # The notation says a whole genome in a line, where a list of slots would not fit.
        key = "notation"
    elif key == "proxy.steps":
        words = f"the learning-rate schedule spans the whole training; {words}"
    old, new = _value_at(held, key), _value_at(asked, key)
    return f"{key} is {old} there and {new} here; {words}"


def _value_at(plan: Any, key: str) -> str:
    for part in key.split("."):
        if not isinstance(plan, dict) or part not in plan:
            return "absent"
        plan = plan[part]
    return plan if isinstance(plan, str) else json.dumps(plan)


def train_seed(plan: Plan, seed: int, out: Path, progress: Progress) -> dict[str, Any]:
    """Train one seed to the end, from its checkpoint where there is one; its result as JSON.

    The seed draws the weights and the data. A divergence is a result: its `failure` says so.
    """
    folder = out / f"seed-{seed}"
    task = make_task(plan.proxy, seed)
    asked = (
        plan.genome,
        task,
        plan.train,
        plan.proxy.steps,
        plan.proxy.batch,
        seed,
        plan.device,
    )
    is_there = (folder / CHECKPOINT).is_file()
    training = Training.load(folder, *asked) if is_there else Training(*asked)
    every = max(1, -(-plan.proxy.steps // SAVES))
    failure = None
    scores: dict[str, float] = {}
    try:
        while training.step < plan.proxy.steps:
            stop = min((training.step // every + 1) * every, plan.proxy.steps)
            training.advance(stop, on_step=lambda step: progress(seed, step))
            training.save(folder)
        scores = training.evaluate()
    except KeyboardInterrupt:
        if training.step:
            training.save(folder)
        raise
    except Diverged as error:
        failure = str(error)
    result = {
        "seed": seed,
        "steps": training.step,
        "tokens": training.tokens,
        "seconds": training.seconds,
        "scores": scores,
        "failure": failure,
        "chance": task.chance,
        "statistics": training.statistics() if training.step else {},
        "data": task.describe(),
        "device": device_name(plan.device),
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "curve.json", clean(training.curve))
    write_json(folder / "result.json", clean(result))
    return result


def summarise(plan: Plan, results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Every metric's mean over the seeds that did not fail, with its spread."""
    done = [r for r in results if r["failure"] is None]
    names = list(done[0]["scores"]) if done else []
    return {
        **plan.as_dict(),
        "seeds": list(results),
        "summary": {
            name: spread([r["scores"][name] for r in done if name in r["scores"]]) for name in names
        },
        "failed": [r["seed"] for r in results if r["failure"] is not None],
    }


def spread(values: Sequence[float]) -> dict[str, float | int | None]:
    """Mean, sample standard deviation (none for one value), least, most, count."""
    return {
        "mean": statistics.fmean(values),
        "std": statistics.stdev(values) if len(values) > 1 else None,
        "min": min(values),
        "max": max(values),
        "count": len(values),
    }


def write_outcome(plan: Plan, results: Sequence[dict[str, Any]], out: Path) -> dict[str, Any]:
    """scores.json and curves.html of all seeds; the content of scores.json."""
    found = summarise(plan, results)
    write_json(out / "scores.json", clean(found))
    page = Page(f"{plan.name} on {plan.proxy.task}")
    page.add(
        text("h1", f"{plan.name} on {plan.proxy.task}"), text("p", show(plan.genome), "question")
    )
    curves = {
        f"seed {r['seed']}": json.loads(
            (out / f"seed-{r['seed']}" / "curve.json").read_text(encoding="utf-8")
        )
        for r in results
    }
    page.figure(curves_figure(curves, "loss", "training loss"), "Training loss over steps")
    metrics = list(found["summary"])
    rows = [
        [
            str(r["seed"]),
            f"{r['steps']:,}",
            r["failure"] or "",
            *(f"{r['scores'][m]:.4f}" if m in r["scores"] else "" for m in metrics),
        ]
        for r in results
    ]
    page.add(table(["seed", "steps", "failure", *metrics], rows, numbers=["steps", *metrics]))
    write_text(out / "curves.html", page.html())
    return found
