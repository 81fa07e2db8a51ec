"""What the search itself costs: the driver's time per trial, and how busy it keeps its workers.

    PYTHONPATH=benchmarks python benchmarks/driver_cost.py [--sizes 1000 10000] [--trials 60]

The first table times a search whose evaluation does nothing, so that a trial's time is the
driver's: ask, propose, dispatch, record, tell. The second runs trials of ten seconds on Ray workers
and counts the share of the workers' time, from the first trial's start to the last one's end, that
was spent inside trials.
"""

from __future__ import annotations

import argparse
import itertools
import os
import tempfile
import time
from datetime import datetime
from pathlib import Path

import evaluations
from record import save, spread

from mendel.search.driver import search
from mendel.search.study import Study, load_study

STUDY = Path(__file__).parent / "data" / "driver_study.yaml"


def study_of(evaluate: str, trials: int, folder: Path, name: str) -> Study:
    study = load_study(STUDY)
    setting = study.search.model_copy(update={"trials": trials})
    changed = {"search": setting, "evaluate": f"evaluations:{evaluate}", "name": name}
    return study.model_copy(update=changed).moved(folder)


def per_trial(trials: int, folder: Path) -> dict[str, object]:
    """Every trial has one rung; the time between two evaluations is what the driver did."""
    evaluations.BEGAN.clear()
    began = time.perf_counter()
    search(study_of("noop", trials, folder, f"noop{trials}"), executor="serial")
    seconds = time.perf_counter() - began
    times = [1000 * (b - a) for a, b in itertools.pairwise(evaluations.BEGAN)]
    return {
        "trials": len(evaluations.BEGAN),
        "ms per trial": spread(times),
        "mean, ms": sum(times) / len(times),
        "ms, last 1,000": spread(times[-1000:]),
        "whole run, s": seconds,
    }


def occupancy(trials: int, folder: Path) -> dict[str, object]:
    workers = os.cpu_count() or 1
    began = time.perf_counter()
    view = search(study_of("ten_seconds", trials, folder, "busy"), executor="ray")
    wall = time.perf_counter() - began
    inside = sum(rung.seconds for trial in view.trials for rung in trial.rungs)
    starts = [trial.started for trial in view.trials]
    ends = [trial.finished for trial in view.trials]
    span = (datetime.fromisoformat(max(ends)) - datetime.fromisoformat(min(starts))).total_seconds()
    return {
        "workers": workers,
        "trials of 10 s": trials,
        "busy": inside / (workers * span),
        "from first start to last end, s": span,
        "whole command, s": wall,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="*", default=[1000, 10_000])
    parser.add_argument("--trials", type=int, default=60, help="trials of ten seconds; 0 for none")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if arguments.sizes:
            save(
                "driver_cost",
                "What does the driver cost per trial?",
                [per_trial(size, Path(folder)) for size in arguments.sizes],
                storage="Optuna journal file",
                sampler="evolution",
            )
        if arguments.trials:
            save(
                "occupancy",
                "How busy are the workers?",
                [occupancy(arguments.trials, Path(folder))],
            )


if __name__ == "__main__":
    main()
