"""The reversible residual form: formula, gradients, memory, and transformers' Reformer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from transformers import ReformerConfig
from transformers.models.reformer import modeling_reformer as reformer

from mendel.genome import model as model_module
from mendel.genome.build import build
from mendel.genome.check import TOLERANCE, difference
from mendel.genome.model import LanguageModel
from mendel.genome.notation import parse
from mendel.genome.reversible import plain_streams, reversible_streams

TOKENS = 21

GENOMES = {
    "attention and mlp": "mha > swiglu > gqa > geglu",
    "an odd number": "mha > swiglu > mamba2",
    "one slot": "mha",
    "recurrences": "mamba2 > swiglu > gated-deltanet > relu2 > lstm",
    "shared weights": "[mha(weights=@a) > swiglu(weights=@m)]*3 > mamba2",
    "weights shared by both streams": "mha(weights=@a) > mha(weights=@a) > mamba2",
    "borrowed keys and values": (
        "mha(features=@k) > swiglu > mha(features=@k) > swiglu > mha(features=@k)"
    ),
    "shared weights and borrowed keys": (
        "mha(features=@k) > swiglu(weights=@m) > [mha(features=@k, weights=@b) | mamba2] > "
        "swiglu(weights=@m) > mha(features=@k, weights=@b)"
    ),
    "two groups": "[mha(features=@a) | mqa(features=@b)] > [mqa(features=@b) | mha(features=@a)]",
    "parallel": "[mha | mamba2](join=norm) > [mqa | gla | mha](join=sum) > swiglu",
    "experts": "mha > moe > mha > moe(shared=1, balance=none)",
    "experts with noise and a capacity": (
        "gshard(experts=4, expansion=1) > noisy-top-k(experts=4, top_k=2) > mha > "
        "switch(experts=4, expansion=1)"
    ),
    "logits of routers and token ids handed on": (
        "[moe++(experts=4) | hash-layer(experts=4)] > hash-layer(experts=4) > mha > "
        "moe++(experts=4)"
    ),
    "scores handed on": "realformer > swiglu > realformer > swiglu > [realformer | mamba2]",
    "routed heads": "moh > swiglu > moh(weights=@r) > moh(weights=@r)",
    "routed tokens": (
        "[mha(weights=@a)](tokens=0.5) > [mqa | mamba2](join=top1) > [moe](tokens=0.3) > "
        "[mha(weights=@a) | gla](join=gate, tokens=0.7)"
    ),
}
"""Everything that one slot can have of another."""


def made(notation: str, header: str = "") -> LanguageModel:
    torch.manual_seed(0)
    return build(parse(f"{{width=32, residual=reversible{header}}} {notation}"), 40)


def tokens(batch: int = 2, length: int = TOKENS) -> Tensor:
    return torch.randint(40, (batch, length), generator=torch.Generator().manual_seed(1))


def loss_of(model: LanguageModel) -> Tensor:
    """A loss with different weights for all logits, and what operators add."""
    logits = model(tokens())[0]
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
    loss = (logits * weight.to(logits)).sum()
    extra = model.auxiliary_loss()
    return loss if extra is None else loss + 100 * extra


def gradients(model: LanguageModel) -> dict[str, Tensor | None]:
    model.zero_grad()
    loss_of(model).backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.fixture
def ordinary(monkeypatch: pytest.MonkeyPatch) -> Callable[[LanguageModel], LanguageModel]:
    """From a model to itself with streams in autograd's ordinary form, from then on."""

    def convert(model: LanguageModel) -> LanguageModel:
        monkeypatch.setattr(
            model_module,
            "reversible_streams",
            lambda step, parts, x: plain_streams(step, len(parts), x),
        )
        return model

    return convert


@pytest.mark.parametrize("header", ["", ", placement=sandwich", ", norm=none", ", norm=dyt"])
@pytest.mark.parametrize("slots", ["mha > swiglu > gqa > geglu", "mamba2 > swiglu > mha"])
def test_the_model_is_the_papers_formula(slots: str, header: str) -> None:
    """y1 = x1 + F(x2), y2 = x2 + G(y1) from x1 = x2, pair by pair, in float64."""
    model = made(slots, header).double()
    x1 = x2 = model.entry(model.embedding.weight[tokens()])
    functions = [
        lambda x, f=operator, b=block: b.after(f(b.before(x))[0])
        for operator, block in zip(model.operators, model.blocks, strict=True)
    ]
    for k in range(0, len(functions), 2):
        x1 = x1 + functions[k](x2)
        if k + 1 < len(functions):
            x2 = x2 + functions[k + 1](x1)
    expected = model.final_norm((x1 + x2) / 2) @ model.embedding.weight.T
    torch.testing.assert_close(model(tokens())[0], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("slots", GENOMES.values(), ids=GENOMES)
def test_gradients_are_those_of_the_ordinary_form(
    slots: str, ordinary: Callable[[LanguageModel], LanguageModel]
) -> None:
    """In float64: what differs is the rounding of recomputed inputs, a few times 2^-52."""
    model = made(slots).double().train()
    got = gradients(model)
    expected = gradients(ordinary(model))
    for name, reference in expected.items():
        assert (got[name] is None) == (reference is None), name
        if reference is not None:
            scale = reference.abs().max()
            assert scale > 0, name
            assert (got[name] - reference).abs().max() <= 1e-10 * scale, name


def test_one_gradient_can_be_asked_for_alone() -> None:
    """Through torch.autograd.grad, with other weights frozen, and nothing is written to .grad."""
    model = made("mha > swiglu > mha").double()
    expected = gradients(model)["operators.1.exit.weight"]
    model.zero_grad()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name == "operators.1.exit.weight")
    (got,) = torch.autograd.grad(loss_of(model), [model.get_parameter("operators.1.exit.weight")])
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=0)
    assert all(parameter.grad is None for parameter in model.parameters())


def saved_bytes(model: LanguageModel) -> int:
    """The bytes that autograd keeps for the backward pass: every storage once, weights aside."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(tokens(4, 64))[0].square().sum()
        found = sum(kept.values())
    loss.backward()
    return found


@pytest.mark.parametrize("pair", ["mha > swiglu", "mamba2 > geglu", "gated-deltanet > moe"])
def test_memory_does_not_grow_with_the_depth(pair: str) -> None:
    """Bytes of saved tensors at 4, 8 and 16 slots: plain grows with them, reversible not at all."""
    reversible, plain = (
        [
            saved_bytes(build(parse(f"{{width=32, residual={residual}}} [{pair}]*{n}"), 40).train())
            for n in (2, 4, 8)
        ]
        for residual in ("reversible", "plain")
    )
    assert reversible[0] == reversible[1] == reversible[2]
    per_slot = (plain[1] - plain[0]) / 4
    assert per_slot > 0
    assert plain[2] - plain[1] == pytest.approx(8 * per_slot, rel=0.1)
    assert reversible[2] < plain[2] / 10


def test_lent_keys_and_values_are_all_that_grows() -> None:
    """A lender's keys and values are kept, 2 * B * T * D floats, once for all of its borrowers."""
    borrower = "mha(features=@k) > swiglu"
    alone = saved_bytes(made("mha > swiglu"))
    lent = 2 * 4 * 64 * 32 * 4
    for borrowers in (1, 5):
        found = saved_bytes(made(f"{borrower} > [{borrower}]*{borrowers}"))
        assert lent <= found - alone <= 1.1 * lent


@pytest.mark.parametrize("slots", [s for s in GENOMES.values() if s != "mha"], ids=lambda s: s[:30])
def test_steps_agree_with_the_training_form(slots: str) -> None:
    genome = parse(f"{{width=32, residual=reversible}} {slots}")
    assert difference(genome, 5, torch.float64) <= 1e-10
    assert difference(genome, 5) <= TOLERANCE


def test_a_second_call_leaves_buffers_as_the_first_did(
    ordinary: Callable[[LanguageModel], LanguageModel],
) -> None:
    """The experts' counts of tokens are those of one pass, though every slot runs twice."""
    model = made("mha > moe > mha > moe").train()
    gradients(model)
    other = made("mha > moe > mha > moe").train()
    gradients(ordinary(other))
    loads = [operator.ledger.counts for operator in model.operators if hasattr(operator, "ledger")]
    assert [int(load.sum()) for load in loads] == [2 * 2 * TOKENS] * 2
    model.after_step()
    assert all(int(load.sum()) == 0 for load in loads)


def test_autocast_is_that_of_the_forward_pass(
    ordinary: Callable[[LanguageModel], LanguageModel],
) -> None:
    """The backward pass runs outside of autocast's block and must enter it again."""

    def run(model: LanguageModel) -> dict[str, Tensor | None]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(tokens())[0]
        model.zero_grad()
        logits.float().square().sum().backward()
        return {name: p.grad for name, p in model.named_parameters()}

    model = made("mha > swiglu > mamba2 > swiglu")
    got = run(model)
    for name, reference in run(ordinary(model)).items():
        # Both round products to 8 bits; recomputed inputs differ by float32's rounding, which can
        # tip such a rounding the other way here and there.
        assert (got[name] - reference).norm() <= 2e-2 * reference.norm(), name


def test_bf16_weights_have_float32_streams() -> None:
    """A bf16 stream would lose what small slots add: the way back could not take it off again."""
    genome = parse("{width=32, residual=reversible} [mha > swiglu]*6")
    torch.manual_seed(0)
    model = build(genome, 40)
    reference = gradients(model.float())
    got = gradients(copy.deepcopy(model).to(torch.bfloat16))
    for name, grad in got.items():
        assert grad is not None
        assert grad.dtype == torch.bfloat16
        assert (grad.float() - reference[name]).norm() <= 0.1 * reference[name].norm(), name


class Wrapped(nn.Module):
    """One of our slots in the place of Reformer's attention or feed-forward layer."""

    def __init__(self, model: LanguageModel, index: int, attention: bool) -> None:
        super().__init__()
        self.operator, self.block = model.operators[index], model.blocks[index]
        self.attention = attention

    def forward(self, hidden_states: Tensor, **_: object) -> Tensor | SimpleNamespace:
        y = self.block.after(self.operator(self.block.before(hidden_states))[0])
        if not self.attention:
            return y
        return SimpleNamespace(hidden_states=y, attention_probs=None, buckets=None)


def test_streams_and_gradients_are_reformers() -> None:
    """transformers' reversible layers around the same slots: both streams, all gradients."""
    model = made("mha > swiglu > mamba2 > geglu").double().train()
    settings = ReformerConfig(hidden_size=32, num_attention_heads=4, attn_layers=["local"] * 2)
    layers = nn.ModuleList(reformer.ReformerLayer(settings, i) for i in range(2)).train()
    for k, layer in enumerate(layers):
        layer.attention = Wrapped(model, 2 * k, True)
        layer.feed_forward = Wrapped(model, 2 * k + 1, False)
    x = torch.randn(2, TOKENS, 32, dtype=torch.float64)
    weight = torch.randn(2, TOKENS, 64, dtype=torch.float64)

    def ours(start: Tensor) -> Tensor:
        def step(i: int, stream: Tensor, lent: dict[str, object]) -> tuple[Tensor, None]:
            block = model.blocks[i]
            return block.added(model.operators[i](block.read(stream))[0]), None

        parts = [[b, o] for b, o in zip(model.blocks, model.operators, strict=True)]
        one, two, _ = reversible_streams(step, parts, start)
        return torch.cat((one, two), -1)

    def theirs(start: Tensor) -> Tensor:
        pair = torch.cat((start, start), -1)
        rest = (None, 1, [], [], None, False, None, False, False)
        return reformer._ReversibleFunction.apply(pair, layers, *rest)

    results = []
    for call in (ours, theirs):
        model.zero_grad()
        start = x.clone().requires_grad_()
        with torch.random.fork_rng():
            y = call(start)
            (y * weight).sum().backward()
        parameters = [*model.operators.named_parameters(), *model.blocks.named_parameters()]
        results.append((y.detach(), start.grad, [p.grad.clone() for _, p in parameters]))
    torch.testing.assert_close(results[0], results[1], rtol=1e-10, atol=1e-12)


def test_evaluation_keeps_nothing_and_agrees() -> None:
    model = made("mha > swiglu > mamba2")
    with torch.no_grad():
        quiet = model(tokens())[0]
    assert not quiet.requires_grad
    assert torch.equal(quiet, model(tokens())[0])


def test_other_residuals_do_not_recompute() -> None:
    genome = parse("{width=32} mha > swiglu")
    assert replace(genome, residual="reversible") != genome
    assert saved_bytes(build(genome, 40)) > saved_bytes(made("mha > swiglu"))
