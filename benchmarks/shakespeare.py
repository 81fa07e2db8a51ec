"""nanoGPT's published CPU point: 4 layers, width 128, 4 heads, 2,000 steps of 12 x 64 characters.

    python benchmarks/shakespeare.py --text tinyshakespeare.txt

nanoGPT's README gives a validation loss of 1.88 nats per character for it (character level, dropout
0, CPU). Here a genome of that shape trains on the same text for the same number of steps; bytes are
the characters of this text (it is ASCII). The split is nanoGPT's: the last tenth is held out.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
from record import save

from mendel.genome.cost import cost
from mendel.genome.notation import parse, show
from mendel.proxies.recipe import TrainConfig
from mendel.proxies.tasks import ProxyConfig, make_task
from mendel.proxies.train import Training

PUBLISHED = 1.88
STEPS, BATCH, LENGTH = 2000, 12, 64
GENOMES = [
    "{width=128, norm=layernorm, position=learned} [mha > gelu-mlp]*4",
    "{width=128} [mha > swiglu]*4",
    "{width=128} [mamba2 > swiglu > mha > swiglu]*2",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    arguments = parser.parse_args()
    proxy = ProxyConfig.model_validate(
        {
            "task": "byte-text",
            "steps": STEPS,
            "batch": BATCH,
            "length": LENGTH,
            "text": str(arguments.text.resolve()),
            "test_bytes": arguments.text.stat().st_size,  # all that is held out
        }
    )
    rows = []
    for notation in GENOMES:
        for seed in arguments.seeds:
            genome = parse(notation)
            task = make_task(proxy, 0)
            start = time.perf_counter()
            training = Training(
                genome,
                task,
                TrainConfig(lr=2e-3),
                steps=STEPS,
                batch=BATCH,
                seed=seed,
                device="cpu",
            )
            training.advance(STEPS)
            seconds = time.perf_counter() - start
            nats = training.evaluate()["bits_per_byte"] * math.log(2)
            rows.append(
                {
                    "genome": show(genome),
                    "params": cost(genome).total.params,
                    "seed": seed,
                    "steps": STEPS,
                    "validation nats per character": nats,
                    "published": PUBLISHED,
                    "reached": nats <= PUBLISHED,
                    "seconds": seconds,
                }
            )
    save(
        "shakespeare",
        "Does a genome of nanoGPT's CPU shape reach its published loss in the same steps?",
        rows,
        source="nanoGPT README, character level, CPU: 1.88 nats per character",
        threads=torch.get_num_threads(),
    )


if __name__ == "__main__":
    main()
