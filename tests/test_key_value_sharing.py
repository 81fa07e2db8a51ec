"""Shared keys and values: a borrower is an own layer with the lender's keys and values."""

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mendel.primitives.attention.axes import configure_plain as configure
from mendel.primitives.attention.axes import lending_problem
from mendel.primitives.attention.distance import Alibi
from mendel.primitives.attention.keyvalues import KeyValues
from mendel.primitives.attention.layer import Attention, AttentionConfig, BorrowingAttention
from mendel.primitives.base import Gene, Site, State
from mendel.primitives.catalogue import resolve

WIDTH = 48
TOKENS = 37


def config(genes: dict[str, Gene] | None = None, borrows: bool = False) -> AttentionConfig:
    _, full = resolve("attention", {"heads": 6, **(genes or {})})
    return configure(Site(WIDTH, "rope", borrows=borrows), full)


def build(genes: dict[str, Gene] | None = None) -> Attention:
    torch.manual_seed(0)
    module = config(genes).build()
    assert isinstance(module, Attention)
    return module


def borrower(genes: dict[str, Gene] | None = None) -> BorrowingAttention:
    torch.manual_seed(3)
    module = config(genes, borrows=True).build()
    assert isinstance(module, BorrowingAttention)
    return module


def inputs(batch: int = 2) -> Tensor:
    return torch.randn(batch, TOKENS, WIDTH, generator=torch.Generator().manual_seed(1))


def error(a: Tensor, b: Tensor) -> float:
    """Below 1e-5 for the same float32 products in another order, see test_attention.py."""
    return ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()


LENDING: dict[str, tuple[dict[str, Gene], dict[str, Gene]]] = {
    "full": ({"kv_heads": 2}, {"kv_heads": 2}),
    "other-heads": (
        {"kv_heads": 2, "conv": 3, "qk_norm": True},
        {"heads": 12, "kv_heads": 2, "head_dim": 8},
    ),
    "full-to-sliding": ({}, {"pattern": "sliding", "window": 5}),
    "sliding": (
        {"pattern": "sliding", "window": 9, "qk_norm": True},
        {"pattern": "sliding", "window": 9, "qk_norm": True, "gate": "sigmoid", "bias": True},
    ),
    "normed-together": (
        {"kv_heads": 2, "qk_norm": True, "norm_over": "all"},
        {"kv_heads": 2, "qk_norm": True, "norm_over": "all"},
    ),
    "narrower": ({"pattern": "sliding", "window": 9}, {"pattern": "sliding", "window": 4}),
    "alibi": (
        {"pattern": "sliding", "window": 9, "position": "alibi"},
        {"pattern": "sliding", "window": 3, "position": "alibi"},
    ),
}


@pytest.mark.parametrize("name", LENDING)
@torch.no_grad()
def test_a_borrower_equals_an_own_layer_with_the_same_keys_and_values(name: str) -> None:
    """The own layer gets its keys and values from the lender's input, its queries from x."""
    lending, borrowing = LENDING[name]
    assert lending_problem(config(lending), config(borrowing, borrows=True)) is None
    lender, b, x, source = build(lending), borrower(borrowing), inputs(), inputs().flip(1)
    _, none, kv = lender.forward_lending(source)
    assert none is None
    whole = b.forward_borrowing(x, kv)
    assert error(whole, _own_layer(lender, b, source, x)) < 1e-5
    for pieces in ([1] * TOKENS, [TOKENS], [8, 1, 20, 1, 7], [30, 7]):
        state: State | None = lender.init_state(2, TOKENS, torch.float32)
        out = []
        for part, given in zip(x.split(pieces, 1), source.split(pieces, 1), strict=True):
            _, state, kv = lender.forward_lending(given, state)
            out.append(b.forward_borrowing(part, kv))
        assert error(torch.cat(out, 1), whole) < 1e-5, pieces


def _own_layer(lender: Attention, b: BorrowingAttention, source: Tensor, x: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(K) + bias) v, head by head and token by token, from the formula."""
    config = b.config
    kv: KeyValues = lender.forward_lending(source)[2]
    mixed = b.entry(x)
    q = mixed[..., : config.query_width].unflatten(-1, (config.heads, config.head_dim))
    if b.q_norm is not None:
        q = b.q_norm(q)
    if b.rotary is not None:
        q = b.rotary(q, 0)
    out = torch.zeros_like(q)
    for h in range(config.heads):
        g = h * config.kv_heads // config.heads
        for t in range(TOKENS):
            first = 0 if config.pattern.window is None else max(0, t - config.pattern.window + 1)
            k, v = kv.keys[:, g, first : t + 1], kv.values[:, g, first : t + 1]
            scores = (k @ q[:, t, h, :, None]).squeeze(-1) / config.head_dim**0.5
            if b.position is not None:
                assert isinstance(b.position, Alibi)
                scores = scores - b.position.slopes[h] * (t - torch.arange(first, t + 1))
            out[:, t, h] = (scores.softmax(-1).unsqueeze(1) @ v).squeeze(1)
    y = out.flatten(2)
    if config.gate == "sigmoid":
        y = y * mixed[..., config.query_width :].sigmoid()
    return b.exit(y)


@pytest.mark.parametrize("name", LENDING)
def test_a_borrowers_cost_has_no_keys_and_values(name: str) -> None:
    lending, borrowing = LENDING[name]
    b, lender = borrower(borrowing), build(lending)
    counted = b.config.cost(TOKENS, torch.float32)
    assert counted.params == sum(p.numel() for p in b.parameters())
    assert counted.state_bytes == 0
    x, total = inputs(batch=1), 0
    state: State | None = lender.init_state(1, TOKENS, torch.float32)
    with torch.no_grad():
        for t in range(TOKENS):
            _, state, kv = lender.forward_lending(x[:, t : t + 1], state)
            with FlopCounterMode(display=False) as counter:
                b.forward_borrowing(x[:, t : t + 1], kv)
            total += counter.get_total_flops()
    assert total == pytest.approx(counted.flops_per_token * TOKENS, rel=1e-12)


def test_gradients_pass_to_the_lender() -> None:
    lender, b, x = build(), borrower(), inputs()
    b.forward_borrowing(x, lender.forward_lending(x)[2]).square().sum().backward()
    for parameter in (lender.entry.weight, b.entry.weight, b.exit.weight):
        assert parameter.grad is not None
        assert parameter.grad.abs().max() > 0
    assert lender.exit.weight.grad is None


@pytest.mark.parametrize(
    ("lending", "borrowing", "word"),
    [
        ({"kv_heads": 2}, {"kv_heads": 3}, "kv_heads=2 and the borrower kv_heads=3"),
        ({}, {"head_dim": 4}, "head_dim"),
        ({}, {"position": "none"}, "position"),
        ({}, {"rope_theta": 7.0}, "rope_theta"),
        ({"pattern": "sliding", "window": 8}, {}, "sees every token and the lender keeps 8"),
        (
            {"pattern": "sliding", "window": 8},
            {"pattern": "sliding", "window": 9},
            "sees 9 tokens and the lender keeps 8",
        ),
    ],
)
def test_what_does_not_fit_its_lender_gets_a_sentence(
    lending: dict[str, Gene], borrowing: dict[str, Gene], word: str
) -> None:
    problem = lending_problem(config(lending), config(borrowing, borrows=True))
    assert problem is not None
    assert word in problem


def test_only_attention_lends() -> None:
    primitive, genes = resolve("swiglu", {})
    mlp = primitive.configure(Site(WIDTH), genes)
    assert lending_problem(mlp, config()) == "only attention lends keys and values"
    assert lending_problem(config(), mlp) == "only attention borrows keys and values"
