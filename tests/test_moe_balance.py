"""What evens the load of experts, against loops of the papers: losses, and biases that move."""

from __future__ import annotations

import pytest
import torch
from moe_parts import error, inputs, made, weight
from torch.nn import functional as F

from mendel.primitives.base import Gene
from mendel.primitives.channel.balance import (
    balance_loss,
    group_losses,
    losses,
    squared_variation,
)
from mendel.primitives.channel.router import Routing


def test_the_losses_are_their_formulas() -> None:
    module, x = made("gshard", experts=5, expansion=1.0, noise="none", capacity=0.0), inputs()
    routing = module.router.route(x)
    assert routing.scores is not None
    scores, experts = routing.scores.view(3, 29, 5), routing.experts.view(3, 29, 2)
    picked = F.one_hot(experts, 5).double()
    expected = {
        "batch": 5 * (picked.mean((0, 1, 2)) * scores.mean((0, 1))).sum(),
        "sequence": 5 * (picked.mean((1, 2)) * scores.mean(1)).sum(-1).mean(),
        "first": 5 * (picked[:, :, 0].mean(1) * scores.mean(1)).sum(-1).mean(),
        "importance": squared_variation(
            (picked * routing.weights.view(3, 29, 2, 1)).sum((0, 1, 2))
        ),
    }
    for form, value in expected.items():
        assert error(balance_loss(form, module.router, routing, 3), value) < 1e-9, form
    x = torch.tensor([1.0, 2.0, 3.0])
    assert squared_variation(x).item() == pytest.approx(2 / 3 / 4)


def test_the_losses_between_groups_are_deepseek_v2s() -> None:
    """arXiv 2405.04434, eq. 23 to 31, as loops over sequences, devices, experts and tokens."""
    module, x = made("deepseek-v2-moe", experts=12, top_k=4, groups=4, top_groups=2), inputs()
    routing = module.router.route(x)
    assert routing.scores is not None
    scores, experts = routing.scores.view(3, 29, 12).tolist(), routing.experts.view(3, 29, 4)
    device = sent = 0.0
    for s, chosen in zip(scores, experts.tolist(), strict=True):
        for group in (range(3), range(3, 6), range(6, 9), range(9, 12)):
            load = sum(12 / (4 * 29) * sum(e in c for c in chosen) for e in group) / 3
            score = sum(sum(token[e] for token in s) / 29 for e in group)
            tokens = sum(any(e in c for e in group) for c in chosen)
            device += load * score / 3
            sent += 4 / (2 * 29) * tokens * score / 3
    got = group_losses(routing, 3, 4, 2)
    assert [loss.item() for loss in got] == pytest.approx([device, sent], rel=1e-12)
    config = module.config.balance
    total = losses(config, module.router, routing, 3)
    assert total is not None
    expert = balance_loss("sequence", module.router, routing, 3).item()
    assert total.item() == pytest.approx(0.003 * expert + 0.05 * device + 0.02 * sent, rel=1e-12)


def test_an_even_load_has_losses_of_1_between_groups() -> None:
    """Two tokens, of four experts in two groups each, one in every group."""
    scores = torch.full((4, 4), 0.25, dtype=torch.float64)
    experts = torch.tensor([[0, 2], [1, 3], [0, 3], [1, 2]])
    routing = Routing(experts, scores.gather(1, experts), scores=scores)
    assert [loss.item() for loss in group_losses(routing, 2, 2, 2)] == [1.0, 1.0]


def test_noisy_top_k_has_the_papers_load() -> None:
    """P(x, i), the chance that i is chosen when its own noise is drawn again, by drawing it."""
    module, x = made("noisy-top-k", experts=5, top_k=2), inputs(2, 1)
    routing = module.router.route(x, live=True)
    assert routing.clean is not None
    assert routing.logits is not None
    clean, deviation = routing.clean
    drawn = torch.randn(100_000, generator=torch.Generator().manual_seed(0)).double()
    counts = torch.zeros(5, dtype=torch.float64)
    for n in range(2):
        for i in range(5):
            others = torch.cat((routing.logits[n, :i], routing.logits[n, i + 1 :]))
            rival = others.topk(2).values[1]
            counts[i] += (clean[n, i] + drawn * deviation[n, i] > rival).double().mean()
    weights = torch.zeros(2, 5, dtype=torch.float64).scatter(1, routing.experts, routing.weights)
    expected = squared_variation(weights.sum(0)) + squared_variation(counts)
    got = balance_loss("importance", module.router, routing, 1)
    assert got.item() == pytest.approx(expected.item(), rel=2e-2)
    got.backward()
    assert module.router.spread is not None
    assert module.router.spread.grad is not None
    assert module.router.spread.grad.abs().max() > 0


@pytest.mark.parametrize("aux", ["batch", "sequence", "first", "importance", "device", "sent"])
def test_every_balancing_loss_evens_the_load(aux: str) -> None:
    # Shazeer's needs the noise: without it an expert that nobody takes has no gradient.
    noise = "noisy-top-k" if aux == "importance" else "none"
    genes: dict[str, Gene] = {"experts": 4, "top_k": 1, "balance": "none", "noise": noise}
    # With an expert in each, groups are even where experts are.
    between = aux in ("device", "sent")
    genes |= {f"{aux}_weight": 1.0, "groups": 4} if between else {"aux": aux, "aux_weight": 1.0}
    module = made(**genes, renormalise=False)
    with torch.no_grad():
        weight(module).mul_(0.1)
        weight(module)[0] += 0.1
    x = inputs(64) + 0.5
    optimizer = torch.optim.SGD([weight(module)], lr=0.02)
    loads = []
    for _ in range(40):
        module(x)
        loss = module.auxiliary_loss()
        assert loss is not None
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loads.append(max(module.statistics()["load"]))
        module.balance()
    assert loads[0] > 0.7
    assert sum(loads[-10:]) / 10 < 0.4


def test_a_loss_beside_the_bias() -> None:
    module = made("deepseek-v3-moe", experts=16)
    module(inputs())
    assert module.auxiliary_loss() is not None
    module.balance()
    assert module.router.steps.abs().sum() > 0


@pytest.mark.parametrize("computed", [0.0, 2.5])
def test_the_proportional_bias_is_longcats(computed: float) -> None:
    """arXiv 2509.01322, as a loop; special experts' biases stay."""
    module = made("longcat-moe", experts=5, copy=4, top_k=3, bias_rate=0.3, computed=computed)
    router, expected = module.router, [0.0] * 9
    for seed in range(4):
        module(torch.randn(2, 31, 32, generator=torch.Generator().manual_seed(seed)).double())
        counts = module.ledger.counts.tolist()
        for e in range(5):
            share = (computed or 3 * 5 / 9) / 3 / 5
            expected[e] += 0.3 * (share - counts[e] / (3 * 62))
        module.balance()
    assert (router.steps.double() * router.config.unit).tolist() == pytest.approx(
        expected, abs=1e-11
    )
    before = router.steps.clone()
    module.balance()
    assert torch.equal(router.steps, before)


@pytest.mark.parametrize("computed", [1.0, 1.5])
def test_the_proportional_bias_reaches_the_wanted_share_of_experts(computed: float) -> None:
    genes: dict[str, Gene] = {"balance": "proportional", "bias_rate": 0.03, "computed": computed}
    module = made(**genes, experts=4, copy=4, top_k=2, renormalise=False)
    with torch.no_grad():
        weight(module)[0] += 0.3
    x, loads = inputs(64) + 0.5, []
    for _ in range(600):
        module(x)
        loads.append(module.statistics()["load"])
        module.balance()
    assert loads[0][0] > 0.4
    # It moves about what it aims at.
    last = torch.tensor(loads[-100:]).mean(0)[:4]
    assert error(last, torch.full_like(last, computed / 8)) < 0.01
