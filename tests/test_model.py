"""The model of a genome: both forms agree, costs are the real ones, sharing shares."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from flop_count import counter as flop_counter

from mendel.genome.build import build
from mendel.genome.check import (
    TOLERANCE,
    Disagreement,
    chooses,
    difference,
    disagreements,
    wide_space,
)
from mendel.genome.cost import cost
from mendel.genome.genome import Genome
from mendel.genome.model import LanguageModel
from mendel.genome.notation import parse
from mendel.genome.sample import sample_valid
from mendel.primitives.base import GeneError

RANDOM_GENOMES = 300


def real_params(model: LanguageModel) -> int:
    return sum(p.numel() for p in model.parameters())


def random_genomes(count: int, seed: int) -> list[Genome]:
    space = wide_space()
    return [sample_valid(space, np.random.default_rng((seed, i))) for i in range(count)]


def test_parallel_and_step_forms_agree_for_random_genomes() -> None:
    assert [d for d in disagreements(RANDOM_GENOMES, seed=1) if d is not None] == []


def test_the_check_sees_a_form_that_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step form that forgets its state must be caught, else the property proves nothing."""
    genome = parse("{width=32} mamba2 > swiglu > mha")
    assert difference(genome, 3) <= TOLERANCE
    forget = LanguageModel.forward

    def forward(self, tokens, state=None):  # type: ignore[no-untyped-def]
        fresh = None if state is None else self.init_state(tokens.shape[0], 64)
        logits, _ = forget(self, tokens, fresh)
        return logits, state

    monkeypatch.setattr(LanguageModel, "forward", forward)
    assert difference(genome, 3) > 100 * TOLERANCE


@pytest.mark.parametrize(
    "notation",
    [
        "{width=32} reformer-lsh",
        "{width=32} routing-attention",
        "{width=32} nsa",
        "{width=32, position=rope} sparsek(window=2, selected=3)",
    ],
)
def test_patterns_that_the_data_decide_agree_and_are_known_to_choose(notation: str) -> None:
    genome = parse(notation)
    assert max(difference(genome, seed) for seed in range(8)) <= TOLERANCE
    assert chooses(genome)
    assert not chooses(parse("{width=32} mla > swiglu"))


def test_a_flip_at_a_tie_is_no_fault_and_a_difference_in_float64_is() -> None:
    assert Disagreement("", 0, 0.3, 1e-14, routed=True).cause == "tie"
    assert Disagreement("", 0, 0.3, 1e-14, routed=False).cause == "fault"
    assert Disagreement("", 0, 0.3, 0.3, routed=True).cause == "fault"


@pytest.mark.parametrize("index", range(30))
def test_costs_are_those_of_the_real_model(index: int) -> None:
    genome = random_genomes(index + 1, seed=2)[index]
    context = 19
    model = build(genome).requires_grad_(False)  # torch's counter hooks gradients
    counted = cost(genome, context, torch.float32)
    assert counted.total.params == real_params(model)
    state = model.init_state(1, context)
    assert counted.total.state_bytes == state.bytes()
    # How many tokens enter a slot with a share of them, the data decide: see test_routing.py.
    genome = replace(genome, slots=tuple(replace(slot, tokens=1.0) for slot in genome.slots))
    counted = cost(genome, context, torch.float32)
    model = build(genome).requires_grad_(False)
    state = model.init_state(1, context)
    with torch.no_grad(), flop_counter() as counter:
        for _ in range(context):
            _, state = model(torch.zeros(1, 1, dtype=torch.int64), state)
    assert counter.get_total_flops() == pytest.approx(
        counted.total.flops_per_token * context, rel=1e-12
    )


def test_an_alphabet_of_the_proxy_replaces_the_genomes() -> None:
    genome = parse("{width=32, tied=false} mha > swiglu")
    model = build(genome, vocab=17)
    assert model(torch.zeros(1, 3, dtype=torch.int64))[0].shape == (1, 3, 17)
    assert cost(genome, vocab=17).total.params == real_params(model)


def test_shared_weights_are_one_module() -> None:
    shared = build(parse("{width=32} [mha > swiglu(weights=@a)]*3"))
    apart = build(parse("{width=32} [mha > swiglu]*3"))
    one = sum(p.numel() for p in shared.operators[shared.plan[1][0]].parameters())
    assert real_params(apart) - real_params(shared) == 2 * one
    assert shared.plan[1] == shared.plan[3] == shared.plan[5]


def test_borrowed_features_cost_no_cache_and_no_projection() -> None:
    shared = parse("{width=32} mha(features=@k) > swiglu > mha(features=@k)")
    apart = parse("{width=32} mha > swiglu > mha")
    a, b = cost(shared, 100).total, cost(apart, 100).total
    assert 2 * a.state_bytes == b.state_bytes
    assert b.params - a.params == 2 * 32 * 32
    assert difference(shared, 1) <= TOLERANCE


def test_a_borrower_reads_the_lenders_keys() -> None:
    """A change of the lender's key projection reaches the borrower's output, and only so."""
    genome = parse("{width=32} mha(features=@k) > mha(features=@k)")
    torch.manual_seed(0)
    model = build(genome)
    x = torch.randint(256, (1, 9))
    model(x)[0].sum().backward()
    names = [n for n, p in model.named_parameters() if p.grad is not None]
    assert len(names) == len(list(model.named_parameters()))


@pytest.mark.parametrize("placement", ["pre", "post", "sandwich"])
def test_placement_has_its_norms(placement: str) -> None:
    model = build(parse(f"{{width=32, placement={placement}}} mha > swiglu"))
    norms = sum("blocks" in n or "final_norm" in n for n, _ in model.named_parameters())
    assert norms == {"pre": 3, "post": 2, "sandwich": 5}[placement]


def test_parallel_branches_join() -> None:
    x = torch.randint(256, (2, 7))
    torch.manual_seed(0)
    mean = build(parse("{width=32} [mha | mamba2]"))
    torch.manual_seed(0)
    total = build(parse("{width=32} [mha | mamba2](join=sum)"))
    hidden = {}
    for name, model in (("mean", mean), ("sum", total)):
        model.blocks[0].residual = lambda x, y, *_, name=name: hidden.setdefault(name, y)  # type: ignore[assignment]
        model(x)
    torch.testing.assert_close(hidden["sum"], 2 * hidden["mean"])


def test_an_invalid_genome_is_refused_with_a_sentence() -> None:
    with pytest.raises(GeneError, match="kv_heads"):
        build(parse("{width=32} gqa(heads=4, kv_heads=3)"))


def test_a_state_continues_a_state() -> None:
    """Prefill, prefill, decode: three calls of different length give one sequence's logits."""
    model = build(parse("{width=32} [mamba2 | swa(window=4)] > moe > gated-deltanet > swiglu"))
    x = torch.randint(256, (3, 21))
    with torch.no_grad():
        whole = model(x)[0]
        state = model.init_state(3, 21)
        parts = []
        for piece in x.split([11, 9, 1], 1):
            logits, state = model(piece, state)
            parts.append(logits)
    assert state.length == 21
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=1e-5)
