"""Run folders for the tests of everything that reads a run, written through the real store.

The genomes are drawn from the study's space and the costs are counted; the scores are made up, so
that a folder with every kind of trial is there in a second.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np

from mendel.genome.files import to_dict
from mendel.genome.genome import Genome
from mendel.genome.hash import canonical_hash
from mendel.genome.notation import show
from mendel.genome.sample import sample_valid
from mendel.search.objectives import cheap_values
from mendel.search.store import RunStore, write_json
from mendel.search.study import Study, load_study

QUESTION = "which <script>alert(1)</script> & 'hybrid' wins?"

STUDY = """\
name: {name}
question: "{question}"
space:
  width: 32
  depth: [2, 6]
  operators:
    gqa: {{heads: [4], kv_heads: [1, 2]}}
    mamba2: {{key_dim: [8]}}
    swiglu: {{expansion: [1.0, 2.0]}}
    moe: {{experts: [4], top_k: [1, 2]}}
  parallel: {{branches: 2, share: 0.3}}
  sharing: {{weights: true, features: true}}
proxies:
  recall: {{task: in-context-recall, steps: 40, batch: 4, length: 16}}
  copying: {{task: selective-copying, steps: 40, batch: 4}}
objectives: [quality, {{cache_bytes: {{context: 4096, dtype: bf16}}}}, latency_decode]
search: {{trials: {trials}, population: 8, rungs: [0.25, 1.0], {search}}}
baselines: [transformer++, mamba2, striped, jamba-like, griffin-like]
runs: "{runs}"
"""

REASON = "it needs more than the limit of 1 GiB: <b>tried</b> to allocate 3 GiB"


def made_study(
    folder: Path, trials: int = 20, name: str = "made", seed: int = 0, sampler: str = "evolution"
) -> Study:
    """The study of `made_run`, whose run will stand in `folder`/`name`."""
    path = folder / f"{name}.yaml"
    search = f"seed: {seed}, sampler: {sampler}"
    text = STUDY.format(name=name, question=QUESTION, trials=trials, search=search, runs=folder)
    path.write_text(text, encoding="utf-8")
    return load_study(path, check=False)


def made_run(
    folder: Path, trials: int = 20, name: str = "made", seed: int = 0, sampler: str = "evolution"
) -> Path:
    """A finished run with trials of every state; the path of its folder."""
    study = made_study(folder, trials, name, seed, sampler)
    rng = np.random.default_rng(5 + seed)
    with RunStore.open(study) as store:
        write_json(store.folder / "provenance.json", {"versions": {"torch": "2.13"}, "seed": 0})
        store.tell("begin", study=study.name, workers=1)
        for number, (name, genome) in enumerate(study.baseline_genomes()):
            _tell(store, study, number, genome, name, "complete", rng)
        states = ["complete", "stopped", "complete", "complete"]
        first = len(study.baselines)
        for i in range(trials):
            state = {3: "failed", 7: "infeasible"}.get(i, states[i % 4])
            genome = sample_valid(study.space, rng)
            _tell(store, study, first + i, genome, None, state, rng)
        store.tell("remark", text="the space holds no more candidates that are new")
        store.tell("complete")
    return study.folder


def _tell(
    store: RunStore,
    study: Study,
    number: int,
    genome: Genome,
    baseline: str | None,
    state: str,
    rng: np.random.Generator,
) -> None:
    excess = 120.0 if state == "infeasible" else -1.0
    store.tell(
        "start",
        number,
        genome=to_dict(genome),
        notation=show(genome),
        hash=canonical_hash(genome),
        baseline=baseline,
        parents=[0, 1] if number > 9 else [],
        variation="crossover: slots cut at 1" if number > 9 else "random",
        constraints={"params.max": excess},
    )
    store.trial_folder(number)
    failure = None
    if state == "failed":
        failure = {"kind": "memory", "reason": REASON, "detail": "Traceback ..."}
    elif state != "infeasible":
        curves: dict[str, Any] = {}
        for rung in range(1 if state == "stopped" else 2):
            store.tell("rung", number, result=_result(study, genome, rung, rng, curves))
        write_json(store.trial_folder(number) / "curves.json", curves)
    store.tell("end", number, state=state, failure=failure)


def _result(
    study: Study, genome: Genome, rung: int, rng: np.random.Generator, curves: dict[str, Any]
) -> dict[str, Any]:
    cheap = cheap_values(study.goals, genome)
    cache = cheap["cache_bytes"]
    scores = {}
    for proxy in study.proxies:
        skill = 0.2 + 0.09 * math.log2(cache / 2000) * (0.5 + 0.5 * rung)
        score = float(np.clip(skill + 0.12 * rng.standard_normal(), 0.02, 0.99))
        scores[proxy] = {"score": score, "accuracy": score, "loss": 2.5 - 2 * score}
        steps = study.steps(rung)[proxy]
        curves[proxy] = [
            {
                "step": s,
                "tokens": s * 64,
                "seconds": 0.1 * s,
                "lr": 0.003,
                "loss": 2.7 - 2 * score * (1 - math.exp(-s / 12)) + 0.04 * rng.standard_normal(),
            }
            for s in range(2, steps + 1, 2)
        ]
    latency = (0.4 + 0.25 * len(genome.slots)) * 1e-3
    measured = {
        "median": latency,
        "low": 0.93 * latency,
        "high": 1.1 * latency,
        "unit": "s",
        "repeats": 30,
        "conditions": {"device": "cpu", "dtype": "fp32", "batch": 1, "context": 512},
        "slots": [0.25e-3] * len(genome.slots),
    }
    quality = sum(s["score"] for s in scores.values()) / len(scores)
    return {
        "rung": rung,
        "steps": study.steps(rung),
        "scores": scores,
        "values": {**cheap, "quality": quality, "latency_decode": latency},
        "seconds": 1.5,
        "tokens": 2560,
        "measurements": {"latency_decode": measured},
        "statistics": {
            proxy: {
                f"slot{i}.{j}": {"load": [0.4, 0.3, 0.2, 0.1], "dropped": 0.05, "entropy": 1.2}
                for i, j, op in genome.ops()
                if op.name == "moe"
            }
            for proxy in study.proxies
        },
    }
