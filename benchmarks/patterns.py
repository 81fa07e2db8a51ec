"""Every attention pattern against full attention, in one run.

    PYTHONPATH=benchmarks python benchmarks/patterns.py [--tokens 4096] [--repeats 15]

Queries, keys and values lie ready, as a layer lays them; forward and backward in float32. A pattern
takes turns with full attention (in both directions where the pattern reads both), so that noise of
the machine meets both; a figure is the ratio of two neighbouring times. `pairs` is the share of
full attention's pairs of queries and keys that the pattern shows: what it could save.
"""

from __future__ import annotations

import argparse
import os
import time

import torch
from record import save, spread
from torch import Tensor

from mendel.kernels.backend import used_backends
from mendel.primitives.attention.attend import attend
from mendel.primitives.attention.axes import configure_plain
from mendel.primitives.attention.keyvalues import KeyValues
from mendel.primitives.attention.layer import Attention
from mendel.primitives.attention.patterns import Window
from mendel.primitives.attention.weigh import Score
from mendel.primitives.base import Gene, Site
from mendel.primitives.catalogue import resolve

CASES: dict[str, dict[str, Gene]] = {
    "full": {},
    "sliding": {"pattern": "sliding"},
    "sliding, ALiBi": {"pattern": "sliding", "position": "alibi"},
    "sliding, 4 sinks": {"pattern": "sliding", "sinks": 4},
    "sliding, 4 sinks, ALiBi": {"pattern": "sliding", "sinks": 4, "position": "alibi"},
    "dilated by 2": {"pattern": "dilated"},
    "chunked": {"pattern": "chunked"},
    "strided by 64": {"pattern": "strided"},
    "fixed, 8 of 64": {"pattern": "fixed"},
    "bigbird, blocks of 64": {"pattern": "bigbird", "block": 64, "globals": 64},
    "multi-scale": {"pattern": "multi-scale"},
    "adaptive-span": {"pattern": "adaptive-span"},
    "sliding, both ways": {"pattern": "sliding", "causal": False},
    "sliding, 4 globals, both ways": {"pattern": "sliding", "sinks": 4, "causal": False},
    "bigbird, both ways": {"pattern": "bigbird", "block": 64, "globals": 64, "causal": False},
}
HEADS, HEAD_DIM, WINDOW = 4, 64, 128
WIDTH = HEADS * HEAD_DIM


def build(genes: dict[str, Gene]) -> Attention:
    _, full = resolve("attention", {"heads": HEADS, "window": WINDOW, **genes})
    module = configure_plain(Site(WIDTH, "rope"), full).build()
    assert isinstance(module, Attention)
    return module


def seconds(module: Attention, inputs: list[Tensor]) -> float:
    """One pass of the module's pattern, forward and backward."""
    position = module.position if module.span is None else module.span.beside(module.position)
    q, k, v = (t.transpose(1, 2) for t in inputs)
    start = time.perf_counter()
    out = attend(q, KeyValues(k, v), module.config.pattern, Score(), position)
    torch.autograd.grad(out.square().mean(), inputs)
    return time.perf_counter() - start


def pairs(module: Attention, tokens: int) -> float:
    """The pattern's share of the pairs of full attention."""
    at = torch.arange(tokens)
    shares = []
    for heads, part in module.config.pattern.parts(HEADS):
        full = Window(causal=part.causal).sees(at, at, tokens).sum()
        shares += [(part.sees(at, at, tokens).sum() / full).item()] * heads
    return sum(shares) / len(shares)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    shape = (1, options.tokens, HEADS, HEAD_DIM)
    inputs = [torch.randn(shape).requires_grad_() for _ in range(3)]
    full = {causal: build({"causal": causal}) for causal in (True, False)}
    rows = []
    for name, genes in CASES.items():
        module = build(genes)
        whole = full[module.config.causal]
        ratios, times = [], []
        with used_backends() as used:
            for repeat in range(options.repeats + 1):
                theirs, own = seconds(whole, inputs), seconds(module, inputs)
                if repeat:  # the first one allocates
                    ratios.append(own / theirs)
                    times.append(own)
        rows.append(
            {
                "pattern": name,
                "time, share of full": spread(ratios),
                "s": spread(times),
                "pairs": pairs(module, options.tokens),
                "cache, MB": module.config.cost(options.tokens, torch.float32).state_bytes / 1e6,
                "backend": ", ".join(sorted(used["attention"])),
            }
        )
    save(
        "patterns",
        f"What does a pattern cost beside full attention at {options.tokens:,} tokens?",
        rows,
        setting=f"{HEADS} heads of {HEAD_DIM}, window {WINDOW}, one sequence, float32, one thread",
        load_of_the_machine=load,
    )


if __name__ == "__main__":
    main()
