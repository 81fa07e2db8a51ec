"""Evolution against random search at equal budget, on a space whose every genome is tabled.

    PYTHONPATH=benchmarks python benchmarks/race.py [--seeds 24] [--trials 64]

Each run looks scores up in `data/table.jsonl` (make_table.py) instead of training. The figure is
the hypervolume of what was found over (quality, params, cache bytes), each scaled to the table's
range (cache and params by their logarithm), as a share of the hypervolume of the table's front.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from pathlib import Path
from typing import Any

import moocore
import numpy as np
from evaluations import table
from make_table import STUDY
from record import save, spread

from mendel.search.driver import search
from mendel.search.study import load_study

CHECKPOINTS = (16, 32, 48, 64)
"""Trials after which the hypervolume is read."""


def losses(row: dict[str, Any]) -> tuple[float, float, float]:
    return -row["score"], math.log(row["params"]), math.log(row["cache"])


class Share:
    """Hypervolume as a share of the table's own."""

    def __init__(self) -> None:
        self.rows = {h: self._row(r) for h, r in table().items()}
        points = np.array([losses(r) for r in self.rows.values()])
        self.low, self.high = points.min(0), points.max(0)
        self.whole = self.volume(points)

    @staticmethod
    def _row(row: dict[str, Any]) -> dict[str, Any]:
        cache = next(v for k, v in row.items() if k.startswith("cache_bytes"))
        return {**row, "cache": cache}

    def volume(self, points: np.ndarray) -> float:
        scaled = (points - self.low) / (self.high - self.low)
        return float(moocore.hypervolume(scaled, ref=[1.01] * scaled.shape[1]))

    def of(self, hashes: list[str]) -> float:
        return self.volume(np.array([losses(self.rows[h]) for h in hashes])) / self.whole


def run(sampler: str, seed: int, trials: int, folder: Path) -> list[str]:
    """The hashes of the trials in order."""
    study = load_study(STUDY)
    setting = study.search.model_copy(update={"sampler": sampler, "seed": seed, "trials": trials})
    study = study.model_copy(
        update={"search": setting, "evaluate": "evaluations:lookup", "name": f"{sampler}-{seed}"}
    ).moved(folder)
    return [trial.hash for trial in search(study, executor="serial").trials]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=24)
    parser.add_argument("--trials", type=int, default=64)
    arguments = parser.parse_args()
    share = Share()
    reached: dict[str, list[list[float]]] = {"evolution": [], "random": []}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(arguments.seeds):
            for sampler, found in reached.items():
                hashes = run(sampler, seed, arguments.trials, Path(folder))
                found.append([share.of(hashes[:n]) for n in CHECKPOINTS if n <= len(hashes)])
    rows = []
    for at, count in enumerate(n for n in CHECKPOINTS if n <= arguments.trials):
        evolution, random = ([r[at] for r in reached[s]] for s in ("evolution", "random"))
        better = sum(a > b for a, b in zip(evolution, random, strict=True))
        rows.append(
            {
                "trials": count,
                "evolution": spread(evolution),
                "random": spread(random),
                "evolution better in": f"{better} of {len(evolution)} seeds",
            }
        )
    save(
        "race",
        "What share of the table's hypervolume does a search find?",
        rows,
        table=len(share.rows),
        seeds=arguments.seeds,
        each=reached,
    )


if __name__ == "__main__":
    main()
