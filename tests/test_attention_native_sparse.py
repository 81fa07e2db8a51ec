"""Native sparse attention against a loop over the paper's equations, and its two forms."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mendel.primitives.attention.native_sparse import (
    Compress,
    NativeSparseAttention,
    NativeSparseConfig,
)
from mendel.primitives.base import GeneError, Site, State
from mendel.primitives.catalogue import resolve
from mendel.primitives.position import ContextError
from mendel.primitives.rope import PLAIN

WIDTH, TOKENS = 24, 61
COMMON: dict[str, Any] = {
    "width": WIDTH,
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 6,
    "rope_theta": 0.0,
    "rope_channels": 0,
    "rope_form": PLAIN,
    "gate": "none",
    "bias": False,
    "window": 5,
    "block": 4,
    "selected": 4,
    "compress": 4,
    "stride": 2,
}
CASES: dict[str, dict[str, Any]] = {
    "gqa": {},
    "rope-gate-bias": {
        "rope_theta": 100.0,
        "rope_channels": 6,
        "gate": "sigmoid",
        "bias": True,
        "kv_heads": 1,
    },
    "equal-blocks": {"compress": 4, "stride": 4, "selected": 3, "kv_heads": 4},
    "long-overlap": {"compress": 8, "stride": 2, "block": 6},
    "single-tokens": {"compress": 1, "stride": 1, "block": 2, "selected": 5, "window": 1},
    "paper-ratios": {"compress": 4, "stride": 2, "block": 8, "window": 64},
    "all-blocks": {"selected": 40},
}


def build(dtype: torch.dtype = torch.float64, **changes: Any) -> NativeSparseAttention:
    torch.manual_seed(0)
    return NativeSparseConfig(**{**COMMON, **changes}).build().to(dtype)


def inputs(tokens: int = TOKENS, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, tokens, WIDTH, generator=generator, dtype=torch.float64)


def error(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()


def decode(module: NativeSparseAttention, x: Tensor, pieces: list[int]) -> tuple[Tensor, State]:
    state: State | None = module.init_state(x.shape[0], x.shape[1], x.dtype)
    out = []
    for part in x.split(pieces, 1):
        y, state = module(part, state)
        out.append(y)
    assert state is not None
    return torch.cat(out, 1), state


def phi(mlp: Compress, block: Tensor) -> Tensor:
    """(l, K) to (K,)."""
    flat = torch.cat(list(block + mlp.place))
    hidden = F.gelu(mlp.entry.weight @ flat + mlp.entry.bias)
    out: Tensor = mlp.exit.weight @ hidden + mlp.exit.bias
    return out


def turned(x: Tensor, theta: float) -> Tensor:
    """RoPE on (T, K), pair by pair."""
    half = x.shape[-1] // 2
    angle = torch.arange(len(x))[:, None] * theta ** (-torch.arange(half).double() / half)
    a, b = x[:, :half], x[:, half:]
    return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), -1)


def loop(module: NativeSparseAttention, x: Tensor) -> Tensor:
    """One sequence (T, D), one token, group and head at a time, in float64."""
    c = module.config
    mixed = x @ module.entry.weight.T
    if module.entry.bias is not None:
        mixed = mixed + module.entry.bias
    counts = [c.query_width, *[c.kv_width] * 6, c.gate_width]
    q, ck, cv, sk, sv, wk, wv, gate = mixed.split(counts, -1)
    branch = torch.sigmoid(x @ module.mix.weight.T)
    queries_per_group, scale = c.heads // c.kv_heads, math.sqrt(c.head_dim)
    columns: dict[int, list[Tensor]] = {h: [] for h in range(c.heads)}
    for g in range(c.kv_heads):
        span = slice(g * c.head_dim, (g + 1) * c.head_dim)
        heads = range(g * queries_per_group, (g + 1) * queries_per_group)
        own = {h: q[:, h * c.head_dim : (h + 1) * c.head_dim] for h in heads}
        keys, near = sk[:, span], wk[:, span]
        rotated = own
        if c.rope_channels:
            keys, near = turned(keys, c.rope_theta), turned(near, c.rope_theta)
            rotated = {h: turned(t, c.rope_theta) for h, t in own.items()}
        firsts = range(0, len(x) - c.compress + 1, c.stride)
        blocks = [slice(i, i + c.compress) for i in firsts]
        coarse_k = [phi(module.compress_keys, ck[b, span]) for b in blocks]
        coarse_v = [phi(module.compress_values, cv[b, span]) for b in blocks]
        for t in range(len(x)):
            ended = [i for i, b in enumerate(blocks) if b.stop - 1 <= t]
            importance = [0.0] * (t // c.block + 1)
            far = {}
            for h in heads:
                if not ended:
                    far[h] = torch.zeros(c.head_dim, dtype=x.dtype)
                    continue
                scores = torch.stack([coarse_k[i] @ own[h][t] / scale for i in ended])
                p = scores.softmax(0)
                far[h] = p @ torch.stack([coarse_v[i] for i in ended])
                # Equation 9 with j from 0: block j begins at compressed block (l' / d) j.
                for j in range(len(importance)):
                    for m in range(c.block // c.stride):
                        for n in range(c.compress // c.stride):
                            i = c.block // c.stride * j + m - n
                            if 0 <= i < len(ended):
                                importance[j] += p[i].item()
            always = {0, t // c.block, max(t // c.block - 1, 0)}
            rest = sorted(set(range(len(importance))) - always, key=lambda j: -importance[j])
            chosen = sorted([*always, *rest[: max(0, c.selected - len(always))]])
            seen = [s for j in chosen for s in range(j * c.block, (j + 1) * c.block) if s <= t]
            window = list(range(max(0, t - c.window + 1), t + 1))
            for h in heads:
                fine = (keys[seen] @ rotated[h][t] / scale).softmax(0) @ sv[seen, span]
                local = (near[window] @ rotated[h][t] / scale).softmax(0) @ wv[window, span]
                a, b, d = (branch[t, i * c.heads + h] for i in range(3))
                columns[h].append(a * far[h] + b * fine + d * local)
    out = torch.cat([torch.stack(columns[h]) for h in range(c.heads)], -1)
    if c.gate_width:
        out = out * torch.sigmoid(gate)
    out = out @ module.exit.weight.T
    return out if module.exit.bias is None else out + module.exit.bias


@pytest.mark.parametrize("name", CASES)
def test_it_is_its_equations(name: str) -> None:
    """Outputs and gradients of every parameter."""
    module, x = build(**CASES[name]), inputs()
    wanted = torch.stack([loop(module, one) for one in x])
    out = module(x)[0]
    assert error(out, wanted) < 1e-12
    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=x.dtype)
    parameters = list(module.parameters())
    theirs = torch.autograd.grad((wanted * weight).sum(), parameters)
    ours = torch.autograd.grad((out * weight).sum(), parameters)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
        assert b.abs().max() > 0


@pytest.mark.parametrize(
    "pieces", [[1] * TOKENS, [TOKENS], [1, 9, 1, 50], [27, 34], [3, 2, 2, 54]], ids=str
)
@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_any_split_equals_the_parallel_form(name: str, pieces: list[int]) -> None:
    module, x = build(**CASES[name]), inputs()
    split, state = decode(module, x, pieces)
    assert state.length == TOKENS
    assert error(split, module(x)[0]) < 1e-12


@pytest.mark.parametrize("tokens", [1, 3, 8, 60, TOKENS])
@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_counted_cost_is_the_real_one(name: str, tokens: int) -> None:
    module = build(**CASES[name])
    counted = module.config.cost(tokens, torch.float64)
    assert counted.params == sum(p.numel() for p in module.parameters())
    with FlopCounterMode(display=False) as counter:
        _, state = decode(module, inputs(tokens, 1), [1] * tokens)
    assert counter.get_total_flops() == pytest.approx(counted.flops_per_token * tokens, rel=1e-12)
    assert state.bytes() == counted.state_bytes


def test_the_cache_holds_all_branches() -> None:
    """Keys and values of 6 channels in 2 heads: all tokens, 499 compressed, 3 pending, 5 near."""
    counted = build().config.cost(1000, torch.bfloat16).state_bytes
    assert counted == 2 * 2 * 6 * 2 * (1000 + 499 + 3 + 5)


def test_selected_tokens_are_few() -> None:
    """The selected branch of a long sequence reads n blocks per query, not all."""
    few, many = (build(selected=n, block=4).config.cost(4096, torch.float32) for n in (4, 8))
    # Four blocks of four tokens, all heads, keys and values; less in the first blocks.
    more = (many.flops_per_token - few.flops_per_token) / (2 * 2 * 24)
    assert 15.5 < more < 16


def test_heads_of_a_group_read_the_same_blocks() -> None:
    module, x = build(), inputs()
    seen: list[Tensor] = []
    choose = module.choose

    def spy(importance: Tensor) -> Tensor:
        seen.append(choose(importance))
        return seen[-1]

    module.choose = spy  # type: ignore[method-assign]
    module(x)
    assert seen[0].shape == (2, 2, TOKENS, 4)
    assert not torch.equal(seen[0][:, 0], seen[0][:, 1]), "groups choose for themselves"


def test_a_full_cache_refuses_one_token_more() -> None:
    module, x = build(), inputs()
    with torch.no_grad(), pytest.raises(ContextError, match="holds 60 tokens; this call needs 61"):
        module(x, module.init_state(2, TOKENS - 1, x.dtype))


@pytest.mark.parametrize(
    ("name", "genes", "sentence"),
    [
        ("nsa", {"compress_stride": 3}, "compress_stride=3 does not divide block=16"),
        ("nsa", {"compress": 10}, "compress_stride=4 does not divide compress=10"),
        ("nsa", {"selected": 2}, "selected=2 is less"),
        ("nsa", {"causal": False}, "causal=true, not false"),
        ("nsa", {"position": "alibi"}, "not alibi"),
        ("nsa", {"score": "sigmoid"}, "score=softmax, not sigmoid"),
        ("sparsek", {"causal": False}, "causal=true, not false"),
        ("sparsek", {"qk_norm": True}, "qk_norm=false, not true"),
        ("reformer-lsh", {"buckets": 5}, "buckets=5 is odd"),
        ("reformer-lsh", {"kv_heads": 2}, "kv_heads=2 is not heads=4"),
        ("routing-attention", {"kv_heads": 1}, "kv_heads=1 is not heads=4"),
        ("routing-attention", {"conv": 3}, "conv=0, not 3"),
        ("reformer-lsh", {"sink_logits": True}, "sink_logits=false, not true"),
    ],
)
def test_genes_that_do_not_go_together_get_a_sentence(
    name: str, genes: dict[str, Any], sentence: str
) -> None:
    primitive, full = resolve(name, genes)
    with pytest.raises(GeneError, match=sentence):
        primitive.configure(Site(64), full)


@pytest.mark.parametrize("name", ["nsa", "sparsek", "reformer-lsh", "routing-attention"])
def test_they_borrow_nothing(name: str) -> None:
    primitive, full = resolve(name, {})
    with pytest.raises(GeneError, match="borrows no keys and values"):
        primitive.configure(Site(64, borrows=True), full)
