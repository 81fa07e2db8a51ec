"""What a worker does with a job: train the proxies up to a rung, or measure the bare model."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch

from ..genome.files import from_dict
from ..genome.genome import Genome
from ..proxies.recipe import TrainConfig
from ..proxies.task import ProxyError, Task
from ..proxies.tasks import ProxyConfig, make_task
from ..proxies.train import Training
from .measure import measure
from .objectives import Goal, goal_from_json
from .store import CHECKPOINTS, write_json

_TASKS: dict[str, Task] = {}
"""Tasks of this process by everything that decides them; they are immutable and dear to make."""


def evaluate(job: dict[str, Any]) -> dict[str, Any]:
    """Do one job and return its content as JSON.

    `train` gives `scores` (per proxy), `steps`, `seconds`, `tokens`, `statistics`; `measure` gives
    `measurements` (per goal's label). Raises what the candidate raises.
    """
    genome = from_dict(job["genome"])
    device = resolve_device(job["device"])
    if job["kind"] == "measure":
        goals: list[Goal] = [goal_from_json(g) for g in job["goals"]]
        return {"measurements": measure(genome, goals, device, job["seed"], job["deadline"])}
    return _train(genome, job, device)


def resolve_device(name: str) -> str:
    """`auto` is the CUDA device where there is one, else the CPU."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return name


def _train(genome: Genome, job: dict[str, Any], device: str) -> dict[str, Any]:
    began = time.perf_counter()
    folder = Path(job["folder"])
    train = TrainConfig.model_validate(job["train"])
    scores, steps, tokens = {}, {}, 0
    statistics: dict[str, Any] = {"device": device, "threads": torch.get_num_threads()}
    curves = _read_curves(folder)
    for name, settings in job["proxies"].items():
        config = ProxyConfig.model_validate(settings)
        task = _task(settings, config, job["seed"])
        place = folder / CHECKPOINTS / name
        asked = (genome, task, train, config.steps, config.batch, job["seed"], device)
        training = Training(*asked)
        note = None
        if place.exists():
            try:
                training = Training.load(place, *asked)
            except ProxyError as error:
                # The training is deterministic: from the start it gives the same, only later.
                note = str(error)
        try:
            training.advance(job["steps"][name], job["deadline"])
            scores[name] = training.evaluate()
        finally:
            curves[name] = training.curve
            write_json(folder / "curves.json", curves)
        training.save(place)
        steps[name] = training.step
        tokens += training.tokens
        statistics[name] = training.statistics()
        if note is not None:
            statistics[name]["restarted"] = note
    return {
        "scores": scores,
        "steps": steps,
        "seconds": time.perf_counter() - began,
        "tokens": tokens,
        "statistics": statistics,
    }


def _task(settings: dict[str, Any], config: ProxyConfig, seed: int) -> Task:
    key = json.dumps([settings, seed], sort_keys=True)
    if key not in _TASKS:
        _TASKS[key] = make_task(config, seed)
    return _TASKS[key]


def _read_curves(folder: Path) -> dict[str, Any]:
    try:
        content = json.loads((folder / "curves.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
