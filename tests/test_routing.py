"""Routers of slots: joins by the token and tokens that pass a slot by, against plain loops."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from flop_count import counter as flop_counter
from torch import Tensor

from mendel.genome import presets
from mendel.genome.build import build
from mendel.genome.check import TOLERANCE, chooses, difference
from mendel.genome.cost import cost
from mendel.genome.model import LanguageModel, ModelState
from mendel.genome.notation import parse
from mendel.genome.residual import SlotBlock
from mendel.genome.routing import BALANCE_WEIGHT, THRESHOLD_WEIGHT, passing
from mendel.primitives.sphere import unit

FORMS = ("", "placement=post, ", "placement=sandwich, ", "residual=layerscale, ", "residual=ngpt, ")


def made(notation: str, form: str = "") -> LanguageModel:
    torch.manual_seed(0)
    return build(parse(f"{{{form}width=32, tied=false}} {notation}"), 40).double()


def tokens(batch: int = 3, length: int = 13, seed: int = 1) -> Tensor:
    return torch.randint(40, (batch, length), generator=torch.Generator().manual_seed(seed))


def block_of(model: LanguageModel, slot: int = 0) -> SlotBlock:
    block = model.blocks[slot]
    assert isinstance(block, SlotBlock)
    return block


def added(block: SlotBlock, x: Tensor, y: Tensor, factor: Tensor | float) -> Tensor:
    """The stream of one token (D) after a slot whose output for it is y, from the papers."""
    if block.rate is not None:
        return unit(x + factor * block.rate().abs() * (unit(y) - x))
    scale = 1.0 if block.scale is None else block.scale
    if block.placement == "post":
        return block.after((x + factor * scale * y).unsqueeze(0))[0]  # type: ignore[no-any-return]
    return x + factor * scale * block.after(y.unsqueeze(0))[0]


def ended(model: LanguageModel, x: Tensor) -> Tensor:
    assert model.head is not None
    logits = F.linear(model.final_norm(x), model.head.weight)
    return logits if model.logit_scale is None else logits * model.logit_scale()


def gradients(model: LanguageModel, logits: Tensor, extra: Tensor | None) -> dict[str, Tensor]:
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2)).double()
    loss = (logits * weight).sum()
    names, parameters = zip(*model.named_parameters(), strict=True)
    loss = loss if extra is None else loss + 100 * extra
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def agree(model: LanguageModel, logits: Tensor, extra: Tensor | None, loop: LanguageModel) -> None:
    """Outputs, losses and every gradient of the model are those that the loop had."""
    expected, other = definition(loop)
    torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)
    assert (extra is None) == (other is None)
    got, wanted = gradients(model, logits, extra), gradients(loop, expected, other)
    for name, grad in wanted.items():
        assert grad.abs().max() > 0, name
        torch.testing.assert_close(got[name], grad, rtol=1e-8, atol=1e-8, msg=name)


def definition(model: LanguageModel) -> tuple[Tensor, Tensor | None]:
    """Logits and losses of a model of one slot in training, token by token, row by row."""
    block = block_of(model)
    slot = model.genome.slots[0]
    x = model.entry(model.embedding(tokens()))
    rows, losses, entered = [], [], []
    for row in x:
        read = block.read(row.unsqueeze(0))[0]
        inside = list(range(len(row)))
        r: list[Tensor | float] = [1.0] * len(row)
        if block.depth is not None:
            scores = [block.depth.weight[0] @ token for token in read]
            best = sorted(inside, key=lambda t: (-float(scores[t].detach()), t))
            inside = sorted(best[: passing(slot.tokens, len(row))])
            r = [scores[t] for t in range(len(row))]
            among = [torch.tensor(float(t in inside)).double() for t in range(len(row))]
            losses += [
                F.softplus(s) - s * a for s, a in zip(scores, among, strict=True)
            ]  # -a log(sigmoid s) - (1 - a) log(1 - sigmoid s)
        entered.append(read[inside])
        outputs = [model.operators[k](read[inside].unsqueeze(0), None)[0][0] for k in model.plan[0]]
        out = list(row)
        for place, t in enumerate(inside):
            branches = [y[place] for y in outputs]
            factor: Tensor | float = r[t]
            y = branches[0]
            if block.gate is not None:
                p = torch.stack([w @ read[t] for w in block.gate.weight]).softmax(0)
                if slot.join == "gate":
                    y = sum(a * b for a, b in zip(p, branches, strict=True))  # type: ignore[assignment]
                else:
                    j = int(p.argmax())
                    y, factor = branches[j], factor * p[j]
            out[t] = added(block, row[t], y, factor)
        rows.append(torch.stack(out))
    extra = THRESHOLD_WEIGHT * torch.stack(losses).mean() if losses else None
    if slot.join == "top1":
        balance = switch_loss(block, torch.cat(entered))
        extra = balance if extra is None else extra + balance
    return ended(model, torch.stack(rows)), extra


def switch_loss(block: SlotBlock, read: Tensor) -> Tensor:
    """0.01 J sum_j c_j m_j over the tokens (N, D) that the branches see."""
    assert block.gate is not None
    p = (read @ block.gate.weight.T).softmax(-1)
    chosen = F.one_hot(p.argmax(-1), p.shape[-1]).double()
    return BALANCE_WEIGHT * p.shape[-1] * (chosen.mean(0) * p.mean(0)).sum()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "notation",
    [
        "[mha | mamba2 | gqa](join=gate)",
        "[mha | mamba2 | gqa](join=top1)",
        "[mha](tokens=0.3)",
        "[mha | mamba2](join=top1, tokens=0.5)",
    ],
)
def test_training_is_the_loop_from_the_papers(notation: str, form: str) -> None:
    model = made(notation, form).train()
    logits = model(tokens())[0]
    agree(model, logits, model.auxiliary_loss(), model)
    assert model.auxiliary_loss() is None, "a loss is handed out once"


def above(model: LanguageModel, ids: Tensor) -> Tensor:
    """Evaluation of a model of one slot, token by token: in where w x > 0, rows by themselves."""
    block = block_of(model)
    assert block.depth is not None
    x = model.entry(model.embedding(ids))
    rows = []
    for row in x:
        read = block.read(row.unsqueeze(0))[0]
        scores = read @ block.depth.weight[0]
        inside = [t for t in range(len(row)) if scores[t] > 0]
        out = list(row)
        if inside:
            y = model.operators[0](read[inside].unsqueeze(0), None)[0][0]
            for place, t in enumerate(inside):
                out[t] = added(block, row[t], y[place], scores[t])
        rows.append(torch.stack(out))
    return ended(model, torch.stack(rows))


def pieces(length: int) -> Iterator[list[int]]:
    yield [length]
    yield [1] * length
    yield [length - length // 3, length // 3]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("operator", ["mha", "mamba2", "moe(experts=4)", "token-shift-mlp", "lstm"])
def test_evaluation_and_decoding_let_through_what_is_above_the_threshold(
    operator: str, form: str
) -> None:
    model = made(f"[{operator}](tokens=0.3)", form).eval()
    with torch.no_grad():
        for batch, length in ((3, 13), (2, 1), (1, 8)):
            ids = tokens(batch, length, seed=length)
            expected = above(model, ids)
            torch.testing.assert_close(model(ids)[0], expected, rtol=1e-10, atol=1e-10)
            for sizes in pieces(length):
                state, parts = model.init_state(batch, length), []
                for part in ids.split([n for n in sizes if n], 1):
                    logits, state = model(part, state)
                    parts.append(logits)
                torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("training", [False, True])
def test_a_token_that_passes_a_slot_by_is_not_changed(form: str, training: bool) -> None:
    """In any form of norms and residuals; where none enters, the slot does nothing at all."""
    model = made("[swiglu](tokens=0.3)", form).train(training)
    block = block_of(model)
    assert block.depth is not None
    x = model.entry(model.embedding(tokens()))
    seen: list[Tensor] = []
    model.final_norm.register_forward_hook(lambda _, args, __: seen.append(args[0]))
    model(tokens())
    same = (seen[0] == x).all(-1)
    logits = block.depth.logits(block.read(x)).squeeze(-1)
    assert same.sum() == ((3 * 13 - 3 * 4) if training else (logits <= 0).sum())
    with torch.no_grad():
        block.depth.weight.zero_()
    model.eval()
    model(tokens())
    assert torch.equal(seen[1], x)


def test_where_all_enter_the_slot_is_the_plain_one_times_the_routers_weight() -> None:
    """tokens=1 in the loop's place: the shorter sequence is the whole one."""
    model = made("[mha](tokens=0.5)").eval()
    block = block_of(model)
    assert block.depth is not None
    block.before = torch.nn.Identity()
    with torch.no_grad():
        model.embedding.weight.abs_()
        block.depth.weight.abs_()
        x = model.entry(model.embedding(tokens()))
        expected = x + model.operators[0](x, None)[0] * (x @ block.depth.weight.T)
        torch.testing.assert_close(model(tokens())[0], ended(model, expected))
        state = model.init_state(3, 13)
        parts = [model(tokens()[:, t : t + 1], state)[0] for t in range(13)]
        torch.testing.assert_close(torch.cat(parts, 1), ended(model, expected))


@pytest.mark.parametrize("length", [1, 2, 7, 10])
def test_the_share_is_rounded_up(length: int) -> None:
    model = made("[mha](tokens=0.3)").train()
    block = block_of(model)
    assert block.depth is not None
    chosen = block.depth.choose(block.read(model.embedding(tokens(2, length))), True)
    size = {1: 1, 2: 1, 7: 3, 10: 3}[length]
    assert chosen.index.shape == (2, size)
    assert (chosen.index.diff(dim=1) > 0).all()
    assert passing(0.7, 10) == 7, "0.7 * 10 is a rounding above 7"


def test_evaluation_is_causal_and_rows_do_not_know_each_other() -> None:
    model = made("[mha](tokens=0.4) > [mamba2 | gqa](join=top1, tokens=0.5) > swiglu").eval()
    ids = tokens()
    other = ids.clone()
    other[:, 9:] = (other[:, 9:] + 7) % 40
    with torch.no_grad():
        whole = model(ids)[0]
        torch.testing.assert_close(model(other)[0][:, :9], whole[:, :9], rtol=1e-12, atol=1e-12)
        alone = torch.cat([model(row.unsqueeze(0))[0] for row in ids])
    torch.testing.assert_close(alone, whole, rtol=1e-12, atol=1e-12)


def test_an_operator_that_reads_ahead_sees_its_row_and_no_filling() -> None:
    model = made("[bilstm](tokens=0.5)").eval()
    with torch.no_grad():
        expected = above(model, tokens())
        torch.testing.assert_close(model(tokens())[0], expected, rtol=1e-12, atol=1e-12)


def test_scores_are_not_handed_on_through_a_slot_with_part_of_the_tokens() -> None:
    part = made("realformer > [realformer](tokens=0.5) > realformer").eval()
    chain = made("realformer > realformer").eval()
    with torch.no_grad():
        block_of(part, 1).depth.weight.zero_()  # type: ignore[union-attr]
        own = dict(part.named_parameters())
        names = {"operators.1": "operators.2", "blocks.1": "blocks.2"}
        for name, parameter in chain.named_parameters():
            for mine, theirs in names.items():
                name = name.replace(mine, theirs)
            parameter.copy_(own[name])
        torch.testing.assert_close(part(tokens())[0], chain(tokens())[0])


@pytest.mark.parametrize("header", ["", "norm=none, ", "norm=dyt, placement=post, "])
@pytest.mark.parametrize("residual", ["plain", "rezero", "reversible", "ngpt"])
def test_both_forms_agree_in_every_backbone(header: str, residual: str) -> None:
    if residual == "reversible":
        header = header.replace("post", "sandwich")
    genome = parse(
        f"{{{header}residual={residual}, width=32}} [mha | mamba2](join=gate) > [moe](tokens=0.4) "
        "> [gqa | mamba2 | mha](join=top1, tokens=0.6) > swiglu > [mha](tokens=0.2)"
    )
    assert max(difference(genome, seed) for seed in range(3)) <= TOLERANCE
    assert chooses(genome)
    model = build(genome)
    assert cost(genome).total.params == sum(p.numel() for p in model.parameters())
    routers = [r for block in model.blocks for r in block.routers().values()]  # type: ignore[operator, union-attr]
    assert len(routers) == 5
    if residual == "ngpt":
        for router in routers:
            lengths = router.weight.norm(dim=1)
            torch.testing.assert_close(lengths, torch.ones_like(lengths))


def test_half_precision_routes_in_float32() -> None:
    model = made("[mha | mamba2](join=top1, tokens=0.5) > swiglu").to(torch.bfloat16)
    assert block_of(model).depth.logits(torch.ones(1, 2, 32).bfloat16()).dtype == torch.float32  # type: ignore[union-attr]
    for training in (True, False):
        logits = model.train(training)(tokens())[0]
        assert logits.dtype == torch.bfloat16
        assert logits.isfinite().all()


def test_costs_are_those_of_the_shorter_sequence() -> None:
    """Five of ten tokens enter; the cache has room for all ten."""
    genome = parse("{width=32} [mha | gqa](join=top1, tokens=0.5) > swiglu")
    torch.manual_seed(0)
    model = build(genome).eval().requires_grad_(False)
    block = block_of(model)
    assert block.depth is not None
    read = block.read(model.embedding(torch.tensor([[3, 5]])))[0]
    block.depth.weight.copy_((read[1] - read[0]).unsqueeze(0))
    ids = torch.tensor([[3, 5, 5, 3, 3, 5, 3, 5, 3, 5]])
    counted = cost(genome, 10, torch.float32)
    state: ModelState | None = model.init_state(1, 10)
    assert state is not None
    assert counted.total.state_bytes == state.bytes() == state.clone().bytes()
    assert counted.total.params == sum(p.numel() for p in model.parameters())
    with flop_counter() as counter:
        for t in range(10):
            _, state = model(ids[:, t : t + 1], state)
    assert counter.get_total_flops() == pytest.approx(10 * counted.total.flops_per_token, rel=1e-12)
    whole = cost(parse("{width=32} [mha | gqa](join=top1) > swiglu"), 10, torch.float32)
    assert counted.slots[0].flops_per_token < 0.5 * whole.slots[0].flops_per_token + 2 * 32
    assert counted.total.state_bytes == whole.total.state_bytes


def test_the_load_is_that_of_the_last_training_step() -> None:
    model = made(
        "[mha | mamba2](join=top1) > [swiglu](tokens=0.3) > [mha | gqa](join=gate)"
    ).train()
    assert model.statistics() == {
        "slot0": {"load": [0.0, 0.0]},
        "slot1": {"passed": 0.0},
        "slot2": {"load": [0.0, 0.0]},
    }
    model(tokens())
    model.after_step()
    after = model.statistics()
    assert sum(after["slot0"]["load"]) == sum(after["slot2"]["load"]) == pytest.approx(1)
    assert after["slot0"]["load"][0] * 39 == pytest.approx(round(after["slot0"]["load"][0] * 39))
    assert 0 < after["slot1"]["passed"] < 1
    model.eval()(tokens())
    assert model.auxiliary_loss() is None
    assert model.statistics() == after, "evaluation does not count"


def test_experts_shared_across_layers_count_once_and_report_once() -> None:
    """MoEUT: two layers of attention and experts, again and again."""
    short, long = presets.load("moeut-like", depth=4), presets.load("moeut-like", depth=12)
    once, thrice = build(short), build(long)
    own = [p for model in (once, thrice) for p in model.operators.parameters()]
    assert len(own) % 2 == 0
    assert [p.shape for p in own[: len(own) // 2]] == [p.shape for p in own[len(own) // 2 :]]
    norms = 8 * 64
    assert cost(long).total.params == cost(short).total.params + norms
    assert cost(long).total.params == sum(p.numel() for p in thrice.parameters())
    assert cost(long).total.flops_per_token > 2 * cost(short).total.flops_per_token
    thrice.train()
    before = [p.detach().clone() for p in thrice.operators.parameters()]
    optimizer = torch.optim.SGD(thrice.parameters(), 0.1)
    F.cross_entropy(thrice(tokens())[0].flatten(0, 1), tokens(seed=9).flatten()).backward()
    optimizer.step()
    counts = thrice.operators[1].ledger.counts
    assert int(counts.sum()) == 3 * 39 * 4, "three places, 39 tokens, four experts for each"
    thrice.after_step()
    assert set(thrice.statistics()) == {"slot1.0", "slot3.0"}
    assert sum(thrice.statistics()["slot1.0"]["load"]) == pytest.approx(1)
    moved = zip(before, thrice.operators.parameters(), strict=True)
    assert all(not torch.equal(a, b) for a, b in moved)
    assert difference(long, 1) <= TOLERANCE


@pytest.mark.parametrize("residual", ["plain", "reversible"])
def test_a_mixture_in_several_slots_adds_the_loss_of_each(residual: str) -> None:
    """The losses and gradients of mixtures of their own with equal weights."""
    text = "{{residual={}, width=32}} {} > mha > {} > swiglu"
    moe = "moe({}experts=4, balance=none, aux=batch)"
    one, two = moe.format("weights=@a, "), moe.format("")
    torch.manual_seed(0)
    shared = build(parse(text.format(residual, one, one)), 40).double()
    apart = build(parse(text.format(residual, two, two)), 40).double()
    with torch.no_grad():
        names = {"operators.2.": "operators.0.", "operators.3.": "operators.2."}
        for name, parameter in apart.named_parameters():
            where = next((new for old, new in names.items() if name.startswith(old)), None)
            name = (
                name if where is None else where + name.removeprefix("operators.").split(".", 1)[1]
            )
            parameter.copy_(shared.get_parameter(name))
    losses = []
    for model in (shared, apart):
        model(tokens())
        loss = model.auxiliary_loss()
        assert loss is not None
        assert model.auxiliary_loss() is None
        loss.backward()  # type: ignore[no-untyped-call]
        losses.append(loss.detach())
    torch.testing.assert_close(losses[0], losses[1])
    both = apart.operators[0].router.weight.grad + apart.operators[2].router.weight.grad
    torch.testing.assert_close(shared.operators[0].router.weight.grad, both)
