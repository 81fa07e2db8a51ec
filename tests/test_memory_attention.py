"""Titans' memory as a gate and as a context against float64 loops written from the paper.

Token by token over lists of past keys, the inner gradient by autograd. Tolerances as in
test_learned_memory.py.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mendel.primitives.base import Gene, GeneError, Site
from mendel.primitives.catalogue import resolve
from mendel.primitives.memory.beside import BesideConfig, MemoryContext, MemoryGate
from mendel.primitives.position import ContextError

WIDTH, HEADS, HEAD = 24, 2, 12
TAUGHT, CHUNK, WINDOW = 3, 5, 4


def config(name: str, width: int = WIDTH, **genes: Gene) -> BesideConfig:
    primitive, full = resolve(name, genes)
    made = primitive.configure(Site(width, "rope"), full)
    assert isinstance(made, BesideConfig)
    return made


def build(name: str, **genes: Gene) -> MemoryGate | MemoryContext:
    """The layer in float64 with every parameter away from its start."""
    torch.manual_seed(0)
    small: dict[str, Gene] = {
        "attention_heads": HEADS,
        "persistent": TAUGHT,
        "mini_batch": CHUNK,
        "window": WINDOW,
        "rate": 0.1,
    }
    module = config(name, **(small | genes)).build()
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return module.double()


def tokens(length: int, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, length, WIDTH, generator=generator, dtype=torch.float64)


def error(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()


def swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean() + 1e-6).sqrt() * weight


def turned(row: Tensor, position: int) -> Tensor:
    """RoPE of a head's row: channel i with channel i + 6, as complex numbers."""
    pairs = torch.complex(row[: HEAD // 2], row[HEAD // 2 :])
    angle = position * 10000.0 ** (-2 * torch.arange(HEAD // 2, dtype=torch.float64) / HEAD)
    pairs = pairs * torch.exp(1j * angle)
    return torch.cat((pairs.real, pairs.imag))


class Surprise:
    """Titans' memory of one head, one token at a time (arXiv 2501.00663, eq. 9-16)."""

    def __init__(self, m: MemoryGate | MemoryContext) -> None:
        self.core = m.memory
        self.now = [w[0] for w in self.core.initial]
        self.start = self.now
        self.surprise = [torch.zeros_like(w) for w in self.now]
        assert self.core.conv is not None
        self.taps = self.core.conv.weight
        self.past = [torch.zeros(3 * WIDTH, dtype=torch.float64)] * (self.taps.shape[1] - 1)

    @staticmethod
    def unit(row: Tensor) -> Tensor:
        return row / (row.square().sum() + 1e-6).sqrt()

    @staticmethod
    def recall(weights: list[Tensor], row: Tensor) -> Tensor:
        return swish(row @ weights[0]) @ weights[1]

    def query(self, row: Tensor) -> Tensor:
        """Without a convolution."""
        return self.unit(swish(self.core.in_proj.weight[:WIDTH] @ row))

    def learn(self, row: Tensor) -> Tensor:
        core = self.core
        assert core.momentum_bias is not None
        assert core.forget_bias is not None
        mixed, gates = (core.in_proj.weight @ row).split([3 * WIDTH, 3])
        window = [*self.past, mixed]
        self.past = window[1:]
        mixed = swish(sum(self.taps[:, i] * x for i, x in enumerate(window)))
        q, k, v = (self.unit(part) for part in mixed.split(WIDTH))
        theta = 0.1 * torch.sigmoid(gates[0])
        eta = torch.sigmoid(gates[1] + core.momentum_bias[0])
        alpha = torch.sigmoid(gates[2] + core.forget_bias[0])
        # Views: k and v are data, though in MAC they come from what these weights recalled.
        weights = [w.view_as(w) for w in self.start]
        loss = (self.recall(weights, k) - v).square().sum()
        slopes = torch.autograd.grad(loss, weights, create_graph=True)
        self.surprise = [eta * s - theta * d for s, d in zip(self.surprise, slopes, strict=True)]
        self.now = [(1 - alpha) * w + s for w, s in zip(self.now, self.surprise, strict=True)]
        return self.recall(self.now, q)


def attention(
    m: MemoryGate | MemoryContext, row: Tensor, position: int, seen: list[tuple[Tensor, int]]
) -> Tensor:
    """One query over the persistent tokens (unturned) and over tokens with their positions."""
    q = m.q_proj.weight @ row
    assert m.persistent is not None
    out = []
    for head in range(HEADS):
        at = slice(head * HEAD, (head + 1) * HEAD)
        scores, values = [], []
        for p in m.persistent:
            k, v = (m.kv_proj.weight @ p).chunk(2)
            scores.append(q[at] @ k[at] / HEAD**0.5)
            values.append(v[at])
        for token, place in seen:
            k, v = (m.kv_proj.weight @ token).chunk(2)
            scores.append(turned(q[at], position) @ turned(k[at], place) / HEAD**0.5)
            values.append(v[at])
        weights = torch.stack(scores).exp()
        out.append((weights / weights.sum()) @ torch.stack(values))
    return torch.cat(out)


def joined(m: MemoryGate | MemoryContext, y: Tensor, read: Tensor) -> Tensor:
    gate = torch.sigmoid(rms(read, m.memory_norm.weight))  # type: ignore[arg-type]
    return m.out_proj.weight @ (rms(y, m.attention_norm.weight) * gate)  # type: ignore[arg-type]


def gate_sequence(m: MemoryGate | MemoryContext, x: Tensor) -> tuple[Tensor, Surprise]:
    """MAG: o = y * M(x') with x' = [p || x], y in a sliding window (section 4.2)."""
    memory, out = Surprise(m), []
    assert m.persistent is not None
    for p in m.persistent:
        memory.learn(p)
    for t, row in enumerate(x):
        if t % CHUNK == 0:
            memory.start = memory.now
        near = [(x[s], s) for s in range(max(0, t - WINDOW + 1), t + 1)]
        out.append(joined(m, attention(m, row, t, near), memory.learn(row)))
    return torch.stack(out), memory


def context_sequence(m: MemoryGate | MemoryContext, x: Tensor) -> tuple[Tensor, Surprise]:
    """MAC: h from the memory before the segment, y = Attn([p || h || x]), o = y * M(y)."""
    memory, out = Surprise(m), []
    for t, row in enumerate(x):
        place = t % CHUNK
        if place == 0:
            memory.start = memory.now
            seen: list[tuple[Tensor, int]] = []
        h = memory.recall(memory.start, memory.query(row))
        seen += [(h, place), (row, place)]
        y = attention(m, row, place, seen)
        out.append(joined(m, y, memory.learn(y)))
    return torch.stack(out), memory


Loop = Callable[[MemoryGate | MemoryContext, Tensor], tuple[Tensor, Surprise]]
LOOPS: dict[str, Loop] = {"titans-mag": gate_sequence, "titans-mac": context_sequence}


@pytest.mark.parametrize("length", [2, 5, 18])
@pytest.mark.parametrize("name", LOOPS)
def test_it_is_the_loop_of_the_paper(name: str, length: int) -> None:
    m = build(name)
    x = tokens(length).requires_grad_()
    results = [LOOPS[name](m, row) for row in x]
    reference = torch.stack([r[0] for r in results])
    ours = m(x)[0]
    assert error(ours, reference) < 1e-9
    cotangent = torch.randn(x.shape, generator=torch.Generator().manual_seed(3)).double()
    leaves = dict(m.named_parameters()) | {"x": x}
    mine = torch.autograd.grad((ours * cotangent).sum(), [*leaves.values()])
    theirs = torch.autograd.grad((reference * cotangent).sum(), [*leaves.values()])
    for label, a, b in zip(leaves, mine, theirs, strict=True):
        assert b.abs().max() > 0, label
        assert error(a, b) < 1e-8, label
    with torch.no_grad():
        state = m.init_state(2, length, x.dtype)
        for piece in x.split([length - length // 2, length // 2], 1):
            _, state = m(piece, state)
    for i in range(2):
        for part in ("now", "momentum"):
            held = [r[1].now[i] if part == "now" else r[1].surprise[i] for r in results]
            assert error(state.tensors[f"{part}{i}"][:, 0], torch.stack(held)) < 1e-9


@pytest.mark.parametrize("pieces", [[23], [7, 16], [1] * 23, [3, 1, 9, 10]], ids=str)
@pytest.mark.parametrize("genes", [{"persistent": 0}, {"position": "none"}, {"window": 64}])
@pytest.mark.parametrize("name", LOOPS)
def test_any_split(name: str, genes: dict[str, Gene], pieces: list[int]) -> None:
    m, x = build(name, **genes), tokens(23)
    with torch.no_grad():
        state, parts = m.init_state(2, 23, x.dtype), []
        for piece in x.split(pieces, 1):
            y, state = m(piece, state)
            parts.append(y)
        assert error(torch.cat(parts, 1), m(x)[0]) < 1e-10


@pytest.mark.parametrize("context", [1, 4, 5, 11, 30])
@pytest.mark.parametrize("name", LOOPS)
def test_costs_at_any_context(name: str, context: int) -> None:
    """Segments and windows that the context cuts: FLOPs and bytes of real decoding."""
    m = build(name)
    x = tokens(context, batch=1)
    state = m.init_state(1, context, x.dtype)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        for t in range(context):
            _, state = m(x[:, t : t + 1], state)
    cost = m.config.cost(context, torch.float64)
    assert counter.get_total_flops() == pytest.approx(cost.flops_per_token * context, rel=1e-12)
    assert state.bytes() == cost.state_bytes


@pytest.mark.parametrize("name", LOOPS)
def test_8192_tokens_in_float32(name: str) -> None:
    torch.manual_seed(0)
    m = config(name, 32, attention_heads=2).build().double()
    x = torch.randn(1, 8192, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        reference = m(x)[0]
        m = m.float()
        first, state = m(x[:, :4003].float(), m.init_state(1, 8192, torch.float32))
        second, state = m(x[:, 4003:].float(), state)
    assert error(torch.cat((first, second), 1), reference) < 1e-4


@pytest.mark.parametrize("name", [*LOOPS, "titans-lmm", "ttt-linear", "ttt-mlp", "hope-cms"])
def test_autocast_rounds_the_projections_and_not_the_memory(name: str) -> None:
    """bfloat16 has 8 bits: outputs within a few roundings, the weights that are learned float32."""
    primitive, full = resolve(name, {})
    torch.manual_seed(0)
    m = primitive.configure(Site(64), full).build()
    x = torch.randn(2, 70, 64, generator=torch.Generator().manual_seed(1))
    reference = m(x)[0]
    with torch.autocast("cpu", torch.bfloat16):
        y, state = m(x, m.init_state(2, 70, torch.float32))
    assert error(y, reference) < 2e-2
    assert {t.dtype for t in state.tensors.values()} == {torch.float32}


def test_the_gate_reaches_beyond_its_window_and_the_context_beyond_its_segment() -> None:
    for name in LOOPS:
        m, x = build(name), tokens(20).requires_grad_()
        (gradient,) = torch.autograd.grad(m(x)[0][:, 19].square().sum(), x)
        assert gradient[:, 0].abs().max() > 0


def test_what_does_not_go_together_is_refused() -> None:
    with pytest.raises(GeneError, match="turns pairs of channels"):
        config("titans-mag", 30, attention_heads=2)
    assert config("titans-mag", 30, attention_heads=2, position="none").rope_theta == 0
    with pytest.raises(GeneError, match="does not divide"):
        config("titans-mac", attention_heads=5)


def test_a_window_longer_than_the_cache_is_not_forgotten_in_silence() -> None:
    m = build("titans-mag", window=16)
    state = m.init_state(2, 8, torch.float64)
    with pytest.raises(ContextError, match="holds 8 tokens"):
        m(tokens(9), state)
