"""Train every genome of a small space once and keep the table as data for race.py.

    python benchmarks/make_table.py        goes on where it was stopped

One line of JSON per genome in `data/table.jsonl`: notation, canonical hash, score, params and cache
bytes. The first line holds the environment and the study that it was made with.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from record import environment

from mendel.genome.genome import Genome
from mendel.genome.hash import canonical_hash
from mendel.genome.notation import parse, show
from mendel.proxies.tasks import make_task
from mendel.proxies.train import Training
from mendel.search.objectives import cheap_values
from mendel.search.study import Study, load_study

HERE = Path(__file__).parent
STUDY = HERE / "data" / "table_space.yaml"
TABLE = HERE / "data" / "table.jsonl"
MIXERS = [
    "mha",
    "mqa",
    "swa(window=16)",
    "mamba2(key_dim=16)",
    "gated-deltanet",
    "rg-lru",
    "lfm2-conv",
    "retnet",
]
CHANNELS = ["swiglu(expansion=1.0)", "swiglu(expansion=2.0)"]


def genomes() -> Iterator[Genome]:
    """Every genome of the space, in a fixed order."""
    for slots in itertools.product(MIXERS, CHANNELS, MIXERS, CHANNELS):
        yield parse("{width=32} " + " > ".join(slots))


def train(study: Study, genome: Genome) -> dict[str, float]:
    config = study.proxies["recall"]
    training = Training(
        genome,
        make_task(config, study.search.seed),
        study.train,
        config.steps,
        config.batch,
        study.search.seed,
        "cpu",
    )
    training.advance(config.steps)
    return training.evaluate()


def main() -> None:
    torch.set_num_threads(1)
    study = load_study(STUDY)
    lines = TABLE.read_text().splitlines() if TABLE.exists() else []
    done = {json.loads(line)["hash"] for line in lines[1:]}
    with TABLE.open("a") as table:
        if not lines:
            head = {"environment": environment(), "study": STUDY.read_text()}
            table.write(json.dumps(head) + "\n")
        for index, genome in enumerate(genomes()):
            label = canonical_hash(genome)
            if label in done:
                continue
            done.add(label)
            scores = train(study, genome)
            row = {
                "notation": show(genome),
                "hash": label,
                "score": scores["score"],
                **cheap_values(study.goals, genome),
            }
            table.write(json.dumps(row) + "\n")
            table.flush()
            print(index, row["notation"], f"{scores['score']:.3f}", flush=True)


if __name__ == "__main__":
    main()
