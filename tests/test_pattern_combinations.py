"""Combinations of patterns with everything that goes beside them, drawn at random."""

import itertools
import random

import pytest
import torch
from attention_parts import build, config, decode, error, inputs
from torch.utils.flop_counter import FlopCounterMode

from mendel.primitives.attention.pattern_axes import PATTERNS
from mendel.primitives.base import Gene, GeneError


def random_genes(seed: int) -> dict[str, Gene]:
    """A combination of patterns with everything that goes beside them."""
    draw = random.Random(seed)
    return {
        "pattern": draw.choice(PATTERNS),
        "window": draw.choice((1, 2, 4, 7, 8, 16)),
        "sinks": draw.choice((0, 1, 3)),
        "globals": draw.choice((1, 3, 5)),
        "dilation": draw.choice((1, 2, 3)),
        "stride": draw.choice((2, 5, 8)),
        "summary": draw.choice((1, 2, 5)),
        "block": draw.choice((1, 2, 4)),
        "random": draw.choice((0, 1, 3)),
        "ramp": draw.choice((1, 8)),
        "kv_heads": draw.choice((0, 1, 2, 3)),
        "position": draw.choice(("rope", "alibi", "t5", "xl", "none")),
        "t5_buckets": 8,
        "qk_norm": draw.random() < 0.3,
        "norm_over": draw.choice(("head", "all")),
        "norm_scales": draw.random() < 0.7,
        "gate": draw.choice(("none", "sigmoid")),
        "conv": draw.choice((0, 0, 3)),
        "score": draw.choice(("softmax", "softmax", "sigmoid", "differential")),
        "logit_cap": draw.choice((0.0, 0.0, 5.0)),
        "talking_heads": draw.random() < 0.2,
        "sink_logits": draw.random() < 0.2,
    }


def test_random_combinations_agree_in_both_forms_and_cost_what_they_count() -> None:
    """100 of them in float64, over sequences of random lengths cut at random places."""
    done = 0
    for seed in range(1000):
        genes, draw = random_genes(seed), random.Random(-seed)
        try:
            config(genes)
        except GeneError:
            continue
        module = build(genes, dtype=torch.float64).requires_grad_(False)
        tokens = draw.randrange(1, 41)
        x = inputs(tokens, torch.float64, batch=1)
        cuts = sorted(draw.randrange(tokens + 1) for _ in range(3))
        pieces = [b - a for a, b in itertools.pairwise([0, *cuts, tokens]) if b > a]
        whole = module(x)[0]
        assert error(decode(module, x, pieces)[0], whole) < 1e-10, (seed, genes, pieces)
        with FlopCounterMode(display=False) as counter:
            steps, state = decode(module, x, [1] * tokens)
        assert error(steps, whole) < 1e-10, (seed, genes)
        cost = config(genes).cost(tokens, torch.float64)
        flops = pytest.approx(cost.flops_per_token * tokens, rel=1e-12)
        assert counter.get_total_flops() == flops, (seed, genes)
        assert state.bytes() == cost.state_bytes, (seed, genes)
        done += 1
        if done == 100:
            return
    raise AssertionError(f"only {done} combinations were valid")
