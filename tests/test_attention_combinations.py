"""Random valid settings of attention's axes: each builds, agrees with itself and counts its cost.

The settings start from a named point or from the defaults and change up to five axes. A refused one
must say why in a sentence; at least 500 valid ones are examined. Forms are compared in float64,
where no rounding hides a difference, to 1e-9 of the output's scale.
"""

import functools

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mendel.primitives.base import Axis, Config, Gene, GeneError, Site, is_causal
from mendel.primitives.catalogue import find

WIDTH, TOKENS = 32, 21
WANTED, GROUPS = 520, 26
NUMBERS: dict[str, tuple[Gene, ...]] = {
    "heads": (1, 2, 4),
    "kv_heads": (0, 1, 2),
    "head_dim": (0, 8, 16),
    "window": (4, 8, 64),
}
"""Sizes that suit a sequence of 21 tokens at width 32; other numbers are drawn from `search`."""


def _values(axis: Axis) -> tuple[Gene, ...]:
    return NUMBERS.get(axis.name) or axis.options or axis.search or (axis.default,)


def _draw(rng: np.random.Generator) -> tuple[str, dict[str, Gene]]:
    primitive, _ = find("attention")
    names = list(primitive.names())
    name = names[rng.integers(len(names))]
    free = [axis for axis in primitive.axes if len(_values(axis)) > 1]
    chosen = rng.choice(len(free), size=int(rng.integers(0, 6)), replace=False)
    genes = {}
    for i in chosen:
        values = _values(free[i])
        genes[free[i].name] = values[rng.integers(len(values))]
    return name, genes


@functools.cache
def settings() -> tuple[tuple[str, tuple[tuple[str, Gene], ...]], ...]:
    """WANTED different valid settings; every refusal on the way is a sentence."""
    rng = np.random.default_rng(0)
    found: dict[Config, tuple[str, tuple[tuple[str, Gene], ...]]] = {}
    refusals: list[str] = []
    while len(found) < WANTED:
        name, genes = _draw(rng)
        try:
            found.setdefault(configured(name, genes), (name, tuple(sorted(genes.items()))))
        except GeneError as error:
            refusals.append(str(error))
    assert all(len(sentence.split()) > 3 for sentence in refusals)
    assert len(refusals) < 10 * WANTED, "most combinations are refused"
    return tuple(found.values())


def configured(name: str, genes: dict[str, Gene]) -> Config:
    primitive, point = find(name)
    full = primitive.complete({**(point.genes if point else {}), **genes})
    return primitive.configure(Site(WIDTH, "rope", layer=1, depth=4), full)


@pytest.mark.parametrize("group", range(GROUPS))
def test_valid_combinations_keep_the_contract(group: int) -> None:
    for name, genes in settings()[group::GROUPS]:
        _examine(configured(name, dict(genes)), f"{name} {dict(genes)}")


def _examine(config: Config, label: str) -> None:
    torch.manual_seed(0)
    module = config.build().double().eval()
    x = torch.randn(2, TOKENS, WIDTH, dtype=torch.float64)
    cost = config.cost(TOKENS, torch.float64)
    assert cost.params == sum(p.numel() for p in module.parameters()), label
    with torch.no_grad():
        whole = module(x)[0]
        assert whole.shape == x.shape, label
        assert whole.isfinite().all(), label
        if not is_causal(config):
            return
        state = module.init_state(1, TOKENS, torch.float64)  # type: ignore[operator]
        assert state.bytes() == cost.state_bytes, label
        pieces = []
        with FlopCounterMode(display=False) as counter:
            for t in range(TOKENS):
                y, state = module(x[:1, t : t + 1], state)
                pieces.append(y)
        assert state.bytes() == cost.state_bytes, label
    scale = whole.abs().max()
    assert (torch.cat(pieces, 1) - whole[:1]).abs().max() < 1e-9 * scale, label
    counted = cost.flops_per_token * TOKENS
    assert counter.get_total_flops() == pytest.approx(counted, rel=1e-9), label


def test_the_settings_cover_the_axes() -> None:
    """Every option of every axis, and every point, stands in some valid setting."""
    primitive, _ = find("attention")
    configs = [(name, dict(genes)) for name, genes in settings()]
    assert {name for name, _ in configs} == set(primitive.names())
    for axis in primitive.axes:
        seen = set()
        for name, genes in configs:
            _, point = find(name)
            seen.add(primitive.complete({**(point.genes if point else {}), **genes})[axis.name])
        assert set(axis.options) <= seen, axis.name
