"""What a study would do, without doing it: the size of its space, genomes, the time to expect."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from ..genome.cost import cost
from ..genome.genome import Genome
from ..genome.notation import show
from ..genome.sample import sample_valid
from ..genome.space import show_size
from ..proxies.tasks import make_task
from ..proxies.train import Training
from .evaluate import resolve_device
from .objectives import cheap_values
from .study import Study
from .terminal import print_hanging, print_table, say
from .units import count_text, duration_text, value_text

SAMPLES = 5
TIMED = 2
"""Genomes that a few steps are trained of."""
WARM_STEPS, TIMED_STEPS = 2, 4


def dry_run(study: Study) -> dict[str, Any]:
    """Size of the space, sampled genomes with their cheap objectives, baselines, time. Creates
    nothing; trains a few steps in memory for the time."""
    rng = np.random.default_rng(study.search.seed)
    genomes = [sample_valid(study.space, rng) for _ in range(SAMPLES)]
    baselines = study.baseline_genomes()
    size = study.space.size()
    return {
        "study": study.name,
        "run": str(study.folder),
        "space": {"size": size, "words": show_size(size)},
        "trials": study.search.trials,
        "rungs": [study.steps(r) for r in range(len(study.search.rungs))],
        "objectives": [goal.label for goal in study.goals],
        "samples": [_described(study, g) for g in genomes],
        "baselines": [{"name": name, **_described(study, g)} for name, g in baselines],
        "time": estimate(study, [*genomes[: TIMED - 1], *(g for _, g in baselines[:1])]),
    }


def _described(study: Study, genome: Genome) -> dict[str, Any]:
    return {
        "notation": show(genome),
        "params": cost(genome).total.params,
        "values": cheap_values(study.goals, genome),
    }


def estimate(study: Study, genomes: list[Genome]) -> dict[str, Any]:
    """Seconds of the whole search, from a few timed steps of these genomes on this machine."""
    device = resolve_device(study.workers.device)
    per_step: dict[str, float] = {}
    per_score: dict[str, float] = {}
    with _threads(study.workers.threads):
        for name, proxy in study.proxies.items():
            task = make_task(proxy, study.search.seed)
            steps, scores = [], []
            for genome in genomes:
                training = Training(
                    genome,
                    task,
                    study.train.model_copy(update={"lr": study.train.rates()[0]}),
                    max(proxy.steps, WARM_STEPS + TIMED_STEPS),
                    proxy.batch,
                    study.search.seed,
                    device,
                )
                training.advance(WARM_STEPS)
                before = training.seconds
                training.advance(WARM_STEPS + TIMED_STEPS)
                steps.append((training.seconds - before) / TIMED_STEPS)
                began = time.perf_counter()
                training.evaluate()
                scores.append(time.perf_counter() - began)
            per_step[name] = sum(steps) / len(steps)
            per_score[name] = sum(scores) / len(scores)
    work = sum(_work(study, per_step, per_score))
    workers = worker_count(study)
    return {
        "seconds": work / workers,
        "workers": workers,
        "device": device,
        "seconds_per_step": per_step,
        "seconds_per_evaluation": per_score,
    }


def _work(study: Study, per_step: dict[str, float], per_score: dict[str, float]) -> Iterator[float]:
    """Seconds per rung, all trials together; of the candidates one in eta goes on each time."""
    candidates, before = study.search.trials, dict.fromkeys(study.proxies, 0)
    # A list of learning rates is tried on a part of the steps.
    rates = len(study.train.rates())
    tried = (rates - 1) * study.train.grid if rates > 1 else 0.0
    for rung in range(len(study.search.rungs)):
        steps = study.steps(rung)
        each = sum((steps[p] - before[p]) * per_step[p] + per_score[p] for p in study.proxies)
        if rung == 0:
            each += sum(tried * study.proxies[p].steps * per_step[p] for p in study.proxies)
        yield each * (candidates + len(study.baselines))
        candidates, before = candidates // study.search.eta, steps


def worker_count(study: Study) -> int:
    """How many workers this machine would have for the study."""
    workers = study.workers
    if workers.executor == "serial":
        return 1
    if isinstance(workers.count, int):
        return workers.count
    if resolve_device(workers.device).startswith("cuda"):
        return max(1, torch.cuda.device_count())
    return max(1, (os.cpu_count() or 1) // workers.threads)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def print_dry_run(found: dict[str, Any]) -> None:
    """The dry run for people."""
    say(f"{found['study']} would run in {found['run']}", "bold")
    say(f"space      {found['space']['words']} genomes")
    say(
        f"trials     {found['trials']} candidates and {len(found['baselines'])} baselines; "
        + ", then ".join(
            " and ".join(f"{n} steps of {p}" for p, n in rung.items()) for rung in found["rungs"]
        )
    )
    guess = found["time"]
    say(
        f"time       about {duration_text(guess['seconds'])} with {guess['workers']} "
        f"worker{'' if guess['workers'] == 1 else 's'} on "
        f"{guess['device']}, from a few timed steps"
    )
    say()
    labels = [label for label in found["samples"][0]["values"] if label != "params"]
    rows = [(f"sample {i + 1}", s) for i, s in enumerate(found["samples"])]
    rows += [(b["name"], b) for b in found["baselines"]]
    print_table(
        ["design", "parameters", *labels],
        [
            [
                name,
                count_text(row["params"]),
                *(_shown(label, row["values"][label]) for label in labels),
            ]
            for name, row in rows
        ],
        right=["parameters", *labels],
        styles=[None] * len(found["samples"]) + ["yellow"] * len(found["baselines"]),
    )
    print_hanging([(name, row["notation"]) for name, row in rows])
    say("Nothing was written.")


def _shown(label: str, value: float) -> str:
    return value_text(value, "bytes" if label.startswith("cache_bytes") else "")
