"""Samplers as Optuna samplers, their determinism, and that no candidate comes twice."""

from collections.abc import Callable
from typing import Any

import numpy as np
import optuna
import pytest

from mendel.genome.constraints import satisfied
from mendel.genome.genome import Genome
from mendel.genome.rules import space_violations, violations
from mendel.genome.space import Space
from mendel.search.grammar import Proposal, SpaceGrammar
from mendel.search.samplers import (
    EvolutionSampler,
    Exhausted,
    GenomeSampler,
    RandomSampler,
    TpeSampler,
)

SPACE = {
    "width": [16, 32],
    "depth": [2, 6],
    "operators": {
        "gqa": {"heads": [2, 4], "kv_heads": [1, 2]},
        "mamba2": {"heads": [2]},
        "swiglu": {"expansion": [1.0, 2.0, 3.0]},
    },
    "parallel": {"branches": 2, "share": 0.2},
    "constraints": {"params": {"max": 30000}},
}

MAKERS: dict[str, Callable[[SpaceGrammar, int], GenomeSampler]] = {
    "evolution": lambda grammar, seed: EvolutionSampler(grammar, seed, 6),
    "random": lambda grammar, seed: RandomSampler(grammar, seed, 6),
    "tpe": lambda grammar, seed: TpeSampler(grammar, seed, 6, 2),
}


@pytest.fixture(autouse=True)
def _quiet() -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)


def losses_of(genome: Genome) -> tuple[float, float]:
    """Fewer attention slots and a smaller width are better; depth is a trade."""
    attention = sum(op.name == "gqa" for _, _, op in genome.ops())
    return attention + genome.width / 16 - len(genome.slots) / 2, float(len(genome.slots))


def run(sampler: GenomeSampler, trials: int) -> list[Proposal]:
    found = []
    for number in range(trials):
        proposal = sampler.propose(number)
        sampler.adopt(number, proposal)
        sampler.observe(number, 0, losses_of(proposal.draw.genome))
        found.append(proposal)
    return found


@pytest.mark.parametrize("name", MAKERS)
def test_candidates_are_new_valid_and_feasible(name: str) -> None:
    space = Space.model_validate(SPACE)
    found = run(MAKERS[name](SpaceGrammar(space), 0), 40)
    assert len({p.hash for p in found}) == 40
    for proposal in found:
        genome = proposal.draw.genome
        assert not violations(genome)
        assert not space_violations(genome, space)
        assert satisfied(genome, space.constraints)
        assert proposal.feasible


@pytest.mark.parametrize("name", MAKERS)
def test_a_seed_decides_everything(name: str) -> None:
    grammar = SpaceGrammar(Space.model_validate(SPACE))
    first, again, other = (run(MAKERS[name](grammar, seed), 20) for seed in (3, 3, 4))
    assert first == again
    assert [p.hash for p in first] != [p.hash for p in other]


@pytest.mark.parametrize("name", MAKERS)
def test_a_resumed_sampler_goes_on_as_if_never_stopped(name: str) -> None:
    grammar = SpaceGrammar(Space.model_validate(SPACE))
    whole = run(MAKERS[name](grammar, 0), 25)
    resumed = MAKERS[name](grammar, 0)
    for number, proposal in enumerate(whole[:15]):
        stored = Proposal.from_json(proposal.as_json())
        assert stored == proposal
        resumed.adopt(number, stored)
        resumed.observe(number, 0, losses_of(stored.draw.genome))
    for number in range(15, 25):
        proposal = resumed.propose(number)
        resumed.adopt(number, proposal)
        resumed.observe(number, 0, losses_of(proposal.draw.genome))
        assert proposal == whole[number]


@pytest.mark.parametrize("name", MAKERS)
def test_optuna_asks_and_tells(name: str) -> None:
    sampler = MAKERS[name](SpaceGrammar(Space.model_validate(SPACE)), 0)
    study = optuna.create_study(directions=["minimize"] * 2, sampler=sampler)
    for number in range(10):
        trial = study.ask()
        assert trial.number == number
        proposal = sampler.take(number)
        sampler.adopt(number, proposal)
        for key, value in proposal.constraints.items():
            trial.set_constraint(key, value)
        losses = losses_of(proposal.draw.genome)
        sampler.observe(number, 0, losses)
        study.tell(trial, losses)
    assert all(t.state == optuna.trial.TrialState.COMPLETE for t in study.trials)
    assert study.best_trials
    assert set(study.trials[0].constraints) == {"params.max"}
    with pytest.raises(RuntimeError, match="whole genome"):
        study.ask().suggest_float("lr", 0.0, 1.0)


@pytest.mark.parametrize("name", MAKERS)
def test_a_small_space_is_exhausted(name: str) -> None:
    tiny = {
        "width": 16,
        "depth": 2,
        "operators": {"gqa": {"heads": [2], "kv_heads": [1, 2]}, "swiglu": {"expansion": [1.0]}},
    }
    sampler = MAKERS[name](SpaceGrammar(Space.model_validate(tiny)), 0)
    assert len(run(sampler, 2)) == 2
    with pytest.raises(Exhausted):
        sampler.propose(2)
    with pytest.raises(Exhausted):
        sampler.prepare(2)


def test_constraints_that_hardly_anything_keeps() -> None:
    tight = {**SPACE, "constraints": {"params": {"max": 10}}}
    sampler = RandomSampler(SpaceGrammar(Space.model_validate(tight)), 0, 6)
    proposal = sampler.propose(0)
    assert not proposal.feasible
    assert proposal.constraints["params.max"] > 0


def test_baselines_come_first_and_are_never_found_again() -> None:
    grammar = SpaceGrammar(Space.model_validate(SPACE))
    probe = RandomSampler(grammar, 0, 6).propose(1).draw.genome
    sampler = RandomSampler(grammar, 0, 6)
    sampler.queue = [Proposal.of_baseline("probe", probe, grammar)]
    found = run(sampler, 12)
    assert found[0].baseline == "probe"
    assert found[0].draw.genome == probe
    assert all(p.hash != found[0].hash for p in found[1:])


def test_evolution_breeds_from_the_best() -> None:
    grammar = SpaceGrammar(Space.model_validate(SPACE))
    sampler = EvolutionSampler(grammar, 0, 6)
    found = run(sampler, 40)
    assert all(not p.draw.parents for p in found[:6])
    bred = found[6:]
    assert sum(bool(p.draw.parents) for p in bred) > len(bred) / 2
    assert all(n < i + 6 for i, p in enumerate(bred) for n in p.draw.parents)
    # Survivors: nobody outside dominates anybody inside.
    values = {n: losses_of(p.draw.genome) for n, p in enumerate(found)}
    inside = set(sampler.parents)
    assert len(inside) == 6
    for n in set(values) - inside:
        for m in inside:
            assert not (
                all(a <= b for a, b in zip(values[n], values[m], strict=True))
                and values[n] != values[m]
            )


def test_a_higher_rung_beats_a_better_loss() -> None:
    grammar = SpaceGrammar(Space.model_validate(SPACE))
    sampler = EvolutionSampler(grammar, 0, 3)
    for number in range(5):
        sampler.adopt(number, sampler.propose(number))
        sampler.observe(number, 0, (float(number), 0.0))
    assert sampler.parents == [0, 1, 2]
    sampler.observe(4, 1, (9.0, 9.0))
    assert sampler.parents == [4, 0, 1]


def test_evolution_comes_nearer_to_a_target_than_random() -> None:
    wide: dict[str, Any] = {**SPACE, "depth": [2, 8], "constraints": {}}
    grammar = SpaceGrammar(Space.model_validate(wide))
    target = RandomSampler(grammar, 99, 6).propose(0).draw.genome

    def away(genome: Genome) -> tuple[float, float]:
        pairs = zip(genome.slots, target.slots, strict=False)
        wrong = sum(a != b for a, b in pairs) + abs(len(genome.slots) - len(target.slots))
        return float(wrong), float(genome.width != target.width)

    best: dict[str, list[float]] = {"evolution": [], "random": []}
    for name in best:
        for seed in range(4):
            sampler = MAKERS[name](grammar, seed)
            reached = []
            for number in range(60):
                proposal = sampler.propose(number)
                sampler.adopt(number, proposal)
                reached.append(away(proposal.draw.genome))
                sampler.observe(number, 0, reached[-1])
            best[name].append(min(sum(losses) for losses in reached))
    assert np.mean(best["evolution"]) < np.mean(best["random"])
