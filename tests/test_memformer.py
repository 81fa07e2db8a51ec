"""Memformer against the paper's equations, slot by slot and token by token, in float64.

Tolerance 1e-10 of the scale: the same sums in another order.
"""

from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mendel.genome.check import TOLERANCE, difference
from mendel.genome.notation import parse
from mendel.primitives.attention.axes import configure
from mendel.primitives.attention.slots import Memformer
from mendel.primitives.base import Gene, GeneError, Site, State
from mendel.primitives.catalogue import resolve
from mendel.primitives.position import ContextError

WIDTH, HEADS, TOKENS = 24, 4, 37

CASES: dict[str, dict[str, Gene]] = {
    "plain": {"segment": 8, "slots": 3},
    "wide-heads": {"segment": 5, "slots": 2, "head_dim": 10, "kv_heads": 2, "bias": True},
    "sharp": {"segment": 6, "slots": 4, "slot_temperature": 0.1, "qk_norm": True},
    "one": {"segment": 1, "slots": 1, "heads": 1},
    "one-segment": {"segment": 64},
}


def build(genes: dict[str, Gene], dtype: torch.dtype = torch.float64) -> Memformer:
    _, full = resolve("memformer", {"heads": HEADS, **genes})
    torch.manual_seed(0)
    module = configure(Site(WIDTH, "rope"), full).build().to(dtype)
    assert isinstance(module, Memformer)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return module


def inputs(tokens: int = TOKENS) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, tokens, WIDTH, generator=generator, dtype=torch.float64)


def error(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()


def self_attention(module: Memformer, segment: Tensor, start: int) -> Tensor:
    """Causal attention within one segment (L, D) of one sequence."""
    c = module.config
    weight, bias = module.entry.weight, module.entry.bias
    mixed = segment @ weight.T if bias is None else segment @ weight.T + bias
    q, k, v = mixed.unflatten(-1, (-1, c.head_dim)).split([c.heads, c.kv_heads, c.kv_heads], 1)
    if module.q_norm is not None and module.k_norm is not None:
        q, k = module.q_norm(q), module.k_norm(k)
    assert module.rotary is not None
    q, k = (module.rotary(t[None], start)[0] for t in (q, k))
    rows = []
    for i in range(segment.shape[0]):
        for h in range(c.heads):
            g = h * c.kv_heads // c.heads
            weights = (k[: i + 1, g] @ q[i, h] / c.head_dim**0.5).softmax(0)
            rows.append(weights @ v[: i + 1, g])
    return module.exit(torch.cat(rows).view(segment.shape[0], -1))  # type: ignore[no-any-return]


def read(module: Memformer, h: Tensor, memory: Tensor) -> Tensor:
    """One token h (D,) reads slots (k, D)."""
    c = module.config
    w_k, w_v = module.recall.weight.chunk(2)
    out = []
    for head in range(c.heads):
        rows = slice(head * c.head_dim, (head + 1) * c.head_dim)
        q = module.ask.weight[rows] @ h
        scores = (memory @ w_k[rows].T) @ q / c.head_dim**0.5
        out.append(scores.softmax(0) @ (memory @ w_v[rows].T))
    return module.told.weight @ torch.cat(out)


def write(module: Memformer, memory: Tensor, z: Tensor) -> Tensor:
    """Slots (k, D) after a segment of tokens z (L, D)."""
    c = module.config
    size = WIDTH // c.heads
    w_k, w_v = module.note.weight.chunk(2)
    slots = []
    for i, m in enumerate(memory):
        parts = []
        for head in range(c.heads):
            rows = slice(head * size, (head + 1) * size)
            q = module.choose.weight[rows] @ m
            keys = torch.cat(((w_k[rows] @ m)[None], z @ w_k[rows].T))
            values = torch.cat((m[None, rows], z @ w_v[rows].T))
            weights = (keys @ q / size**0.5 / c.temperature).softmax(0)
            parts.append(weights @ values)
        forgotten = torch.cat(parts) + module.rest[i]
        slots.append(forgotten / forgotten.norm())
    return torch.stack(slots)


def memformer(module: Memformer, x: Tensor) -> Tensor:
    size, outputs = module.config.segment, []
    for sequence in x:
        memory = torch.stack([v / v.norm() for v in module.rest])
        rows: list[Tensor] = []
        for start in range(0, sequence.shape[0], size):
            segment = sequence[start : start + size]
            u = self_attention(module, segment, start)
            y = u + torch.stack([read(module, h, memory) for h in segment + u])
            rows += list(y)
            if segment.shape[0] == size:
                memory = write(module, memory, segment + y)
        outputs.append(torch.stack(rows))
    return torch.stack(outputs)


@pytest.mark.parametrize("name", CASES)
def test_it_is_the_papers_equations(name: str) -> None:
    module, x = build(CASES[name]), inputs().requires_grad_()
    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=x.dtype)
    expected = memformer(module, x)
    named = {"x": x, **dict(module.named_parameters())}
    wanted = torch.autograd.grad(
        (expected * weight).sum(), list(named.values()), materialize_grads=True, allow_unused=True
    )
    for state in (None, module.init_state(2, TOKENS, x.dtype)):
        y, _ = module(x, state)
        assert error(y, expected) < 1e-10
        got = torch.autograd.grad(
            (y * weight).sum(), list(named.values()), materialize_grads=True, allow_unused=True
        )
        for label, ours, theirs in zip(named, got, wanted, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10, msg=label)


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_any_split_is_the_whole_and_costs_what_is_counted(name: str) -> None:
    module, x = build(CASES[name]), inputs()
    whole, counted = module(x)[0], module.config.cost(TOKENS, x.dtype)
    for pieces in ([1] * TOKENS, [8, 1, 20, 1, 7], [30, 7], [3, 5, 8, 21], [16, 21]):
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


@torch.no_grad()
def test_slots_are_unit_vectors_and_forget_towards_their_own() -> None:
    """Nothing new comes in: a slot ends at v / |v|, its terminal state.

    With one head, since heads shrink their parts of a slot by different factors.
    """
    module = build({"segment": 4, "slots": 3, "heads": 1})
    module.note.weight[WIDTH:] = 0.0
    state: State | None = module.init_state(2, 4000, torch.float64)
    generator = torch.Generator().manual_seed(3)
    start = torch.randn(2, 3, WIDTH, generator=generator, dtype=torch.float64)
    x = inputs(4)
    _, state = module(x, state)
    assert state is not None
    state.tensors["slots"] = start / start.norm(dim=-1, keepdim=True)
    terminal = module.rest / module.rest.norm(dim=-1, keepdim=True)
    distances = []
    for _ in range(40):
        _, state = module(x, state)
        assert state is not None
        slots = state.tensors["slots"]
        torch.testing.assert_close(slots.norm(dim=-1), torch.ones(2, 3, dtype=slots.dtype))
        distances.append(float((slots - terminal).norm()))
    assert all(b < a for a, b in pairwise(distances[:10]))
    assert distances[-1] < 1e-3 * distances[0]


def test_gradients_reach_the_first_segment_through_the_memory() -> None:
    module, x = build({"segment": 4}), inputs(16).requires_grad_()
    (gradient,) = torch.autograd.grad(module(x)[0][:, -1].square().sum(), x)
    assert (gradient.abs().amax((0, 2)) > 0).all()


@torch.no_grad()
def test_a_full_cache_refuses_one_token_more() -> None:
    module, x = build({"segment": 8}), inputs()
    state = module.init_state(2, 5, torch.float64)
    _, held = module(x[:, :5], state)
    with pytest.raises(ContextError, match="holds 5 tokens; this call needs 6"):
        module(x[:, 5:6], held)
    # From a whole segment on there is no end.
    _, held = module(x[:, :9], module.init_state(2, 9, torch.float64))
    module(x[:, 9:], held)


def test_it_is_a_slot_of_a_model() -> None:
    genome = parse("{width=32, position=rope} memformer(segment=4, slots=3) > swiglu")
    assert difference(genome, 1) <= TOLERANCE
    lending = parse(
        "{width=32} memformer(segment=4, features=@k) > chunked-attention(window=4, features=@k)"
    )
    assert difference(lending, 1) <= TOLERANCE


@pytest.mark.parametrize(
    ("genes", "sentence"),
    [
        ({"heads": 5, "head_dim": 4}, "heads=5 does not divide the width 24"),
        ({"conv": 3}, "pattern=memformer goes with conv=0"),
    ],
)
def test_genes_that_do_not_go_together_get_a_sentence(
    genes: dict[str, Gene], sentence: str
) -> None:
    with pytest.raises(GeneError, match=sentence):
        build(genes)
