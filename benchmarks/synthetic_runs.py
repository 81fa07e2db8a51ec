"""Run folders with any number of trials, made up in seconds, for the dashboard's benchmark.

The genomes are drawn from a space and their costs are counted; scores and times are invented.
"""

from __future__ import annotations

import argparse
import json
import math
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np

from mendel.genome.files import to_dict
from mendel.genome.genome import Genome
from mendel.genome.hash import canonical_hash
from mendel.genome.notation import show
from mendel.genome.sample import sample_valid
from mendel.search.objectives import cheap_values
from mendel.search.study import Study, load_study

STUDY = """\
name: {name}
question: how does the dashboard bear {trials} trials?
space:
  width: 64
  depth: [4, 8]
  operators:
    gqa: {{heads: [4], kv_heads: [1, 2, 4]}}
    swa: {{heads: [4], window: [16, 32]}}
    mamba2: {{key_dim: [16, 32]}}
    gated-deltanet: {{}}
    swiglu: {{expansion: [1.0, 2.0]}}
    moe: {{experts: [4], top_k: [1, 2]}}
  parallel: {{branches: 2, share: 0.3}}
  sharing: {{weights: true, features: true}}
proxies:
  recall: {{task: in-context-recall, steps: 200, batch: 16}}
  copying: {{task: selective-copying, steps: 200, batch: 16}}
objectives: [quality, {{cache_bytes: {{context: 4096, dtype: bf16}}}}, params]
search: {{trials: {trials}, population: 32, rungs: [0.25, 1.0], sampler: {sampler}}}
baselines: [transformer++, mamba2, striped, jamba-like]
runs: "{runs}"
"""

SECONDS = 6.0
"""Of one whole training."""


class Synthetic:
    """Writes the events of one run; `append` goes on where the last call ended."""

    def __init__(
        self, runs: Path, name: str, trials: int, sampler: str = "evolution", distinct: int = 400
    ) -> None:
        folder = runs / name
        (folder / "trials").mkdir(parents=True)
        text = STUDY.format(name=name, trials=trials, runs=runs, sampler=sampler)
        (folder / "study.yaml").write_text(text, encoding="utf-8")
        self.study: Study = load_study(folder / "study.yaml", check=False)
        self.folder = folder
        self.rng = np.random.default_rng(11)
        self.clock = datetime(2026, 1, 5, 8, tzinfo=UTC)
        self.number = 0
        # Drawing and hashing a genome costs milliseconds: a large run repeats some.
        self.pool = [self._drawn(sample_valid(self.study.space, self.rng)) for _ in range(distinct)]
        self._write([self._event("begin", study=name, workers=2)])
        for baseline, genome in self.study.baseline_genomes():
            self._write(self._trial(self._drawn(genome), baseline, "complete"))

    def append(self, count: int) -> None:
        """More searched trials: of ten six complete, three stopped, one infeasible or failed."""
        lines: list[str] = []
        for _ in range(count):
            drawn = self.pool[int(self.rng.integers(len(self.pool)))]
            draw = self.rng.random()
            state = (
                "complete"
                if draw < 0.6
                else "stopped"
                if draw < 0.9
                else "infeasible"
                if draw < 0.96
                else "failed"
            )
            lines += self._trial(drawn, None, state)
        self._write(lines)

    def end(self) -> None:
        self._write([self._event("complete")])

    def _drawn(self, genome: Genome) -> tuple[dict[str, Any], dict[str, float]]:
        said = {"genome": to_dict(genome), "notation": show(genome), "hash": canonical_hash(genome)}
        return said, cheap_values(self.study.goals, genome)

    def _write(self, lines: list[str]) -> None:
        with (self.folder / "events.jsonl").open("a", encoding="utf-8") as handle:
            handle.write("".join(line + "\n" for line in lines))

    def _event(self, event: str, **content: Any) -> str:
        at = self.clock.isoformat(timespec="milliseconds")
        return json.dumps({"event": event, "at": at, **content}, separators=(",", ":"))

    def _trial(
        self,
        drawn: tuple[dict[str, Any], dict[str, float]],
        baseline: str | None,
        state: str,
    ) -> list[str]:
        said, cheap = drawn
        number = self.number
        self.number += 1
        parents = sorted({int(self.rng.integers(number)) for _ in range(2)}) if number > 40 else []
        excess = {"params.max": 500.0 if state == "infeasible" else -1.0}
        lines = [
            self._event(
                "start",
                trial=number,
                **said,
                baseline=baseline,
                parents=[] if baseline else parents,
                variation="crossover: slots cut at 1" if parents and not baseline else "random",
                constraints=excess,
            )
        ]
        rungs = {"complete": 2, "stopped": 1, "infeasible": 0, "failed": 1}[state]
        skill = 0.16 + 0.05 * math.log2(1 + cheap["cache_bytes"] / 2000)
        for rung in range(rungs):
            learned = 1 - math.exp(-(number + 200) / 3000) * 0.5
            values = np.clip(skill * learned + 0.05 * self.rng.standard_normal(2), 0.01, 0.99)
            scores = {
                p: {"score": float(v)} for p, v in zip(self.study.proxies, values, strict=True)
            }
            seconds = SECONDS * (0.25 if rung == 0 else 0.75)
            self.clock += timedelta(seconds=seconds / 2)
            result = {
                "rung": rung,
                "steps": self.study.steps(rung),
                "scores": scores,
                "values": {**cheap, "quality": float(np.mean(values))},
                "seconds": seconds,
                "tokens": 51_200,
                "measurements": {},
                "statistics": {},
            }
            lines.append(self._event("rung", trial=number, result=result))
        failure = {"kind": "diverged", "reason": "the loss is not finite", "detail": ""}
        told = failure if state == "failed" else None
        return [*lines, self._event("end", trial=number, state=state, failure=told)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, help="the folder to make the run in")
    parser.add_argument("--name", default="synthetic")
    parser.add_argument("--trials", type=int, default=10_000)
    options = parser.parse_args()
    made = Synthetic(options.runs, options.name, options.trials)
    made.append(options.trials)
    made.end()
    print(made.folder)


if __name__ == "__main__":
    main()
