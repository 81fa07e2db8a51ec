"""Do a genome's parallel form and its step-by-step form agree? Over random genomes of any kind."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from ..primitives.base import Gene
from ..primitives.catalogue import CATALOGUE, resolve
from .build import build
from .genome import JOINS, NORMS, PLACEMENTS, POSITIONS, RESIDUALS, Genome
from .notation import show
from .sample import sample_valid
from .space import Space

TOLERANCE = 1e-5
"""Of the logits' scale, in float32. Both forms add the same terms in another order, which costs
about sqrt(terms) roundings of 2^-24, a few layers deep; the bound leaves a factor of about ten."""

EXACT = 1e-10
"""The same bound in float64: forms that agree here are the same function."""

AMPLIFIED = 1e-4
"""A rounding of float32 grows where a norm divides by a small output, slot after slot. Beyond this
bound it must be explained otherwise."""


@dataclass(frozen=True)
class Disagreement:
    """A genome whose two forms differ by more than TOLERANCE; `exact` is the float64 difference."""

    notation: str
    seed: int
    difference: float
    exact: float
    routed: bool
    """It chooses experts, heads, buckets or tokens: a choice between two that tie within a rounding
    can flip."""

    @property
    def cause(self) -> Literal["rounding", "tie", "fault"]:
        """Why the forms differ: rounding that the depth amplified, a routing tie, or a fault."""
        if not self.exact <= EXACT:
            return "fault"
        if self.difference <= AMPLIFIED:
            return "rounding"
        return "tie" if self.routed else "fault"


def wide_space(width: int = 32) -> Space:
    """Everything of the catalogue that decodes: all names, all searched values of all axes."""
    operators: dict[str, dict[str, list[Gene]]] = {}
    for primitive in CATALOGUE:
        for name in primitive.names():
            _, genes = resolve(name, {})
            if genes.get("causal") is False:
                # It reads the whole sequence: there is no second form.
                continue
            operators[name] = {
                axis.name: [genes[axis.name], *(v for v in axis.search if v != genes[axis.name])]
                for axis in primitive.axes
                if axis.search
            }
    return Space.model_validate(
        {
            "width": [width, 2 * width],
            "depth": [1, 8],
            "position": list(POSITIONS),
            "norm": list(NORMS),
            "placement": list(PLACEMENTS),
            "residual": list(RESIDUALS),
            "tied": [True, False],
            "join": list(JOINS),
            "tokens": [1.0, 0.4],
            "operators": operators,
            "pattern": "free",
            "parallel": {"branches": 3, "share": 0.3},
            "sharing": {"weights": True, "features": True},
        }
    )


def difference(genome: Genome, seed: int, dtype: torch.dtype = torch.float32) -> float:
    """The largest difference of logits, over their scale, between one call and a split one.

    The split call prefills a prefix of random length, then decodes token by token.
    """
    rng = np.random.default_rng(seed)
    length = int(rng.integers(2, 40))
    prefix = int(rng.integers(0, length))
    torch.manual_seed(seed)
    model = build(genome, vocab=32).to(dtype).eval()
    tokens = torch.randint(32, (2, length), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        whole, _ = model(tokens)
        state = model.init_state(2, length)
        pieces = []
        if prefix:
            logits, state = model(tokens[:, :prefix], state)
            pieces.append(logits)
        for t in range(prefix, length):
            logits, state = model(tokens[:, t : t + 1], state)
            pieces.append(logits)
    split = torch.cat(pieces, 1)
    scale = whole.abs().max().clamp_min(1.0)
    return float((split - whole).abs().max() / scale)


def chooses(genome: Genome) -> bool:
    """Whether a module of it makes discrete choices by the data."""
    return any(hasattr(m, "route") or hasattr(m, "choose") for m in build(genome).modules())


def disagreements(count: int, seed: int = 0) -> Iterator[Disagreement | None]:
    """One entry per random genome: None where the two forms agree to TOLERANCE in float32."""
    space = wide_space()
    for index in range(count):
        rng = np.random.default_rng((seed, index))
        genome = sample_valid(space, rng)
        found = difference(genome, index)
        # Written so that nan counts as a disagreement.
        if found <= TOLERANCE:
            yield None
        else:
            exact = difference(genome, index, torch.float64)
            yield Disagreement(show(genome), index, found, exact, chooses(genome))
