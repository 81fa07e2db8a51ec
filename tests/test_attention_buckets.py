"""Attention within hashed buckets and within clusters: transformers, float64 loops, both forms."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import ReformerConfig
from transformers.models.reformer.modeling_reformer import LSHSelfAttention

from mendel.genome.build import build as language_model
from mendel.genome.notation import parse
from mendel.primitives.attention.bucketed import BucketedAttention, BucketedConfig
from mendel.primitives.attention.hashed import HashedAttention, HashedConfig, attend_in_chunks
from mendel.primitives.attention.routing import DECAY, RoutingAttention, RoutingConfig
from mendel.primitives.base import BidirectionalError, State
from mendel.primitives.position import ContextError
from mendel.primitives.rope import PLAIN

WIDTH, HEADS, TOKENS = 24, 3, 41
COMMON: dict[str, Any] = {
    "width": WIDTH,
    "heads": HEADS,
    "kv_heads": HEADS,
    "head_dim": 8,
    "rope_theta": 0.0,
    "rope_channels": 0,
    "rope_form": PLAIN,
    "gate": "none",
    "bias": False,
    "causal": True,
}
ROPE = {"rope_theta": 100.0, "rope_channels": 8}


def hashed(**changes: Any) -> HashedConfig:
    return HashedConfig(**{**COMMON, "buckets": 4, "size": 5, "rounds": 2, **changes})


def routing(**changes: Any) -> RoutingConfig:
    return RoutingConfig(**{**COMMON, "buckets": 4, "size": 5, **changes})


CASES: dict[str, BucketedConfig] = {
    "lsh": hashed(),
    "lsh-rope-gate-bias": hashed(**ROPE, gate="sigmoid", bias=True, rounds=3),
    "lsh-one-round": hashed(rounds=1, size=1, buckets=2),
    "lsh-many-buckets": hashed(buckets=300, rounds=1),
    "routing": routing(),
    "routing-rope-gate": routing(**ROPE, gate="sigmoid", bias=True, size=7),
    "routing-itself": routing(size=1),
    "routing-all": routing(buckets=1, size=100),
}
BOTH_WAYS = {"lsh": hashed(causal=False), "routing": routing(causal=False)}


def build(config: BucketedConfig, dtype: torch.dtype = torch.float64) -> BucketedAttention:
    torch.manual_seed(0)
    assert isinstance(config, HashedConfig | RoutingConfig)
    return config.build().to(dtype)


def inputs(tokens: int = TOKENS, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, tokens, WIDTH, generator=generator, dtype=torch.float64)


def error(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()


def decode(module: BucketedAttention, x: Tensor, pieces: list[int]) -> tuple[Tensor, State]:
    state: State | None = module.init_state(x.shape[0], x.shape[1], x.dtype)
    out = []
    for part in x.split(pieces, 1):
        y, state = module(part, state)
        out.append(y)
    assert state is not None
    return torch.cat(out, 1), state


def loop(module: BucketedAttention, x: Tensor) -> Tensor:
    """The causal form by its words, one token, head and round at a time, in float64."""
    config, rows = module.config, []
    entry, bias = module.entry.weight, module.entry.bias
    mixed = x @ entry.T + (0 if bias is None else bias)
    width = config.query_width
    for b in range(x.shape[0]):
        heads = []
        for h in range(config.heads):
            span = slice(h * config.head_dim, (h + 1) * config.head_dim)
            shared = mixed[b, :, :width][:, span]
            if config.rope_channels:
                shared = turned(shared, config.rope_theta)
            values = mixed[b, :, width : 2 * width][:, span]
            if isinstance(module, HashedAttention):
                # k = q / |q|, with the epsilon that transformers adds to the mean square.
                square = (shared**2).mean(-1, keepdim=True)
                keys = shared / (square + 1e-6).sqrt() / math.sqrt(config.head_dim)
                queries = shared
                buckets = []
                for r in range(config.rounds):
                    columns = module.rotations[h].view(config.head_dim, config.rounds, -1)[:, r]
                    products = keys @ columns
                    buckets.append(torch.cat((products, -products), -1).argmax(-1))
            else:
                assert isinstance(module, RoutingAttention)
                mean, variance = shared.mean(-1, keepdim=True), shared.var(-1, False, keepdim=True)
                keys = (shared - mean) / (variance + 1e-5).sqrt()
                queries = keys / math.sqrt(config.head_dim)
                buckets = [(keys @ module.centroids[h].T).argmax(-1)]
            out = []
            for t in range(x.shape[1]):
                rounds = []
                for bucket in buckets:
                    same = [s for s in range(t) if bucket[s] == bucket[t]]
                    if isinstance(module, HashedAttention):
                        rounds.append(same[-config.size :])
                    else:
                        rounds.append([*same, t][-config.size :])
                seen = [s for members in rounds for s in members]
                if not seen:
                    seen = [t]
                # A key of several rounds stands in the one softmax several times.
                scores = torch.stack([queries[t] @ keys[s] for s in seen])
                out.append(scores.softmax(0) @ values[seen])
            heads.append(torch.stack(out))
        rows.append(torch.cat(heads, -1))
    total = torch.stack(rows)
    if config.gate == "sigmoid":
        total = total * torch.sigmoid(mixed[..., 2 * width :])
    total = total @ module.exit.weight.T
    return total if module.exit.bias is None else total + module.exit.bias


def turned(x: Tensor, theta: float) -> Tensor:
    """RoPE on (T, K), pair by pair."""
    half = x.shape[-1] // 2
    angle = torch.arange(len(x))[:, None] * theta ** (-torch.arange(half).double() / half)
    a, b = x[:, :half], x[:, half:]
    return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), -1)


@pytest.mark.parametrize("name", CASES)
def test_the_causal_form_is_its_definition(name: str) -> None:
    module, x = build(CASES[name]), inputs()
    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=x.dtype)
    wanted = loop(module, x)
    parameters = list(module.parameters())
    theirs = torch.autograd.grad((wanted * weight).sum(), parameters)
    got, none = module(x)
    assert none is None
    assert error(got, wanted) < 1e-12
    for a, b in zip(torch.autograd.grad((got * weight).sum(), parameters), theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("pieces", [[1] * TOKENS, [TOKENS], [1, 9, 1, 30], [17, 24]], ids=str)
@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_any_split_equals_the_parallel_form(name: str, pieces: list[int]) -> None:
    module, x = build(CASES[name]), inputs()
    split, state = decode(module, x, pieces)
    assert state.length == TOKENS
    assert error(split, module(x)[0]) < 1e-12


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_counted_cost_is_the_real_one(name: str) -> None:
    module, counted = build(CASES[name]), CASES[name].cost(TOKENS, torch.float64)
    assert counted.params == sum(p.numel() for p in module.parameters())
    with FlopCounterMode(display=False) as counter:
        _, state = decode(module, inputs(batch=1), [1] * TOKENS)
    assert counter.get_total_flops() == pytest.approx(counted.flops_per_token * TOKENS, rel=1e-12)
    assert state.bytes() == counted.state_bytes


@pytest.mark.parametrize("name", ["lsh", "routing"])
def test_the_training_form_costs_what_its_pattern_costs(name: str) -> None:
    """Products of a long sequence grow with its length, not with its square."""
    config = hashed(buckets=8, size=16) if name == "lsh" else routing(buckets=8, size=16)
    module, flops = build(config, torch.float32), []
    for tokens in (512, 1024):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            module(inputs(tokens, 1).float())
        flops.append(counter.get_total_flops())
    assert flops[1] < 2 * flops[0]


def test_a_full_cache_refuses_one_token_more() -> None:
    module, x = build(CASES["lsh"]), inputs()
    with torch.no_grad(), pytest.raises(ContextError, match="holds 40 tokens; this call needs 41"):
        module(x, module.init_state(2, TOKENS - 1, x.dtype))


@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize("tokens", [8, 24, 40])
@torch.no_grad()
def test_the_published_form_is_reformers(rounds: int, tokens: int) -> None:
    """Whole chunks, as transformers wants them; 8 tokens are one chunk, which is not hashed."""
    theirs = LSHSelfAttention(_settings(rounds, False), 0).eval()
    module = build(hashed(causal=False, size=8, buckets=6, rounds=rounds), torch.float32)
    assert isinstance(module, HashedAttention)
    x = inputs(tokens).float()
    module.entry.weight.copy_(torch.cat((theirs.query_key.weight, theirs.value.weight)))
    module.exit.weight.copy_(torch.eye(WIDTH))
    torch.manual_seed(5)
    module.rotations.copy_(torch.randn(HEADS, 8, rounds, 3).flatten(2))
    expected = theirs(x).hidden_states
    assert error(module(x)[0], expected) < 1e-5


def _settings(rounds: int, decoder: bool) -> ReformerConfig:
    torch.manual_seed(3)
    return ReformerConfig(
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        attention_head_size=8,
        num_hashes=rounds,
        num_buckets=6,
        lsh_attn_chunk_length=8,
        hash_seed=5,
        is_decoder=decoder,
    )


def test_reformers_gradients() -> None:
    """transformers' backward pass of the sort runs in training mode; it has no dropout here."""
    theirs = LSHSelfAttention(_settings(2, False), 0).train()
    module = build(hashed(causal=False, size=8, buckets=6, rounds=2), torch.float32)
    x = inputs(40).float()
    with torch.no_grad():
        module.entry.weight.copy_(torch.cat((theirs.query_key.weight, theirs.value.weight)))
        module.exit.weight.copy_(torch.eye(WIDTH))
        torch.manual_seed(5)
        module.get_buffer("rotations").copy_(torch.randn(HEADS, 8, 2, 3).flatten(2))
    module(x)[0].square().sum().backward()
    theirs(x).hidden_states.square().sum().backward()
    assert module.entry.weight.grad is not None
    expected = torch.cat([p.weight.grad for p in (theirs.query_key, theirs.value)])  # type: ignore[misc]
    assert error(module.entry.weight.grad, expected) < 1e-5


@torch.no_grad()
def test_a_sequence_without_whole_chunks_sees_no_filling() -> None:
    """The filling of the last chunk never counts: with all tokens in one bucket, a token sees its
    chunk and the one before, the first the last, and no more."""
    generator = torch.Generator().manual_seed(0)
    q, v = (torch.randn(1, 11, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    k = q / q.norm(dim=-1, keepdim=True)
    out, _ = attend_in_chunks(q, k, v, torch.zeros(1, 1, 11, dtype=torch.int64), 2, 4)
    seen = {0: [0, 1, 2, 3, 8, 9, 10], 1: list(range(8)), 2: list(range(4, 11))}
    for t in range(11):
        keys = [s for s in seen[t // 4] if s != t]
        expected = (k[0, keys] @ q[0, t]).softmax(0) @ v[0, keys]
        torch.testing.assert_close(out[0, 0, t], expected, rtol=1e-12, atol=1e-12)


def test_published_routing_is_its_loop() -> None:
    """Algorithm 1 of the paper without its causal branch, cluster by cluster."""
    module, x = build(BOTH_WAYS["routing"]).eval(), inputs()
    assert isinstance(module, RoutingAttention)
    config = module.config
    q, k, v = (x @ module.entry.weight.T).unflatten(-1, (3, HEADS, 8)).unbind(2)
    normed = [torch.nn.functional.layer_norm(t, (8,)) for t in (q, k)]
    expected = torch.zeros_like(v)
    for b in range(2):
        for h in range(HEADS):
            for centroid in module.centroids[h]:
                places = []
                for t in normed:
                    near = (t[b, :, h] @ centroid).tolist()
                    ranked = sorted(range(TOKENS), key=lambda s, near=near: -near[s])  # type: ignore[misc]
                    places.append(ranked[: config.size])
                for i in places[0]:
                    scores = normed[1][b, places[1], h] @ normed[0][b, i, h] / math.sqrt(8)
                    expected[b, i, h] += scores.softmax(0) @ v[b, places[1], h]
    assert error(module(x)[0], expected.flatten(2) @ module.exit.weight.T) < 1e-12


@pytest.mark.parametrize("name", BOTH_WAYS)
def test_the_published_forms_read_the_whole_sequence(name: str) -> None:
    module, x = build(BOTH_WAYS[name]), inputs(30).requires_grad_()
    with pytest.raises(BidirectionalError):
        module.init_state(1, 8, torch.float64)
    with pytest.raises(BidirectionalError):
        module(x, State())
    for tokens in (1, 3, 30):
        counted = BOTH_WAYS[name].cost(tokens, torch.float64)
        assert counted.state_bytes == 0
        assert counted.params == sum(p.numel() for p in module.parameters())
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            module(x[:1, :tokens].detach())
        assert counter.get_total_flops() == pytest.approx(counted.flops_per_token * tokens)
    module(x)[0].square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in module.parameters())


def test_a_models_step_moves_the_centroids() -> None:
    model = language_model(parse("{width=32} routing-attention > swiglu")).train()
    name = next(n for n, _ in model.named_buffers() if n.endswith("centroids"))
    before = model.state_dict()[name].clone()
    model(torch.randint(256, (2, 9)))
    assert torch.equal(model.state_dict()[name], before)
    model.after_step()
    assert not torch.equal(model.state_dict()[name], before)


@pytest.mark.parametrize("causal", [True, False])
def test_centroids_move_to_their_vectors_after_a_step_of_training(causal: bool) -> None:
    module = build(routing(causal=causal))
    assert isinstance(module, RoutingAttention)
    x, before = inputs(), module.centroids.clone()
    vectors = (x @ module.entry.weight.T).unflatten(-1, (-1, HEADS, 8))
    # Causal: the shared vectors; else queries and keys.
    used = [torch.nn.functional.layer_norm(vectors[:, :, i], (8,)) for i in range(2 - causal)]
    expected = before.clone()
    for h in range(HEADS):
        rows = torch.cat([t[:, :, h].flatten(0, 1) for t in used])
        nearest = (rows @ before[h].T).argmax(-1)
        for c in range(4):
            if (nearest == c).any():
                moved = DECAY * before[h, c] + (1 - DECAY) * rows[nearest == c].mean(0)
                expected[h, c] = moved / moved.norm() * 8**0.5
    module.eval()(x)
    module.balance()
    assert torch.equal(module.centroids, before), "evaluation moves nothing"
    module.train()(x)
    assert torch.equal(module.centroids, before)
    module.balance()
    torch.testing.assert_close(module.centroids, expected, rtol=1e-12, atol=1e-12)
    assert not torch.equal(module.centroids, before)
    moved_once = module.centroids.clone()
    module.balance()
    assert torch.equal(module.centroids, moved_once), "nothing was counted since"
