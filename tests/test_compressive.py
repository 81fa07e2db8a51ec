"""Compressive Transformer against its algorithms 1 and 2, written as the paper has them (float64).

Tolerance 1e-10 of the scale: the same sums in another order.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mendel.genome.build import build as model_of
from mendel.genome.check import TOLERANCE, difference
from mendel.genome.notation import parse
from mendel.primitives.attention.axes import configure
from mendel.primitives.attention.compressive import CompressedSegments, CompressiveAttention
from mendel.primitives.base import Gene, GeneError, Site, State
from mendel.primitives.catalogue import resolve
from mendel.primitives.position import ContextError

WIDTH, HEADS, TOKENS = 24, 4, 61

CASES: dict[str, dict[str, Gene]] = {
    "xl": {"segment": 8, "memory": 8, "compressed": 6},
    "none": {"position": "none", "segment": 4, "memory": 8, "compressed": 3, "kv_heads": 2},
    "together": {"segment": 4, "memory": 4, "compressed": 3, "qk_norm": True, "norm_over": "all"},
    "rope": {"position": "rope", "segment": 8, "memory": 8, "compressed": 4, "qk_norm": True},
    "alibi": {"position": "alibi", "segment": 4, "memory": 4, "compressed": 7, "bias": True},
    "mean": {"compression": "mean", "segment": 6, "memory": 12, "compression_rate": 3},
    "max": {"compression": "max", "segment": 6, "memory": 6, "compression_rate": 2},
    "segment-rate": {"segment": 4, "memory": 4, "compression_rate": 4, "compressed": 2},
}


def build(genes: dict[str, Gene], dtype: torch.dtype = torch.float64) -> CompressiveAttention:
    _, full = resolve("compressive", {"heads": HEADS, **genes})
    torch.manual_seed(0)
    module = configure(Site(WIDTH), full).build().to(dtype)
    assert isinstance(module, CompressiveAttention)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return module


def inputs(tokens: int = TOKENS) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, tokens, WIDTH, generator=generator, dtype=torch.float64)


def error(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()


def f_c(module: CompressiveAttention, old: Tensor) -> Tensor:
    """The compression of (B, N c, D) to (B, N, D), by torch's own convolution and pooling."""
    rate, kind = module.pattern.rate, module.config.compression
    if kind == "mean":
        return F.avg_pool1d(old.mT, rate).mT
    if kind == "max":
        return F.max_pool1d(old.mT, rate).mT
    assert module.compress is not None
    taps = module.compress.weight.unflatten(1, (rate, WIDTH)).mT
    return F.conv1d(old.mT, taps, stride=rate).mT


def heads(module: CompressiveAttention, x: Tensor, stop: bool = False) -> tuple[Tensor, ...]:
    """q, k, v (B, T, heads, K) of vectors, not turned; `stop`: without gradients of the weights."""
    c = module.config
    weight, bias = module.entry.weight, module.entry.bias
    if stop:
        weight, bias = weight.detach(), None if bias is None else bias.detach()
    mixed = (x @ weight.T if bias is None else x @ weight.T + bias).unflatten(-1, (-1, c.head_dim))
    q, k, v = mixed.split([c.heads, c.kv_heads, c.kv_heads], 2)
    if module.q_norm is not None and module.k_norm is not None:
        scales = (module.q_norm.weight, module.k_norm.weight)
        over = (-2, -1) if c.norm_over == "all" else -1
        q, k = (
            t
            * (t.square().mean(over, keepdim=True) + 1e-6).rsqrt()
            * (s.detach() if stop else s).view(-1, c.head_dim)
            for t, s in zip((q, k), scales, strict=True)
        )
    repeat = c.heads // c.kv_heads
    return q, k.repeat_interleave(repeat, 2), v.repeat_interleave(repeat, 2)


def softmax_rows(scores: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("bhs,bshk->bhk", scores.softmax(-1), v)


def attention(module: CompressiveAttention, segment: Tensor, memories: Tensor) -> Tensor:
    """Attention of every token of the segment over [memories, segment up to it]."""
    c, lead = module.config, memories.shape[1]
    q, k, v = heads(module, torch.cat((memories, segment), 1))
    if module.rotary is not None:
        q, k = module.rotary(q, 0), module.rotary(k, 0)
    rows = []
    for i in range(segment.shape[1]):
        at = lead + i
        distance = torch.arange(at, -1, -1, dtype=q.dtype)
        query, content, added = q[:, at], q[:, at], torch.zeros((), dtype=q.dtype)
        if c.position == "alibi":
            slopes = torch.tensor([2.0 ** (-8.0 * (h + 1) / c.heads) for h in range(c.heads)])
            added = -slopes[:, None] * distance
        if c.position == "xl":
            parameters = dict(module.position.named_parameters())  # type: ignore[union-attr]
            rate = 10000.0 ** (-torch.arange(0, WIDTH, 2, dtype=q.dtype) / WIDTH)
            angle = distance[:, None] * rate
            relative = torch.cat((angle.sin(), angle.cos()), -1) @ parameters["relative.weight"].T
            relative = relative.unflatten(-1, (c.heads, -1))
            added = torch.einsum("bhk,shk->bhs", query + parameters["position"], relative)
            added = added / c.head_dim**0.5
            content = query + parameters["content"]
        scores = torch.einsum("bhk,bshk->bhs", content, k[:, : at + 1]) / c.head_dim**0.5
        rows.append(softmax_rows(scores + added, v[:, : at + 1]))
    return module.exit(torch.stack(rows, 1).flatten(2))  # type: ignore[no-any-return]


def algorithms(module: CompressiveAttention, x: Tensor) -> tuple[Tensor, Tensor]:
    """Algorithm 1's outputs, and algorithm 2's loss as a mean over tokens."""
    pattern = module.pattern
    memory, compressed = x[:, :0].detach(), x[:, :0].detach()
    outputs, losses = [], []
    for segment in x.split(pattern.segment, 1):
        memories = torch.cat((compressed, memory), 1)
        outputs.append(attention(module, segment, memories))
        if segment.shape[1] < pattern.segment:
            break
        joined = torch.cat((memory, segment.detach()), 1)
        if joined.shape[1] > pattern.memory:
            old = joined[:, : -pattern.memory]
            losses.append(reconstruction(module, segment.detach(), old))
            new = f_c(module, old).detach()
            compressed = torch.cat((compressed, new), 1)[:, -pattern.compressed :]
        memory = joined[:, -pattern.memory :]
    loss = torch.cat(losses, 1).mean() if losses else torch.zeros(())
    return torch.cat(outputs, 1), loss


def reconstruction(module: CompressiveAttention, segment: Tensor, old: Tensor) -> Tensor:
    """|attn(h, old) - attn(h, f_c(old))| for every token h, (B, T)."""
    q = heads(module, segment, stop=True)[0]
    outs = []
    for vectors in (old, f_c(module, old)):
        _, k, v = heads(module, vectors, stop=True)
        scores = torch.einsum("bthk,bshk->bhts", q, k) / module.config.head_dim**0.5
        outs.append(torch.einsum("bhts,bshk->bthk", scores.softmax(-1), v).flatten(2))
    return (outs[0] - outs[1]).norm(dim=-1)


@pytest.mark.parametrize("name", CASES)
def test_it_is_the_papers_algorithms_with_their_stopped_gradients(name: str) -> None:
    module, x = build(CASES[name]), inputs().requires_grad_()
    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=x.dtype)
    expected, loss = algorithms(module, x)
    named = {"x": x, **dict(module.named_parameters())}
    learns = loss.requires_grad
    assert learns == (module.config.compression == "conv")
    wanted = torch.autograd.grad(
        (expected * weight).sum() + (loss if learns else 0.0), list(named.values())
    )
    for state in (None, module.init_state(2, TOKENS, x.dtype)):
        y, _ = module(x, state)
        assert error(y, expected) < 1e-10
        extra = module.auxiliary_loss()
        if learns:
            assert extra is not None
            torch.testing.assert_close(extra, loss, rtol=1e-10, atol=0)
        else:
            assert extra is None
        total = (y * weight).sum() + (0.0 if extra is None else extra)
        got = torch.autograd.grad(total, list(named.values()))
        for label, ours, theirs in zip(named, got, wanted, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10, msg=label)


def test_the_task_does_not_teach_the_compression_nor_the_loss_anything_else() -> None:
    module, x = build(CASES["rope"]), inputs().requires_grad_()
    y, _ = module(x)
    loss = module.auxiliary_loss()
    assert loss is not None
    assert module.auxiliary_loss() is None
    parameters = dict(module.named_parameters())
    named = {"x": x, **parameters}
    by_task = torch.autograd.grad(y.square().sum(), list(named.values()), allow_unused=True)
    by_loss = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    taught = {
        which: {n for n, g in zip(named, grads, strict=True) if g is not None and g.abs().max() > 0}
        for which, grads in (("task", by_task), ("loss", by_loss))
    }
    assert taught["loss"] == {"compress.weight"}
    assert taught["task"] == set(named) - {"compress.weight"}


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_any_split_is_the_whole_and_costs_what_is_counted(name: str) -> None:
    module, x = build(CASES[name]), inputs()
    whole, counted = module(x)[0], module.config.cost(TOKENS, x.dtype)
    for pieces in ([1] * TOKENS, [8, 1, 20, 1, 31], [30, 31], [3, 5, 8, 45], [59, 2]):
        state: State | None = module.init_state(2, TOKENS, x.dtype)
        out = []
        with FlopCounterMode(display=False) as counter:
            for part in x.split(pieces, 1):
                y, state = module(part, state)
                out.append(y)
        assert state is not None
        assert state.bytes() == 2 * counted.state_bytes
        assert error(torch.cat(out, 1), whole) < 1e-10, pieces
        if len(pieces) == TOKENS:
            # The counter counts a batch of two.
            assert counter.get_total_flops() == pytest.approx(2 * TOKENS * counted.flops_per_token)


@pytest.mark.parametrize("context", [1, 8, 9, 16, 17, 24, 25, 60])
@torch.no_grad()
def test_a_state_for_a_short_context_serves_it(context: int) -> None:
    module = build({"segment": 8, "memory": 8, "compressed": 6})
    x = inputs(context)
    state: State | None = module.init_state(2, context, x.dtype)
    out = []
    for part in x.split(5, 1):
        y, state = module(part, state)
        out.append(y)
    assert error(torch.cat(out, 1), module(x)[0]) < 1e-10


@torch.no_grad()
def test_a_full_state_refuses_one_segment_more_and_stays_as_it_is() -> None:
    module, x = build({"segment": 8, "memory": 8, "compressed": 6}), inputs()
    for context, room in ((10, 10), (17, 24), (30, 32)):
        state = module.init_state(2, context, x.dtype)
        _, held = module(x[:, :room], state)
        assert held is not None
        before = {name: tensor.clone() for name, tensor in held.tensors.items()}
        with pytest.raises(ContextError, match=f"holds {room} tokens; this call needs {room + 1}"):
            module(x[:, room : room + 1], held)
        assert all(torch.equal(before[name], held.tensors[name]) for name in before)


def test_what_is_seen_is_what_is_counted() -> None:
    pattern = CompressedSegments(4, 8, 5, 2)
    for context in (1, 4, 5, 12, 13, 22, 40, 41):
        total = 0
        for t in range(context):
            start = t - t % 4
            left = max(0, start - 8)
            total += t + 1 - left + min(5, left // 2)
        assert pattern.seen(context) == pytest.approx(total / context)


def test_it_is_a_slot_of_a_model() -> None:
    genome = parse("{width=32} compressive(segment=4, memory=4, compressed=4) > swiglu")
    assert difference(genome, 1) <= TOLERANCE
    model = model_of(genome, vocab=16)
    model(torch.randint(16, (2, 20)))
    loss = model.auxiliary_loss()
    assert loss is not None
    loss.backward()  # type: ignore[no-untyped-call]
    taught = {n for n, p in model.named_parameters() if p.grad is not None}
    assert taught == {"operators.0.compress.weight"}


@pytest.mark.parametrize(
    ("genes", "sentence"),
    [
        ({"segment": 10}, "compression_rate=4 does not divide segment=10"),
        ({"segment": 8, "memory": 12}, "memory=12 is no multiple of segment=8"),
        ({"memory": 0}, "memory=0 is no multiple"),
        ({"conv": 3}, "pattern=compressive goes with conv=0"),
    ],
)
def test_genes_that_do_not_go_together_get_a_sentence(
    genes: dict[str, Gene], sentence: str
) -> None:
    with pytest.raises(GeneError, match=sentence):
        build(genes)
