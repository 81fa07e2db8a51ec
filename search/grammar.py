"""What a sampler needs of a space of genomes, and the proposals that it makes of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from ..genome.constraints import exceeded
from ..genome.files import from_dict, to_dict
from ..genome.genome import Genome
from ..genome.hash import canonical_hash
from ..genome.notation import show
from ..genome.repair import repair
from ..genome.rules import space_violations, violations
from ..genome.sample import Choose, chooser, sample, sample_valid
from ..genome.space import Space
from ..genome.variation import cross, mutate
from ..primitives.base import Gene, GeneError

Choices = dict[str, tuple[int, list[Gene]]]
"""Per choice that was made: the index of the option taken, and the options."""

RANDOM = "random"
"""The variation of a genome that was drawn without a model or parents."""

MUTATED_CHILDREN = 1 / 3
"""The share of crossed children that are mutated too."""

TRIES = 200
"""Draws for one genome that keeps the constraints."""


@dataclass(frozen=True)
class Draw:
    """A genome and how it came about."""

    genome: Genome
    parents: tuple[int, ...] = ()
    variation: str = RANDOM
    choices: Choices = field(default_factory=dict)


@dataclass(frozen=True)
class Proposal:
    """A candidate before any result. `constraints`: how far each is exceeded, feasible <= 0."""

    draw: Draw
    hash: str
    constraints: Mapping[str, float]
    baseline: str | None = None

    @property
    def feasible(self) -> bool:
        return all(value <= 0 for value in self.constraints.values())

    def as_json(self) -> dict[str, Any]:
        """What `from_json` reads, and the notation for people."""
        return {
            "genome": to_dict(self.draw.genome),
            "notation": show(self.draw.genome),
            "hash": self.hash,
            "parents": list(self.draw.parents),
            "variation": self.draw.variation,
            "choices": {name: [i, options] for name, (i, options) in self.draw.choices.items()},
            "constraints": dict(self.constraints),
            "baseline": self.baseline,
        }

    @classmethod
    def of_baseline(cls, name: str, genome: Genome, grammar: Grammar) -> Proposal:
        draw = Draw(genome, (), "baseline")
        return cls(draw, grammar.hash(genome), grammar.exceeded(genome), name)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Proposal:
        draw = Draw(
            from_dict(content["genome"]),
            tuple(content["parents"]),
            content["variation"],
            {name: (i, options) for name, (i, options) in content["choices"].items()},
        )
        return cls(draw, content["hash"], content["constraints"], content["baseline"])


class Grammar(Protocol):
    """A space of genomes to a sampler; random methods are pure functions of their generator."""

    def sample(self, rng: np.random.Generator) -> Genome:
        """A random genome, feasible where a few hundred draws find one."""
        ...

    def build(self, choose: Choose) -> Genome:
        """A genome by the chooser's choices, repaired."""
        ...

    def child(
        self, parents: Sequence[Genome], rng: np.random.Generator, least_changes: int = 0
    ) -> tuple[Genome, str]:
        """A variation of one or two parents, and its description. With `least_changes` it has so
        many mutations at least. May raise GeneError."""
        ...

    def hash(self, genome: Genome) -> str:
        """Equal for genomes that make the same model."""
        ...

    def exceeded(self, genome: Genome) -> dict[str, float]:
        """By how much each constraint is exceeded, feasible where <= 0."""
        ...

    def holds(self, genome: Genome) -> bool:
        """Whether the genome is in the space, so that its children can be."""
        ...


class SpaceGrammar:
    """The grammar that a study's space spans."""

    def __init__(self, space: Space) -> None:
        self.space = space

    def sample(self, rng: np.random.Generator) -> Genome:
        try:
            return sample_valid(self.space, rng, TRIES)
        except GeneError:
            raise
        except ValueError:
            return self.build(chooser(rng))

    def build(self, choose: Choose) -> Genome:
        return repair(sample(self.space, choose), self.space)

    def child(
        self, parents: Sequence[Genome], rng: np.random.Generator, least_changes: int = 0
    ) -> tuple[Genome, str]:
        if len(parents) == 1:
            child, words = parents[0], []
            changes = max(1, least_changes)
        else:
            child, how = cross(parents[0], parents[1], self.space, rng)
            words = [how]
            changes = max(int(rng.random() < MUTATED_CHILDREN), least_changes)
        for _ in range(changes):
            child, how = mutate(child, self.space, rng)
            words.append(how)
        return child, "; ".join(words)

    def hash(self, genome: Genome) -> str:
        return canonical_hash(genome)

    def exceeded(self, genome: Genome) -> dict[str, float]:
        return exceeded(genome, self.space.constraints)

    def holds(self, genome: Genome) -> bool:
        return not violations(genome) and not space_violations(genome, self.space)
