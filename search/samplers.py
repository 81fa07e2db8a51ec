"""Where candidates come from: `evolution` (ours), `random` and `tpe`, each an Optuna sampler.

A genome is no fixed set of parameters, so a proposal is made whole, in `before_trial`, and kept as
one attribute of the trial. A proposal is a pure function of the study's seed, the trial's number
and the results observed before it: a resumed run needs no generator's state.
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, TPESampler
from optuna.trial import FrozenTrial

from ..genome.sample import Option
from ..primitives.base import GeneError
from .grammar import RANDOM, Choices, Draw, Grammar, Proposal
from .pareto import as_losses, order
from .study import SearchConfig

ATTEMPTS = 64
"""Random draws for a new, feasible candidate where the sampler's own way gave none."""


HOPELESS = 3
"""Infeasible random draws after which one of them is proposed as it is."""


MOST_CHANGES = 3
"""Mutations of a child after as many duplicates."""


class Exhausted(Exception):
    """The space seems to hold no candidate that was not seen before."""


class GenomeSampler(BaseSampler):
    """The common part: seeds, refusal of duplicates and of infeasible genomes, parameters.

    The caller asks Optuna for a trial, takes its proposal, stores it and `adopt`s it; after a
    resume it adopts the stored ones. Optuna's own suggestions are not used: one in a trial of such
    a study is an error.
    """

    attempts = 64
    """Draws in the sampler's own way for a candidate that is new and feasible."""

    def __init__(self, grammar: Grammar, seed: int, population: int) -> None:
        self.grammar = grammar
        self.seed = seed
        self.population = population
        self.queue: list[Proposal] = []
        """Proposals to hand out first: the baselines."""
        self.hashes: set[str] = set()
        self.drawn: int = 0
        """Searched candidates adopted so far."""
        self._made: dict[int, Proposal] = {}

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        return {}

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return {}

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        raise RuntimeError(f"a trial of this study is a whole genome; it has no {param_name!r}")

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """Propose the trial's genome; `take` hands it over. Raises Exhausted."""
        if trial.number not in self._made:
            self._made[trial.number] = self.propose(trial.number)

    def prepare(self, number: int) -> None:
        """Propose ahead of asking Optuna, so that no trial is stored where none can be made.
        Raises Exhausted."""
        self._made[number] = self.propose(number)

    def take(self, number: int) -> Proposal:
        """The proposal of that trial, once; it is made where nobody asked Optuna for the trial."""
        return self._made.pop(number, None) or self.propose(number)

    def propose(self, number: int) -> Proposal:
        """The candidate for a trial number, given what was adopted and observed so far.

        Infeasible only where so many draws gave nothing better. Raises Exhausted."""
        if self.queue:
            return self.queue[0]
        rng = np.random.default_rng((self.seed, number))
        infeasible: list[Proposal] = []
        for attempt in range(self.attempts + ATTEMPTS):
            try:
                draw = (
                    self.draw(rng, attempt)
                    if attempt < self.attempts
                    else Draw(self.grammar.sample(rng))
                )
            except GeneError:
                continue
            key = self.grammar.hash(draw.genome)
            if key in self.hashes:
                continue
            proposal = Proposal(draw, key, self.grammar.exceeded(draw.genome))
            if proposal.feasible:
                return proposal
            if draw.variation == RANDOM:
                # The grammar has tried hundreds of times already.
                infeasible.append(proposal)
                if len(infeasible) == HOPELESS:
                    break
        if not infeasible:
            raise Exhausted
        return infeasible[0]

    @abstractmethod
    def draw(self, rng: np.random.Generator, attempt: int) -> Draw:
        """A candidate; duplicates are refused by the caller, who then asks again and counts the
        attempts from 0. May raise GeneError."""

    def adopt(self, number: int, proposal: Proposal) -> None:
        """The trial has this proposal, new or stored in an earlier life of the run."""
        if proposal.baseline is None:
            self.drawn += 1
        elif self.queue and proposal.baseline == self.queue[0].baseline:
            self.queue.pop(0)
        self.hashes.add(proposal.hash)

    def observe(self, number: int, rung: int, losses: Sequence[float]) -> None:
        """The trial ended a rung. Rungs of a trial come in order."""


class RandomSampler(GenomeSampler):
    """Genomes drawn from the grammar, each at most once."""

    def draw(self, rng: np.random.Generator, attempt: int) -> Draw:
        return Draw(self.grammar.sample(rng))


class EvolutionSampler(GenomeSampler):
    """NSGA-II (Deb et al. 2002) in a steady state: whoever is proposed next has as parents the best
    `population` of all trials observed so far. The first `population` candidates are random.

    Trials compare by the highest rung they ended, then by non-dominated rank among those that ended
    it, then by crowding; parents win tournaments of `tournament`. Baselines can be parents where
    the space holds them.
    """

    def __init__(
        self,
        grammar: Grammar,
        seed: int,
        population: int,
        *,
        crossover: float = 0.9,
        tournament: int = 2,
    ) -> None:
        super().__init__(grammar, seed, population)
        self.crossover = crossover
        self.tournament = tournament
        self.parents: list[int] = []
        """The survivors, best first."""
        self._candidates: dict[int, Proposal] = {}
        self._results: dict[int, list[tuple[float, ...]]] = {}

    def adopt(self, number: int, proposal: Proposal) -> None:
        super().adopt(number, proposal)
        if proposal.feasible and self.grammar.holds(proposal.draw.genome):
            self._candidates[number] = proposal

    def observe(self, number: int, rung: int, losses: Sequence[float]) -> None:
        if number not in self._candidates:
            return
        self._results.setdefault(number, []).append(tuple(losses))
        pool = self.parents if number in self.parents else [*self.parents, number]
        self.parents = self._ranked(pool)[: self.population]

    def _ranked(self, pool: Sequence[int]) -> list[int]:
        ranked: list[int] = []
        for rung in sorted({len(self._results[n]) for n in pool}, reverse=True):
            level = sorted(n for n in pool if len(self._results[n]) == rung)
            losses = as_losses([self._results[n][-1] for n in level])
            ranked += [level[i] for i in order(losses)]
        return ranked

    def draw(self, rng: np.random.Generator, attempt: int) -> Draw:
        if self.drawn < self.population or not self.parents:
            return Draw(self.grammar.sample(rng))
        wanted = 2 if len(self.parents) > 1 and rng.random() < self.crossover else 1
        chosen: list[int] = []
        while len(chosen) < wanted:
            # `parents` is in order, so the lowest place wins the tournament.
            winner = self.parents[int(rng.integers(len(self.parents), size=self.tournament).min())]
            if winner not in chosen:
                chosen.append(winner)
        parents = [self._candidates[n].draw.genome for n in chosen]
        # Parents that have grown alike have few new children without a change, then without two.
        genome, words = self.grammar.child(parents, rng, least_changes=min(attempt, MOST_CHANGES))
        return Draw(genome, tuple(chosen), words)


class TpeSampler(GenomeSampler):
    """Optuna's TPE over the choices that sampling a genome makes, as categorical parameters.

    TPE needs values from every trial, and halving leaves most of them without the last ones, so it
    works on a study of its own, in memory, that holds the losses of the first rung.
    """

    attempts = 4
    """One costs tens of milliseconds, and where TPE repeats itself it goes on doing so."""

    def __init__(self, grammar: Grammar, seed: int, population: int, objectives: int) -> None:
        super().__init__(grammar, seed, population)
        self._shadow = optuna.create_study(directions=["minimize"] * objectives)
        self._choices: dict[int, Choices] = {}

    def adopt(self, number: int, proposal: Proposal) -> None:
        super().adopt(number, proposal)
        if proposal.draw.choices:
            self._choices[number] = proposal.draw.choices

    def observe(self, number: int, rung: int, losses: Sequence[float]) -> None:
        if rung == 0 and number in self._choices:
            choices = self._choices.pop(number)
            self._shadow.add_trial(
                optuna.trial.create_trial(
                    values=list(losses),
                    params={name: options[index] for name, (index, options) in choices.items()},
                    distributions={
                        name: optuna.distributions.CategoricalDistribution(options)
                        for name, (_, options) in choices.items()
                    },
                )
            )

    def draw(self, rng: np.random.Generator, attempt: int) -> Draw:
        # Group and multivariate are marked experimental, and a choice that the last genome did not
        # have is drawn by itself; saying so each time tells a user nothing.
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            self._shadow.sampler = TPESampler(
                n_startup_trials=self.population,
                multivariate=True,
                group=True,
                seed=int(rng.integers(2**31)),
            )
        trial = self._shadow.ask()
        choices: Choices = {}

        def choose(name: str, options: Sequence[Option]) -> Option:
            if len(options) == 1:
                return options[0]
            listed = list(options)
            value = trial.suggest_categorical(name, listed)
            index = next(i for i, option in enumerate(listed) if option is value or option == value)
            choices[name] = (index, [*listed])
            return listed[index]

        try:
            genome = self.grammar.build(choose)
        finally:
            # It only served to ask; `observe` adds the result under its parameters.
            self._shadow.tell(trial, state=optuna.trial.TrialState.FAIL)
        return Draw(genome, (), "tpe", choices)


def make_sampler(config: SearchConfig, grammar: Grammar, objectives: int) -> GenomeSampler:
    """The sampler that a study names, explicitly: Optuna's default changes between versions."""
    if config.sampler == "random":
        return RandomSampler(grammar, config.seed, config.population)
    if config.sampler == "tpe":
        return TpeSampler(grammar, config.seed, config.population, objectives)
    return EvolutionSampler(
        grammar,
        config.seed,
        config.population,
        crossover=config.crossover,
        tournament=config.tournament,
    )
