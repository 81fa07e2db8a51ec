"""The grammar of a study: reading it, drawing from it, counting it."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import optuna
import pytest
from pydantic import TypeAdapter, ValidationError

from mendel.genome.check import wide_space
from mendel.genome.constraints import Constraints, attention_share, exceeded, satisfied
from mendel.genome.cost import cost
from mendel.genome.genome import Genome, Slot
from mendel.genome.notation import parse, show
from mendel.genome.quantity import Bytes, Count
from mendel.genome.repair import repair
from mendel.genome.rules import space_violations, violations
from mendel.genome.sample import chooser, sample, sample_valid
from mendel.genome.space import show_size
from mendel.genome.space_check import SpaceError, check_space, read_space
from mendel.primitives.base import Gene
from mendel.primitives.catalogue import find

EXAMPLE: dict[str, Any] = {
    "width": 64,
    "depth": [4, 6],
    "position": ["rope"],
    "norm": ["rmsnorm"],
    "operators": {
        "gqa": {"heads": [4], "kv_heads": [1, 2]},
        "mamba2": {},
        "swiglu": {"expansion": [2.0, 3.0]},
    },
    "pattern": "alternate",
    "slots": [
        {"at": 0, "operators": ["gated-conv", "mamba2"]},
        {"at": -1, "operators": ["swiglu"]},
        {"every": 2, "offset": 1, "operators": ["swiglu", "moe"]},
    ],
    "parallel": {"branches": 2, "share": 0.25},
    "sharing": {"weights": True, "features": True},
    "constraints": {"params": {"max": 400000}},
}


def test_the_studys_example() -> None:
    space = read_space(EXAMPLE)
    assert space.width == (64,)
    assert space.depth == (4, 6)
    first, last = space.slots_at(4)[0], space.slots_at(5)[4]
    assert first.names == ("gated-conv", "mamba2")
    assert (last.label, last.names) == ("slot-1", ("swiglu",))
    # The name keeps its ranges from `operators`; one that is only in the rule has none.
    assert space.slots_at(4)[1].operators == {"swiglu": {"expansion": (2.0, 3.0)}, "moe": {}}
    assert space.slots_at(6)[2].names == ("gqa", "mamba2")
    for seed in range(60):
        genome = sample_valid(space, np.random.default_rng(seed))
        assert violations(genome) == []
        assert space_violations(genome, space) == []
        assert cost(genome).total.params <= 400000
    assert read_space(space.model_dump()) == space
    assert read_space(space.model_dump(mode="json")) == space


def test_sampling_is_a_function_of_the_seed() -> None:
    space = read_space(EXAMPLE)
    for seed in range(20):
        one, other = (sample_valid(space, np.random.default_rng(seed)) for _ in range(2))
        assert one == other
    assert len({sample_valid(space, np.random.default_rng(seed)) for seed in range(40)}) > 30


class Recorder:
    """Draws at random and keeps the options under every name."""

    def __init__(self, seed: int) -> None:
        self.choose = chooser(np.random.default_rng(seed))
        self.seen: dict[str, tuple[Any, ...]] = {}

    def __call__(self, name: str, options: Sequence[Any]) -> Any:
        assert self.seen.setdefault(name, tuple(options)) == tuple(options), name
        return self.choose(name, options)


@pytest.mark.parametrize("data", [EXAMPLE, None], ids=["example", "wide"])
def test_a_name_always_comes_with_the_same_options(data: dict[str, Any] | None) -> None:
    space = wide_space() if data is None else read_space(data)
    recorder = Recorder(0)
    for _ in range(300):
        sample(space, recorder)
    assert "depth" in recorder.seen
    if data is not None:
        assert {
            "slot0.op",
            "slot-1.swiglu.expansion",
            "slot2.gqa.kv_heads",
            "slot2.branches",
        } < set(recorder.seen)
        assert "slot2.1.op" in recorder.seen


def test_an_optuna_trial_can_choose() -> None:
    space = read_space(EXAMPLE)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=0, n_startup_trials=5))
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    for _ in range(30):
        trial = study.ask()

        def choose(name: str, options: Sequence[Any], trial: optuna.Trial = trial) -> Any:
            return trial.suggest_categorical(name, list(options))

        genome = repair(sample(space, choose), space)
        assert violations(genome) == []
        study.tell(trial, float(cost(genome).total.params))
    assert study.best_value < study.trials[0].value


def test_parallel_slots_come_as_often_as_asked() -> None:
    space = read_space(EXAMPLE | {"sharing": {}, "constraints": {}, "depth": 6})
    choose = chooser(np.random.default_rng(0))
    slots = [s for _ in range(500) for s in sample(space, choose).slots]
    mixers = [s for s in slots if find(s.branches[0].name)[0].kind == "mixer"]
    share = sum(len(s.branches) == 2 for s in mixers) / len(mixers)
    # 1,500 slots: five standard deviations are 0.056.
    assert abs(share - 0.25) < 0.056


class Enumerator:
    """Goes through all choices in turn, as an odometer."""

    def __init__(self) -> None:
        self.path: list[list[int]] = []
        self.at = 0

    def __call__(self, name: str, options: Sequence[Any]) -> Any:
        if self.at == len(self.path):
            self.path.append([0, len(options)])
        index = self.path[self.at][0]
        self.at += 1
        return options[index]

    def advance(self) -> bool:
        self.at = 0
        while self.path and self.path[-1][0] + 1 == self.path[-1][1]:
            self.path.pop()
        if self.path:
            self.path[-1][0] += 1
        return bool(self.path)


def _branches(slot: Slot) -> tuple[tuple[str, tuple[tuple[str, Gene], ...]], ...]:
    """What tells slots apart: the branches, whose order means something in a chain alone."""
    found = [(op.name, op.genes) for op in slot.branches]
    return tuple(found if slot.join == "chain" else sorted(found))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"pattern": "free", "depth": [1, 3]},
        {"parallel": {"branches": 2, "share": 0.5}, "join": ["mean", "sum"], "depth": 3},
        {"parallel": {"branches": 2, "share": 0.5}, "join": ["mean", "chain"], "depth": 2},
        {"parallel": {"branches": 3, "share": 0.5}, "depth": 2, "tied": [True, False]},
        {"parallel": {"branches": 2, "share": 0.5}, "depth": 2, "tokens": [1.0, 0.5, 0.25]},
        {"slots": [{"at": -1, "operators": ["swiglu"]}], "position": ["rope", "none"]},
    ],
    ids=str,
)
def test_the_size_is_counted_right(changes: dict[str, Any]) -> None:
    small = {
        "width": [32, 64],
        "depth": [2, 3],
        "operators": {"mqa": {"heads": [2, 4]}, "mingru": {}, "swiglu": {"expansion": [2.0, 3.0]}},
    }
    space = read_space(small | changes)
    choose, found = Enumerator(), set()
    for _ in itertools.count():
        genome = sample(space, choose)
        ordered = [
            (
                _branches(slot),
                slot.join,
                slot.tokens,
            )
            for slot in genome.slots
        ]
        header = (genome.width, genome.position, genome.tied)
        found.add((header, tuple(ordered)))
        if not choose.advance():
            break
    assert space.size() == len(found)


def test_huge_sizes_are_shown_as_powers() -> None:
    assert show_size(1234567) == "1,234,567"
    assert show_size(wide_space().size()).startswith("about 10^")


def test_any_stands_for_what_an_axis_searches() -> None:
    space = read_space(
        {"operators": {"mha": {"heads": "any", "qk_norm": "any"}}, "pattern": "free"}
    )
    assert space.operators["mha"]["heads"] == find("mha")[0].axis("heads").search
    assert space.operators["mha"]["qk_norm"] == (False, True)


@pytest.mark.parametrize(
    ("value", "number"),
    [(400000, 4e5), ("400k", 4e5), ("1.3B", 1.3e9), ("2M", 2e6), ("1e6", 1e6), (0.5, 0.5)],
)
def test_counts(value: Any, number: float) -> None:
    assert TypeAdapter(Count).validate_python(value) == number


@pytest.mark.parametrize(
    ("value", "number"),
    [(65536, 65536), ("64KiB", 65536), ("64 kB", 64000), ("1.5GiB", 1.5 * 2**30), ("64B", 64)],
)
def test_bytes(value: Any, number: float) -> None:
    assert TypeAdapter(Bytes).validate_python(value) == number


@pytest.mark.parametrize(
    "value", ["", "k", "-1", -1, "4x", "4 KiBs", True, None, float("nan"), [1]]
)
def test_what_is_no_quantity(value: Any) -> None:
    for kind in (Count, Bytes):
        with pytest.raises(ValidationError, match="a number of"):
            TypeAdapter(kind).validate_python(value)


OPERATORS = {"operators": {"mha": {}, "swiglu": {}}}


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        ({}, "space.operators is missing"),
        ({"operators": {}}, "space.operators: is empty: name at least one primitive"),
        (
            {"operators": 3},
            "space.operators: a mapping of names to ranges, or a list of names",
        ),
        (
            {"operators": {"mha": {"heads": 4.5}}},
            "space.operators.mha.heads: heads is a whole number from 1 to 1024, not 4.5",
        ),
        (
            {"operators": {"mha": {"heads": [4, "x"]}}},
            "space.operators.mha.heads.1: heads is a whole number from 1 to 1024, not x",
        ),
        (
            {"operators": {"mha": {"heads": [4, 4]}}},
            "space.operators.mha.heads.1: 4 is listed twice",
        ),
        (
            {"operators": {"mha": {"heads": []}}},
            "space.operators.mha.heads: the list is empty; heads is a whole number from 1 to 1024",
        ),
        (
            {"operators": {"mha": 4}},
            "space.operators.mha: a mapping of axes to lists of values, or {}",
        ),
        ({"operators": ["mha", "mha"]}, "space.operators.1: mha is listed twice"),
        (
            OPERATORS | {"widht": 64},
            (
                "space.widht: there is no such key; allowed are width, depth, position, norm, "
                "placement, residual, embedding_norm, tied, vocab, join, tokens, operators, "
                "pattern, slots, parallel, sharing, constraints; did you mean width?"
            ),
        ),
        (OPERATORS | {"width": 0}, "space.width: width is a whole number from 1 to 65536, not 0"),
        (
            OPERATORS | {"depth": [6, 4]},
            "space.depth: least and most are from 1 to 512, and least is not above most",
        ),
        (OPERATORS | {"depth": "4"}, "space.depth: a whole number, or [least, most]"),
        (
            OPERATORS | {"position": ["sin"]},
            (
                "space.position.0: position is one of rope, alibi, t5, xl, learned, sinusoidal, "
                "none, not sin"
            ),
        ),
        (
            OPERATORS | {"pattern": "odd"},
            "space.pattern: should be 'alternate' or 'free', not 'odd'",
        ),
        (
            {"operators": {"mha": {}, "mamba2": {}}},
            (
                "space.operators: slot 1 has nothing to hold: with pattern alternate it takes "
                "channel mixers, and there are only mha, mamba2"
            ),
        ),
        (
            {"operators": {"swiglu": {}}, "pattern": "free"},
            (
                "space.operators: a genome needs a mixer, and at depth 4 no slot takes one that "
                "can be built at width 64"
            ),
        ),
        (
            {"operators": {"mha": {"heads": [3, 5]}, "mamba2": {}, "swiglu": {}}},
            (
                "space.operators.mha: none of these values can be built at width 64: heads=3 "
                "does not divide the width 64; set head_dim as well"
            ),
        ),
        (
            {"operators": {"mha": {"heads": 64}, "swiglu": {}}, "width": [64, 128]},
            (
                "space.operators: slot 0 takes mha, and none can be built at width 64: "
                "head_dim=1 is odd, and rope turns pairs of channels"
            ),
        ),
        (
            OPERATORS | {"slots": [{"operators": ["mha"]}]},
            "space.slots.0: a slot rule has either at or every",
        ),
        (
            OPERATORS | {"slots": [{"at": 8, "operators": ["mha"]}]},
            "space.slots.0.at: there is no slot 8 at depth 8",
        ),
        (
            OPERATORS | {"slots": [{"every": 2, "offset": 2, "operators": ["mha"]}]},
            "space.slots.0.offset: is below every (2)",
        ),
        (
            OPERATORS | {"slots": [{"at": "first", "operators": ["mha"]}]},
            "space.slots.0.at: the number of a slot (from 0; -1 is the last), or a list of them",
        ),
        (
            OPERATORS | {"slots": [{"at": 0, "operators": {"mha": {"window": 0}}}]},
            "space.slots.0.operators.mha.window: window is a whole number of at least 1, not 0",
        ),
        (
            OPERATORS | {"parallel": {"branches": 2, "share": 1.5}},
            "space.parallel.share: should be less than or equal to 1, not 1.5",
        ),
        (
            OPERATORS | {"sharing": {"weight": True}},
            (
                "space.sharing.weight: there is no such key; allowed are weights, features; "
                "did you mean weights?"
            ),
        ),
        (
            OPERATORS | {"constraints": {"cache_bytes": {"most": 3}}},
            (
                "space.constraints.cache_bytes.most: there is no such key; allowed are min, max, "
                "context, dtype"
            ),
        ),
        (
            OPERATORS | {"slots": [{"at": 0, "operator": ["mha"]}]},
            (
                "space.slots.0.operator: there is no such key; allowed are at, every, offset, "
                "operators; did you mean operators?"
            ),
        ),
        (
            OPERATORS | {"sharing": {"weights": "yes"}},
            "space.sharing.weights: should be a valid boolean, not 'yes'",
        ),
        (
            OPERATORS | {"constraints": {"params": {"max": "lots"}}},
            (
                "space.constraints.params.max: a number of at least 0, such as 400000, 400k or "
                "1.3B, not 'lots'"
            ),
        ),
        (
            OPERATORS | {"constraints": {"params": {"min": "2M", "max": "1M"}}},
            "space.constraints.params: min 2e+06 is above max 1e+06",
        ),
        (
            OPERATORS | {"constraints": {"params": {}}},
            "space.constraints.params: needs min, max or both",
        ),
        (
            OPERATORS | {"constraints": {"cache_bytes": {"max": "64KiB", "dtype": "int8"}}},
            (
                "space.constraints.cache_bytes.dtype: should be 'fp64', 'fp32', 'fp16' or "
                "'bf16', not 'int8'"
            ),
        ),
        (
            OPERATORS | {"constraints": {"flops_per_token": {"max": 1, "context": 0}}},
            (
                "space.constraints.flops_per_token.context: should be greater than or equal to 1, "
                "not 0"
            ),
        ),
    ],
)
def test_mistakes(data: dict[str, Any], sentence: str) -> None:
    with pytest.raises(SpaceError) as caught:
        read_space(data)
    assert str(caught.value) == sentence


def test_an_unknown_operator_is_told_the_nearest_name() -> None:
    for data in ({"operators": {"mamba3": {}}}, {"operators": ["mamba3"]}):
        with pytest.raises(SpaceError, match="no primitive is named 'mamba3'") as caught:
            read_space(data)
        assert "'mamba3'; did you mean mamba or mamba2? There are " in str(caught.value)
    with pytest.raises(
        SpaceError, match=r"^space\.operators\.mha\.hed: attention has no axis 'hed'"
    ):
        read_space({"operators": {"mha": {"hed": 2}}})


def test_constraints_are_measured() -> None:
    genome = parse("mha > swiglu > mamba2 > swiglu > [mha | mamba2] > swiglu")
    total = cost(genome, 1024).total
    constraints = Constraints.model_validate(
        {
            "params": {"max": total.params},
            "active_params": {"min": total.active_params + 5},
            "flops_per_token": {"max": total.flops_per_token / 2, "context": 1024},
            "cache_bytes": {"max": "1KiB", "context": 1024, "dtype": "bf16"},
            "attention_share": {"min": 0.5, "max": 0.6},
        }
    )
    found = exceeded(genome, constraints)
    assert attention_share(genome) == 2 / 3
    assert found == {
        "params.max": 0,
        "active_params.min": 5,
        "flops_per_token.max": total.flops_per_token / 2,
        "cache_bytes.max": total.state_bytes - 1024,
        "attention_share.min": 0.5 - 2 / 3,
        "attention_share.max": 2 / 3 - 0.6,
    }
    assert not satisfied(genome, constraints)
    assert satisfied(genome, Constraints())
    assert exceeded(genome, Constraints()) == {}


def test_constraints_that_leave_nothing_are_found() -> None:
    check_space(read_space(EXAMPLE))
    impossible = read_space(EXAMPLE | {"constraints": {"params": {"max": 10}}})
    with pytest.raises(SpaceError) as caught:
        check_space(impossible)
    assert str(caught.value).startswith(
        "space.constraints.params: none of 200 sampled genomes satisfies params <= 10; the closest "
        "has "
    )
    with pytest.raises(ValueError, match="none of 20 sampled genomes keeps the constraints"):
        sample_valid(impossible, np.random.default_rng(0), tries=20)
    share = read_space(EXAMPLE | {"constraints": {"attention_share": {"min": 0.9}}})
    with pytest.raises(SpaceError, match=r"attention_share >= 0\.9; the closest has 0\.6667$"):
        check_space(share)


def test_rules_shape_what_is_drawn() -> None:
    space = read_space(
        {
            "depth": [3, 5],
            "operators": ["mha", "mamba2", "swiglu"],
            "slots": [
                {"at": [0, -1], "operators": ["mamba2"]},
                {"every": 3, "offset": 1, "operators": {"mqa": {"heads": [2, 4]}}},
            ],
        }
    )
    seen: set[Genome] = set()
    for seed in range(80):
        genome = sample_valid(space, np.random.default_rng(seed))
        names = [slot.branches[0].name for slot in genome.slots]
        assert names[0] == names[-1] == "mamba2", show(genome)
        assert names[1] == "mqa"
        seen.add(genome)
    assert {len(genome.slots) for genome in seen} == {3, 4, 5}
