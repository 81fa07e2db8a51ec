"""The router against loops of the papers: capacity, noise, expert choice, hashes, MoE++."""

from __future__ import annotations

import math

import pytest
import torch
from moe_parts import WIDTH, error, inputs, made, weight
from torch import Tensor
from torch.nn import functional as F

from mendel.genome.build import build
from mendel.genome.notation import parse
from mendel.primitives.base import BidirectionalError, Carry, Gene, GeneError, State
from mendel.primitives.channel.drawn import normal, uniform
from mendel.primitives.channel.moe import Moe
from mendel.primitives.channel.router import JITTER, Router, Routing, within


def expert(module: Moe, e: int, row: Tensor) -> Tensor:
    """One expert of one token; the experts here are plain ReLU or gated SiLU."""
    hidden = module.experts.entry[e] @ row
    if module.config.experts.gated:
        gate, up = hidden.chunk(2)
        hidden = F.silu(gate) * up
    else:
        hidden = F.relu(hidden)
    return module.experts.exit[e] @ hidden


@torch.no_grad()
def test_gshard_is_its_algorithm() -> None:
    """Algorithm 1 of the paper, group by group, with the chance that the router draws."""
    module = made("gshard", experts=6, expansion=1.0)
    x = inputs()
    tokens = x.shape[1]
    room = math.ceil(2 * tokens / 6)
    drawn = uniform((3 * tokens, 2), module.router.seed, module.router.step).view(3, tokens, 2)
    y, dropped, kept_back = torch.zeros_like(x), 0, 0
    for group in range(3):
        gates = (x[group] @ weight(module).T).softmax(-1)
        g, e = gates.topk(2, -1)
        g = g / g.sum(-1, keepdim=True)
        held = [0] * 6
        for choice in range(2):
            for s in range(tokens):
                which = int(e[s, choice])
                if choice == 1 and 2 * g[s, 1] <= drawn[group, s, 1]:
                    kept_back += 1
                    continue
                if held[which] >= room:
                    dropped += 1
                    continue
                held[which] += 1
                y[group, s] += g[s, choice] * expert(module, which, x[group, s])
    assert error(module(x)[0], y) < 1e-12
    assert dropped > 0
    assert kept_back > 0
    assert module.statistics()["dropped"] == (dropped + kept_back) / (2 * 3 * tokens)


def test_first_choices_go_before_second_ones() -> None:
    # Token 0 wants expert 0 second; tokens 1 and 2 want it first.
    experts = torch.tensor([[[1, 0], [0, 1], [0, 2]]])
    kept = within(experts, torch.tensor([2, 1, 1]))
    assert kept.tolist() == [[[True, False], [True, False], [True, True]]]
    wanted = torch.tensor([[True, True], [False, True], [True, True]])
    kept = within(experts, torch.tensor([2, 2, 0]), wanted)
    assert kept.tolist() == [[[True, True], [False, True], [True, False]]]


@torch.no_grad()
def test_training_drops_and_nothing_else_does() -> None:
    module, x = made("switch", noise="none", capacity=0.5), inputs()
    whole = module.eval()(x)[0]
    silent = (module.train()(x)[0] == 0).all(-1)
    assert 0.2 < silent.double().mean() < 0.8
    assert module.statistics()["dropped"] == silent.double().mean().item()
    steps, state = module(x, State())
    assert torch.equal(steps, whole)
    assert state is not None
    assert state.length == x.shape[1]


@pytest.mark.parametrize("capacity", [0.001, 1.0])
def test_dropped_pairs_have_no_gradient(capacity: float) -> None:
    """One token per expert, or an even share: a dropped token's gradient is exactly 0."""
    module = made("switch", noise="none", capacity=capacity, aux="none")
    x = inputs().requires_grad_()
    y = module(x)[0]
    y.square().sum().backward()
    assert x.grad is not None
    silent = (y == 0).all(-1)
    assert silent.any()
    assert x.grad[silent].abs().max() == 0
    assert (x.grad[~silent].abs().amax(-1) > 0).all()


def test_noise_is_uniform_normal_and_the_same_every_time() -> None:
    seed, step = torch.tensor(7), torch.tensor(3)
    u, z = uniform((200_000,), seed, step), normal((200_000,), seed, step)
    assert torch.equal(u, uniform((400, 500), seed, step).flatten())
    assert 0 < u.min() < 1e-4
    assert 1 - 1e-4 < u.max() < 1
    # Bounds of four standard deviations of the mean and of the second moments.
    assert abs(u.mean() - 0.5) < 4 * (1 / 12 / 200_000) ** 0.5
    assert abs(z.mean()) < 4 / 200_000**0.5
    assert abs(z.square().mean() - 1) < 4 * (2 / 200_000) ** 0.5
    others = [uniform((200_000,), seed, step + 1), uniform((200_000,), seed + 1, step)]
    others += [uniform((200_000,), seed, step, 1), u.roll(1)]
    for other in others:
        assert abs(torch.corrcoef(torch.stack((u, other)))[0, 1]) < 4 / 200_000**0.5


@torch.no_grad()
def test_noisy_top_k_is_its_formula() -> None:
    module, x = made("noisy-top-k", experts=6, top_k=2, expansion=1.0), inputs()
    assert module.router.spread is not None
    rows = x.flatten(0, 1)
    drawn = normal((3, 29, 6), module.router.seed, module.router.step).double().flatten(0, 1)
    noisy = rows @ weight(module).T + drawn * F.softplus(rows @ module.router.spread.T)
    y = torch.zeros_like(rows)
    for n, row in enumerate(rows):
        best = noisy[n].topk(2)
        for g, e in zip(best.values.softmax(0), best.indices.tolist(), strict=True):
            y[n] += g * expert(module, e, row)
    first = module(x)[0].flatten(0, 1)
    assert error(first, y) < 1e-12
    assert torch.equal(module(x)[0].flatten(0, 1), first), "the step draws once"
    module.balance()
    assert error(module(x)[0].flatten(0, 1), y) > 1e-3, "the next step draws anew"
    module.router.spread.fill_(1e3)
    module.eval()
    clean = (rows @ weight(module).T).topk(2, -1).indices
    assert torch.equal(module.router.route(x).experts, clean)


@torch.no_grad()
def test_jitter_turns_the_routers_input_alone() -> None:
    module, x = made("switch", capacity=0.0), inputs()
    routing = module.router.route(x, live=True)
    drawn = uniform((3, 29, WIDTH), module.router.seed, module.router.step).double()
    read = x * (1 + JITTER * (2 * drawn - 1))
    assert routing.logits is not None
    assert error(routing.logits, (read @ weight(module).T).flatten(0, 1)) < 1e-12
    assert (read / x - 1).abs().max() <= JITTER


@torch.no_grad()
def test_expert_choice_is_its_loop() -> None:
    module = made("expert-choice", experts=4, capacity=2.0, activation="relu", expansion=1.0)
    for tokens in (1, 2, 29):
        x = inputs(tokens)
        y, taken, taking = torch.zeros_like(x), set(), math.ceil(2.0 * tokens / 4)
        for b in range(3):
            scores = (x[b] @ weight(module).T).softmax(-1)
            for e in range(4):
                for t in scores[:, e].topk(min(taking, tokens)).indices.tolist():
                    y[b, t] += scores[t, e] * expert(module, e, x[b, t])
                    taken.add((b, t))
        assert error(module(x)[0], y) < 1e-12
        assert module.statistics()["dropped"] == 1 - len(taken) / (3 * tokens)
        assert module.statistics()["load"] == [0.25] * 4
        module.balance()


def test_expert_choice_has_no_state() -> None:
    module = made("expert-choice")
    with pytest.raises(BidirectionalError):
        module.init_state(1, 8, torch.float64)
    with pytest.raises(BidirectionalError):
        module(inputs(), State())
    with pytest.raises(GeneError, match="choice=expert reads later tokens"):
        made(choice="expert", capacity=1.0)
    with pytest.raises(GeneError, match="choice=token reads no later tokens"):
        made(causal=False)
    with pytest.raises(GeneError, match="choice=expert needs a capacity"):
        made(choice="expert", causal=False)


@torch.no_grad()
def test_a_hash_depends_on_the_tokens_id_alone() -> None:
    module, x = made("hash-layer", experts=8, top_k=3), inputs()
    ids = torch.randint(5, (3, 29), generator=torch.Generator().manual_seed(3))
    routing = module.router.hashed(ids, torch.float64)
    experts = routing.experts.view(3, 29, 3)
    for token in range(5):
        assert (experts[ids == token] == experts[ids == token][0]).all()
    assert all(len(set(row)) == 3 for row in routing.experts.tolist())
    y = torch.zeros_like(x)
    for b, t in torch.cartesian_prod(torch.arange(3), torch.arange(29)).tolist():
        for e in experts[b, t].tolist():
            y[b, t] += expert(module, e, x[b, t]) / 3
    assert error(module(x, None, Carry([ids]))[0], y) < 1e-12
    # Without ids the position is the id.
    positions = torch.arange(29).expand(3, 29)
    assert torch.equal(module(x)[0], module(x, None, Carry([positions]))[0])


@torch.no_grad()
def test_hashes_spread_ids_evenly() -> None:
    module = made("hash-layer", experts=8, top_k=2)
    experts = module.router.hashed(torch.arange(20_000)[None], torch.float64).experts
    # 2500 per expert in either place: four standard deviations are 187.
    for place in range(2):
        counts = experts[:, place].bincount(minlength=8)
        assert (counts - 2500).abs().max() < 187
    other = made("hash-layer", experts=8, top_k=2)
    other.router.seed += 1
    again = other.router.hashed(torch.arange(20_000)[None], torch.float64).experts
    assert abs((again[:, 0] == experts[:, 0]).double().mean() - 1 / 8) < 0.01


@pytest.mark.parametrize("residual", ["plain", "reversible"])
@torch.no_grad()
def test_a_model_gives_its_token_ids_to_hashes(
    residual: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a call and in pieces, side by side in one slot too."""
    torch.manual_seed(0)
    slots = "[hash-layer | hash-layer(experts=8)] > mha > hash-layer(experts=4)"
    model = build(parse(f"{{width=32, residual={residual}}} {slots}"), 17).double().eval()
    tokens = torch.randint(17, (2, 12), generator=torch.Generator().manual_seed(1))
    seen: list[Tensor] = []
    hashed = Router.hashed

    def watched(router: Router, ids: Tensor, dtype: torch.dtype) -> Routing:
        seen.append(ids)
        return hashed(router, ids, dtype)

    monkeypatch.setattr(Router, "hashed", watched)
    whole = model(tokens)[0]
    assert len(seen) == 3
    assert all(torch.equal(ids, tokens) for ids in seen)
    state = model.init_state(2, 12)
    pieces = []
    for part in tokens.split(5, 1):
        logits, state = model(part, state)
        pieces.append(logits)
    assert error(torch.cat(pieces, 1), whole) < 1e-12


@torch.no_grad()
def test_moe_plus_plus_is_its_formula() -> None:
    module, x = made("moe++", experts=4, expansion=1.0), inputs()
    assert module.special is not None
    assert module.special.mix is not None
    assert module.special.vectors is not None
    assert module.router.chain is not None
    earlier = torch.randn(3, 29, 8, generator=torch.Generator().manual_seed(4)).double()
    carry = Carry([earlier])
    got = module.eval()(x, None, carry)[0]
    logits = x @ weight(module).T + earlier @ module.router.chain.T
    assert error(carry.later[0], logits) < 1e-12
    y, kinds = torch.zeros_like(x), set()
    for b, t in torch.cartesian_prod(torch.arange(3), torch.arange(29)).tolist():
        row, scores = x[b, t], logits[b, t].softmax(-1)
        for e in scores.topk(2).indices.tolist():
            kinds.add(e)
            if e < 4:
                out = expert(module, e, row)
            elif e == 4:
                out = torch.zeros_like(row)
            elif e == 5:
                out = row
            else:
                mix = (module.special.mix[2 * (e - 6) : 2 * (e - 6) + 2] @ row).softmax(0)
                out = mix[0] * row + mix[1] * module.special.vectors[e - 6]
            y[b, t] += scores[e] * out
    assert kinds == set(range(8))
    assert error(got, y) < 1e-12
    own = module(x)[0]
    first = x @ weight(module).T
    assert torch.equal(own, module(x, None, Carry([first]))[0]), "it begins the chain itself"
    room, special = module.config.router.room(29)
    assert (room, special) == (math.ceil(0.75 * 1.1 * 58 / 7), math.ceil(1.1 * 58 / 7))
    module.train()(x, None, Carry([earlier]))
    assert module.statistics()["dropped"] > 0


def test_routers_hand_their_logits_on_in_a_model() -> None:
    torch.manual_seed(0)
    one = build(parse("{width=32} moe++ > mha > moe++ > moe(experts=4)"), 17).double().eval()
    tokens = torch.randint(17, (2, 12), generator=torch.Generator().manual_seed(1))
    first, last = one.operators[0], one.operators[2]
    assert isinstance(first, Moe)
    assert isinstance(last, Moe)
    assert last.router.chain is not None
    with torch.no_grad():
        last.router.chain.normal_()
    one(tokens)[0].square().sum().backward()
    gradient = last.router.chain.grad
    assert gradient is not None
    assert gradient.abs().max() > 0
    # The later mixture teaches the earlier router through its logits.
    table = weight(first)
    assert table.grad is not None
    taught = table.grad.clone()
    one.zero_grad()
    with torch.no_grad():
        last.router.chain.zero_()
    one(tokens)[0].square().sum().backward()
    assert table.grad is not None
    assert error(table.grad, taught) > 1e-3


@pytest.mark.parametrize(
    "genes",
    [
        {},
        {"zero": 1, "copy": 2, "top_k": 3, "capacity": 0.7},
        {"choice": "expert", "causal": False, "capacity": 2.0},
    ],
    ids=["plain", "special", "expert choice"],
)
@pytest.mark.parametrize("tokens", [1, 29])
@torch.no_grad()
def test_a_weight_inside_of_an_expert(genes: dict[str, Gene], tokens: int) -> None:
    """Experts that are homogeneous do not tell where it stands, others do."""
    x = inputs(tokens)
    plain: dict[str, Gene] = {"activation": "relu", "gated": False}
    for kind in (plain, {}):
        without, inside = made(**genes, **kind), made(**genes, **kind, weigh="input")
        inside.load_state_dict(without.state_dict())
        far = error(inside(x)[0], without(x)[0])
        assert far < 1e-12 if kind else far > 1e-3


def test_equal_layers_have_equal_configs() -> None:
    plain = made().config
    for genes in (
        {"groups": 4, "top_groups": 4},
        {"group_score": "top2"},
        {"special_load": 0.5},
        {"aux_weight": 0.5},
        {"computed": 1.5},
    ):
        assert made(**genes).config == plain
    hashed = made(choice="hash").config
    assert made(choice="hash", score="sigmoid", balance="none", renormalise=False).config == hashed


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_batch_in_which_no_expert_computes(dtype: torch.dtype) -> None:
    """All tokens take zero and copy experts, in the form with many pairs."""
    module = made(experts=2, top_k=2, zero=1, copy=1, renormalise=False).to(dtype)
    with torch.no_grad():
        module.router.steps.copy_(torch.tensor([0, 0, 5000, 5000]))
    x = inputs().to(dtype).requires_grad_()
    y = module(x)[0]
    scores = (x @ weight(module).T).softmax(-1)
    assert error(y, scores[..., 3:] * x) < 1e-5
    y.square().sum().backward()
    assert x.grad is not None
    assert x.grad.abs().max() > 0


@pytest.mark.parametrize(
    ("genes", "sentence"),
    [
        ({"groups": 3}, "groups=3 does not divide the 8 experts"),
        ({"groups": 8, "top_groups": 1}, "top_k=2 is more than top_groups=1 groups of 1 have"),
        (
            {"groups": 8, "top_groups": 4, "group_score": "top2"},
            "group_score=top2 needs groups of at least 2",
        ),
        ({"top_k": 9}, "top_k=9 is more than experts=8"),
        ({"top_k": 11, "zero": 2}, "top_k=11 is more than experts=8 and 2 special"),
        ({"activation": "clamped", "shared": 1}, "activation=clamped goes with gated=true"),
        ({"shared_gate": True}, "shared_gate=true goes with shared of at least 1"),
        ({"noise": "random-second", "top_k": 1}, "top_k of at least 2"),
        ({"device_weight": 0.1}, "device_weight and sent_weight go with groups of at least 2"),
        ({"weigh": "input", "bias": True}, "weigh=input goes with bias=false"),
        ({"computed": 3.0}, "computed=3 is more than top_k=2 of experts=8"),
        ({"choice": "hash", "groups": 2}, "choice=hash goes with groups=1, not 2"),
        ({"choice": "hash", "aux": "batch"}, "choice=hash goes with aux=none"),
    ],
)
def test_what_does_not_go_together_gets_a_sentence(genes: dict[str, Gene], sentence: str) -> None:
    with pytest.raises(GeneError, match=sentence):
        made(**genes)
