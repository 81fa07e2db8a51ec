"""What attention hands on in a call: RealFormer's scores between slots, routed heads' loss."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mendel.genome import model as model_module
from mendel.genome.build import build
from mendel.genome.check import TOLERANCE, difference
from mendel.genome.cost import cost
from mendel.genome.hash import canonical_hash
from mendel.genome.model import LanguageModel
from mendel.genome.notation import parse
from mendel.genome.rules import violations
from mendel.primitives.attention import moh
from mendel.primitives.attention.layer import Attention
from mendel.primitives.base import Carry, GeneError, Site
from mendel.primitives.catalogue import resolve
from mendel.primitives.norm import RMSNORM_EPS
from mendel.proxies.recipe import TrainConfig
from mendel.proxies.tasks import ProxyConfig, make_task
from mendel.proxies.train import Training

TOKENS = 11
HEADS = 2


def made(text: str, dtype: torch.dtype = torch.float64) -> LanguageModel:
    torch.manual_seed(0)
    return build(parse(text), vocab=19).to(dtype)


def tokens() -> Tensor:
    return torch.randint(19, (2, TOKENS), generator=torch.Generator().manual_seed(1))


def error(a: Tensor, b: Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


def realformer(model: LanguageModel, window: int) -> Tensor:
    """Equations 4 and 5 of arXiv 2012.11747 in a pre-norm model, token by token and head by head:
    scores are q k / sqrt(K) plus those of the layer before, which it passes on with its own."""

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + RMSNORM_EPS).sqrt() * weight

    x = model.embedding.weight[tokens()]
    passed: dict[tuple[int, int, int], Tensor] = {}
    for block, operator in zip(model.blocks, model.operators, strict=True):
        assert isinstance(operator, Attention)
        before = dict(block.named_parameters())
        assert len(before) == 1
        mixed = norm(x, next(iter(before.values()))) @ operator.entry.weight.T
        q, k, v = mixed.unflatten(-1, (3, HEADS, -1)).unbind(2)
        rows = []
        for t in range(TOKENS):
            row = []
            for h in range(HEADS):
                weights, values = [], []
                for s in range(max(0, t - window + 1), t + 1):
                    score = (q[:, t, h] * k[:, s, h]).sum(-1) / q.shape[-1] ** 0.5
                    score = score + passed.get((h, t, s), 0.0)
                    passed[h, t, s] = score
                    weights.append(score.exp())
                    values.append(v[:, s, h])
                total = torch.stack(weights).sum(0)
                terms = [
                    w[:, None] / total[:, None] * u for w, u in zip(weights, values, strict=True)
                ]
                row.append(torch.stack(terms).sum(0))
            rows.append(torch.cat(row, -1))
        x = x + torch.stack(rows, 1) @ operator.exit.weight.T
    return F.linear(norm(x, model.final_norm.weight), model.embedding.weight)  # type: ignore[arg-type]


PATTERNS = {
    "full": ("", TOKENS),
    "masked": (", pattern=sliding, window=7", 7),
    "banded": (", pattern=sliding, window=2", 2),
}


@pytest.mark.parametrize("name", PATTERNS)
def test_scores_are_added_from_slot_to_slot(name: str) -> None:
    """Logits and the gradients of every weight, in float64."""
    genes, window = PATTERNS[name]
    model = made(f"{{width=16, position=none}} [realformer(heads=2{genes})]*3")
    with torch.no_grad():
        for operator in model.operators:
            # Scores of order 1, so that adding them matters.
            operator.get_parameter("entry.weight").mul_(3.0)
    parameters = dict(model.named_parameters())
    expected, logits = realformer(model, window), model(tokens())[0]
    assert error(logits, expected) < 1e-12
    weight = torch.randn_like(expected)
    wanted = torch.autograd.grad((expected * weight).sum(), list(parameters.values()))
    got = torch.autograd.grad((logits * weight).sum(), list(parameters.values()))
    for label, ours, theirs in zip(parameters, got, wanted, strict=True):
        assert error(ours, theirs) < 1e-10, label
    plain = made(f"{{width=16, position=none}} [mha(heads=2{genes})]*3")
    plain.load_state_dict(model.state_dict())
    assert error(plain(tokens())[0], expected) > 1e-3


@pytest.mark.parametrize(
    "text",
    [
        "{width=32} realformer > swiglu > realformer(kv_heads=1) > mamba2 > realformer",
        "{width=32} [realformer(heads=2, pattern=sliding, window=3) > swiglu]*3",
        "{width=32} realformer > [realformer | realformer(gate=sigmoid) | mha] > realformer",
        "{width=32, residual=reversible} [realformer > swiglu]*3",
        "{width=32} realformer(weights=@a) > swiglu > realformer(weights=@a)",
        "{width=32} realformer(features=@a, sink_logits=true) > mha(features=@a) > realformer",
        "{width=32} [realformer(pattern=multi-scale, window=8)]*3",
    ],
)
def test_any_split_hands_on_the_same_without_a_state(text: str) -> None:
    genome = parse(text)
    assert not violations(genome)
    assert max(difference(genome, seed) for seed in range(6)) <= TOLERANCE
    plain = parse(text.replace("realformer", "mha"))
    assert cost(genome, 50).total == cost(plain, 50).total


def test_slots_of_other_heads_or_patterns_begin_anew() -> None:
    """Each kind has a chain of its own; the first of a chain is plain attention."""
    text = "{width=32} NAME(heads=2) > NAME(heads=4) > NAME(heads=4, pattern=sliding, window=4)"
    chains, plain = made(text.replace("NAME", "realformer")), made(text.replace("NAME", "mha"))
    assert error(chains(tokens())[0], plain(tokens())[0]) < 1e-12


def test_a_chain_reaches_over_slots_without_the_gene() -> None:
    model = made("{width=32} realformer(heads=2) > mha(heads=2) > realformer(heads=2)")
    other = made("{width=32} mha(heads=2) > mha(heads=2) > mha(heads=2)")
    assert error(model(tokens())[0], other(tokens())[0]) > 1e-6


def test_the_order_of_parallel_slots_means_nothing() -> None:
    text = "{{width=32}} realformer > [{} | {}] > realformer"
    one, two = "realformer(gate=sigmoid)", "realformer(qk_norm=true)"
    first, second = made(text.format(one, two)), made(text.format(two, one))
    swapped = {
        name.replace("operators.1.", "operators.x.")
        .replace("operators.2.", "operators.1.")
        .replace("operators.x.", "operators.2."): value
        for name, value in first.state_dict().items()
    }
    second.load_state_dict(swapped)
    assert error(second(tokens())[0], first(tokens())[0]) < 1e-12
    hashes = {canonical_hash(parse(text.format(*pair))) for pair in ((one, two), (two, one))}
    assert len(hashes) == 1


def test_recomputed_slots_give_the_gradients_of_kept_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reversible slots pass gradients through the scores that they hand on and the loss."""
    model = made(
        "{width=32, residual=reversible} [realformer(heads=2) > swiglu]*2 > "
        "moh(heads=4, shared_heads=1, active_heads=2) > realformer(heads=2)"
    )

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        logits = model(tokens())[0]
        loss = model.auxiliary_loss()
        assert loss is not None
        (logits.square().sum() + 100 * loss).backward()  # type: ignore[no-untyped-call]
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    recomputed = gradients()

    def kept(step: Any, parts: Any, x: Tensor) -> Any:
        return model_module.plain_streams(step, len(parts), x)

    monkeypatch.setattr(model_module, "reversible_streams", kept)
    expected = gradients()
    assert recomputed.keys() == expected.keys() == dict(model.named_parameters()).keys()
    for name, gradient in expected.items():
        assert error(recomputed[name], gradient) < 1e-9, name


def test_a_layer_by_itself_hands_on_nothing() -> None:
    primitive, genes = resolve("realformer", {})
    module = primitive.configure(Site(32, "rope"), genes).build()
    assert isinstance(module, Attention)
    x = torch.randn(1, 5, 32)
    carry = Carry()
    assert error(module(x, None, carry)[0], module(x)[0]) < 1e-5
    assert [t.shape for t in carry.later] == [(1, 4, 5, 5)]


def test_a_borrower_has_no_scores_of_its_own_cache() -> None:
    primitive, genes = resolve("realformer", {})
    with pytest.raises(GeneError, match="borrows keys and values has none of its own"):
        primitive.configure(Site(32, "rope", borrows=True), genes)


def test_routed_heads_report_and_add_to_the_loss() -> None:
    model = made("{width=32} moh(active_heads=3) > swiglu > moh > mha")
    assert model.auxiliary_loss() is None
    model(tokens())
    loss = model.auxiliary_loss()
    assert loss is not None
    # Balanced choices of k heads give k / n of the routed ones each: 0.01 * k / n per layer.
    assert 0.5 * 0.01 * (3 / 6 + 4 / 6) < float(loss.detach()) < 2 * 0.01 * (3 / 6 + 4 / 6)
    reports = model.statistics()
    assert reports.keys() == {"slot0.0", "slot2.0"}
    assert [len(report["head_load"]) for report in reports.values()] == [6, 6]
    assert sum(reports["slot0.0"]["head_load"]) == pytest.approx(3)
    model.eval()
    model(tokens())
    assert model.auxiliary_loss() is None


def test_training_balances_the_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a heavy balancing loss the most chosen head loses tokens."""
    flat = {"task": "in-context-recall", "length": 16, "vocab": 8, "train_examples": 64}
    genome = parse("{width=16} moh(heads=4, shared_heads=0, active_heads=1) > swiglu")

    def most_chosen(weight: float) -> float:
        monkeypatch.setattr(moh, "BALANCE_WEIGHT", weight)
        task = make_task(ProxyConfig.model_validate({**flat, "steps": 1, "test_examples": 8}), 0)
        run = Training(genome, task, TrainConfig(lr=0.01), 30, 8, 0)
        run.advance(30)
        load: list[float] = run.model.statistics()["slot0.0"]["head_load"]
        return max(load)

    assert most_chosen(10.0) < most_chosen(0.0)
