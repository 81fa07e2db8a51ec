"""SPARSEK: the operator against its definition, the attention against a loop, both forms."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mendel.primitives.attention.running_topk import TIE, Held, running_best, sparsek
from mendel.primitives.attention.sparsek import SparseKAttention, SparseKConfig
from mendel.primitives.base import State
from mendel.primitives.position import ContextError
from mendel.primitives.rope import PLAIN

WIDTH, TOKENS = 24, 41
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
    "selected": 4,
}
CASES: dict[str, dict[str, Any]] = {
    "gqa": {},
    "rope-gate-bias": {
        "rope_theta": 100.0,
        "rope_channels": 6,
        "gate": "sigmoid",
        "bias": True,
        "kv_heads": 4,
    },
    "one": {"window": 1, "selected": 1, "kv_heads": 1},
    "wide-window": {"window": 30, "selected": 8},
    "window-of-all": {"window": 64},
    "many": {"window": 2, "selected": 37},
}


def build(dtype: torch.dtype = torch.float64, **changes: Any) -> SparseKAttention:
    torch.manual_seed(0)
    module = SparseKConfig(**{**COMMON, **changes}).build().to(dtype)
    with torch.no_grad():
        module.slope.copy_(torch.linspace(-0.02, 0.03, len(module.slope)))
    return module


def inputs(tokens: int = TOKENS, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, tokens, WIDTH, generator=generator, dtype=torch.float64)


def error(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()


def bisected(z: Tensor, k: int) -> Tensor:
    """SPARSEK of (C,) by its constraint: clamp(z - tau, 0, 1) with the sum k."""
    if len(z) <= k:
        return torch.ones_like(z)
    low, high = z.min() - 2, z.max() + 1
    for _ in range(64):
        middle = (low + high) / 2
        if (z - middle).clamp(0, 1).sum() > k:
            low = middle
        else:
            high = middle
    return (z - low).clamp(0, 1)


@pytest.mark.parametrize("scale", [1e-3, 0.3, 1.0, 30.0])
@pytest.mark.parametrize("k", [1, 3, 8])
def test_sparsek_is_its_constraint(k: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    for size in (1, 2, 5, 8, 9, 40):
        z = torch.randn(size, generator=generator, dtype=torch.float64) * scale
        expected = bisected(z, k)
        torch.testing.assert_close(sparsek(z, k), expected, rtol=0, atol=1e-12)
        absent = torch.cat((z[:1], torch.tensor([-torch.inf]), z[1:]))
        got = sparsek(absent, k)
        assert got[1] == 0
        torch.testing.assert_close(torch.cat((got[:1], got[2:])), expected, rtol=0, atol=1e-12)
        assert sparsek(z, k).sum() == pytest.approx(min(k, size))


@pytest.mark.parametrize(
    ("z", "k"), [([5.0, 4.0, 1.0, 0.0], 2), ([1.0, 1.0, 1.0], 2), ([0.0, 1.0, 2.0, 3.0], 1)]
)
def test_sparsek_at_ties_and_gaps(z: list[float], k: int) -> None:
    scores = torch.tensor(z, dtype=torch.float64)
    torch.testing.assert_close(sparsek(scores, k), bisected(scores, k), rtol=0, atol=1e-12)


def test_sparseks_gradient_is_that_of_its_definition() -> None:
    """dp_i/dz_j = [i = j] - 1/n among the n gates between 0 and 1, else 0; and the
    same by finite differences of the bisection."""
    z = torch.tensor([0.9, 0.1, 0.4, -0.3, 2.5, 0.55], dtype=torch.float64, requires_grad=True)
    p = sparsek(z, 3)
    between = (p > 0) & (p < 1)
    expected = torch.diag(between.double()) - torch.outer(between, between).double() / between.sum()
    jacobian = torch.stack([torch.autograd.grad(g, z, retain_graph=True)[0] for g in p])
    torch.testing.assert_close(jacobian, expected, rtol=0, atol=1e-12)
    step = 1e-5
    for j in range(len(z)):
        shift = torch.zeros_like(z)
        shift[j] = step
        moved = bisected((z + shift).detach(), 3) - bisected((z - shift).detach(), 3)
        torch.testing.assert_close(jacobian[:, j], moved / (2 * step), rtol=0, atol=1e-8)


def test_the_running_best_equals_sorting_every_prefix() -> None:
    """Over several pieces, from the middle too, with ties, which the earlier token wins."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(3, 150, generator=generator, dtype=torch.float64)
    # Some are equal but for a rounding: they rank by age.
    scores[:, 75:] = scores[:, :75] * (1 + 1e-15)
    names, k = torch.arange(150).expand(3, -1), 6
    none = torch.full((3, k), -torch.inf, dtype=torch.float64)
    start = Held(none[:, :0], none, torch.full((3, k), -1))
    best, _ = running_best(scores, names, start, k)
    _, middle = running_best(scores[:, :70], names[:, :70], start, k)
    rest, _ = running_best(scores[:, 70:], names[:, 70:], middle, k)
    assert torch.equal(rest.name, best.name[:, 70:])
    torch.testing.assert_close(rest.gate, best.gate[:, 70:], rtol=0, atol=1e-12)
    for row in range(3):
        for t in range(150):
            so_far = scores[row, : t + 1]
            ranked = sorted(range(t + 1), key=lambda s, z=so_far: (-round(z[s].item(), 9), s))  # type: ignore[misc]
            wanted, expected = ranked[:k], bisected(so_far, k)
            assert best.name[row, t, : len(wanted)].tolist() == wanted
            assert (best.name[row, t, len(wanted) :] == -1).all()
            gate = best.gate[row, t, : len(wanted)]
            torch.testing.assert_close(gate, expected[wanted], rtol=0, atol=1e-10)
    # What cannot come back is forgotten.
    assert middle.support.shape[1] < 40


def loop(module: SparseKAttention, x: Tensor) -> Tensor:
    """The attention by its words, one token and head at a time, in float64."""
    config = module.config
    mixed = x @ module.entry.weight.T
    if module.entry.bias is not None:
        mixed = mixed + module.entry.bias
    at = torch.arange(x.shape[1])
    u = x @ module.scorer.weight.T + at[:, None] * module.slope
    counts = [config.query_width, config.kv_width, config.kv_width, config.gate_width]
    q, k, v, gate = mixed.split(counts, -1)
    per_head = [t.reshape(*x.shape[:2], -1, config.head_dim) for t in (q, k, v)]
    if config.rope_channels:
        per_head[:2] = [turned(t, config.rope_theta) for t in per_head[:2]]
    q, k, v = per_head
    rows = []
    for b in range(x.shape[0]):
        for t in range(x.shape[1]):
            for h in range(config.heads):
                g = h * config.kv_heads // config.heads
                first = max(0, t - config.window + 1)
                near = (u[b, :, g] / TIE).round().tolist()
                ranked = sorted(range(first), key=lambda s, z=near: -z[s])  # type: ignore[misc]
                best = ranked[: config.selected]
                gates = _gates(u[b, :first, g], config.selected)[best]
                seen = [*best, *range(first, t + 1)]
                weights = (k[b, seen, g] @ q[b, t, h] / math.sqrt(config.head_dim)).softmax(0)
                factor = torch.cat((gates, torch.ones(t + 1 - first, dtype=x.dtype)))
                rows.append((weights * factor) @ v[b, seen, g])
    out = torch.stack(rows).view(*x.shape[:2], -1)
    if config.gate_width:
        out = out * torch.sigmoid(gate)
    out = out @ module.exit.weight.T
    return out if module.exit.bias is None else out + module.exit.bias


def _gates(z: Tensor, k: int) -> Tensor:
    """SPARSEK with its gradient, from the bisection's tau and the set between 0 and 1."""
    if len(z) <= k:
        return torch.ones_like(z)
    p = bisected(z.detach(), k)
    between, full = (p > 1e-12) & (p < 1 - 1e-12), p >= 1 - 1e-12
    if not between.any():
        return p
    tau = (z[between].sum() + full.sum() - k) / between.sum()
    return torch.where(between, z - tau, full.to(z.dtype))


def turned(x: Tensor, theta: float) -> Tensor:
    """RoPE on (B, T, H, K), pair by pair."""
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[1])[:, None, None] * theta ** (-torch.arange(half).double() / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), -1)


def decode(module: SparseKAttention, x: Tensor, pieces: list[int]) -> tuple[Tensor, State]:
    state: State | None = module.init_state(x.shape[0], x.shape[1], x.dtype)
    out = []
    for part in x.split(pieces, 1):
        y, state = module(part, state)
        out.append(y)
    assert state is not None
    return torch.cat(out, 1), state


@pytest.mark.parametrize("name", CASES)
def test_attention_is_its_formula(name: str) -> None:
    """Outputs and every gradient, the scorer's too."""
    module, x = build(**CASES[name]), inputs()
    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=x.dtype)
    out, wanted = module(x)[0], loop(module, x)
    assert error(out, wanted) < 1e-12
    module.zero_grad()
    (wanted * weight).sum().backward()
    theirs = {n: None if p.grad is None else p.grad.clone() for n, p in module.named_parameters()}
    module.zero_grad()
    (out * weight).sum().backward()
    for label, parameter in module.named_parameters():
        expected = theirs[label]
        if expected is None or parameter.grad is None:
            assert name == "window-of-all"
            assert label in ("scorer.weight", "slope")
            continue
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-9, atol=1e-10)
    if name == "gqa":
        assert module.scorer.weight.grad is not None
        assert module.scorer.weight.grad.abs().max() > 1e-3


@pytest.mark.parametrize(
    "pieces", [[1] * TOKENS, [TOKENS], [1, 9, 1, 30], [17, 24], [3, 2, 36]], ids=str
)
@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_any_split_equals_the_parallel_form(name: str, pieces: list[int]) -> None:
    module, x = build(**CASES[name]), inputs()
    split, state = decode(module, x, pieces)
    assert state.length == TOKENS
    assert error(split, module(x)[0]) < 1e-12


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_counted_cost_is_the_real_one(name: str) -> None:
    module = build(**CASES[name])
    for dtype in (torch.float64, torch.bfloat16):
        counted = module.config.cost(TOKENS, dtype)
        assert module.init_state(1, TOKENS, dtype).bytes() == counted.state_bytes
    counted = module.config.cost(TOKENS, torch.float64)
    assert counted.params == sum(p.numel() for p in module.parameters())
    with FlopCounterMode(display=False) as counter:
        _, state = decode(module, inputs(batch=1), [1] * TOKENS)
    assert counter.get_total_flops() == pytest.approx(counted.flops_per_token * TOKENS, rel=1e-12)
    assert state.bytes() == counted.state_bytes


def test_keys_of_a_long_context_are_those_of_window_and_selection() -> None:
    """Beyond them a token costs its score: 4 bytes per key-value head."""
    config = build().config
    difference = config.cost(5000, torch.bfloat16).state_bytes
    difference -= config.cost(4000, torch.bfloat16).state_bytes
    assert difference == 1000 * 4 * 2


def test_the_training_form_costs_what_its_pattern_costs() -> None:
    module, flops = build(torch.float32), []
    for tokens in (256, 512):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            module(inputs(tokens, 1).float())
        flops.append(counter.get_total_flops())
    assert flops[1] < 2.05 * flops[0]


def test_a_full_cache_refuses_one_token_more() -> None:
    module, x = build(), inputs()
    with torch.no_grad(), pytest.raises(ContextError, match="holds 40 tokens; this call needs 41"):
        module(x, module.init_state(2, TOKENS - 1, x.dtype))
