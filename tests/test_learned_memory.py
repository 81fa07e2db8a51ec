"""TTT's layers and Titans' memory against float64 loops written from the papers.

The loops go token by token, with autograd's gradient of the inner loss at the mini-batch's start,
one sequence and one head at a time. 1e-9 of the scale: the layer's own gradient is by hand and adds
in another order; float64 leaves that far above its rounding and far below a wrong term.
"""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mendel.kernels.backend import use_backend
from mendel.kernels.inner_model import Inner
from mendel.primitives.base import Gene, GeneError, Site
from mendel.primitives.catalogue import resolve
from mendel.primitives.memory.core import unpack
from mendel.primitives.memory.layer import MemoryLayer, MemoryLayerConfig

WIDTH = 24
TTT: dict[str, Gene] = {"heads": 2, "mini_batch": 5}


def config(name: str, width: int = WIDTH, **genes: Gene) -> MemoryLayerConfig:
    primitive, full = resolve(name, genes)
    made = primitive.configure(Site(width), full)
    assert isinstance(made, MemoryLayerConfig)
    return made


def build(name: str, width: int = WIDTH, **genes: Gene) -> MemoryLayer:
    """The layer in float64 with every parameter away from its start."""
    torch.manual_seed(0)
    module = config(name, width, **genes).build()
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return module.double()


def tokens(length: int, width: int = WIDTH, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, length, width, generator=generator, dtype=torch.float64)


def error(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()


def convolve(x: Tensor, taps: Tensor) -> Tensor:
    """x (T, D), taps (D, W): the last tap meets the token itself."""
    padded = torch.cat((torch.zeros_like(taps.T[1:]), x))
    return torch.stack([(padded[t : t + taps.shape[1]] * taps.T).sum(0) for t in range(len(x))])


def ttt_sequence(m: MemoryLayer, x: Tensor, depth: int) -> tuple[Tensor, list[list[Tensor]]]:
    """One sequence (T, D) through TTT (arXiv 2407.04620): f(x) = x + LN(f_res(x)), eq. 2-7, the
    rate eta_base sigmoid(theta_lr . x), mini-batches of 5; then norm, gate and projection."""
    core, heads, width = m.memory, 2, WIDTH // 2
    base = {1: 1.0, 2: 0.1}[depth]
    assert core.conv is not None
    shared, value, gates = (x @ core.in_proj.weight.T).split([WIDTH, WIDTH, heads], -1)
    query = convolve(shared, core.conv.weight[:WIDTH])
    key = convolve(shared, core.conv.weight[WIDTH:])
    reads, finals = [], []
    for head in range(heads):
        at = slice(head * width, (head + 1) * width)
        q, k, v, eta = query[:, at], key[:, at], value[:, at], base * torch.sigmoid(gates[:, head])
        assert core.norm_weight is not None
        assert core.norm_bias is not None
        gamma, beta = core.norm_weight[head], core.norm_bias[head]

        def f(weights: list[Tensor], row: Tensor, gamma=gamma, beta=beta) -> Tensor:  # type: ignore[no-untyped-def]
            h = row @ weights[0][:-1] + weights[0][-1]
            if depth == 2:
                h = 0.5 * h * (1 + torch.erf(h / 2**0.5))
                h = h @ weights[1][:-1] + weights[1][-1]
            h = (h - h.mean()) / (h.var(unbiased=False) + 1e-5).sqrt()
            return row + gamma * h + beta

        now = [w[head] for w in core.initial]
        read = []
        for t in range(len(x)):
            if t % 5 == 0:
                start = now
            loss = (f(start, k[t]) - v[t]).square().sum()
            slopes = torch.autograd.grad(loss, start, create_graph=True)
            now = [w - eta[t] * s for w, s in zip(now, slopes, strict=True)]
            read.append(f(now, q[t]))
        reads.append(torch.stack(read))
        finals.append(now)
    z = torch.cat(reads, -1)
    assert m.norm is not None
    assert m.gate_proj is not None
    z = (z - z.mean(-1, keepdim=True)) / (z.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    z = z * m.norm.weight + m.norm.bias
    g = x @ m.gate_proj.weight.T
    return (z * 0.5 * g * (1 + torch.erf(g / 2**0.5))) @ m.out_proj.weight.T, finals


def titans_sequence(m: MemoryLayer, x: Tensor, depth: int) -> tuple[Tensor, list[list[Tensor]]]:
    """One sequence (T, D) through Titans' memory (arXiv 2501.00663): surprise with momentum and
    forgetting, eq. 9-14, gradients at the batch's start, eq. 16, persistent tokens first."""
    core, chunk, taught = m.memory, 6, 3
    assert core.conv is not None
    assert m.persistent is not None
    assert core.momentum_bias is not None
    assert core.forget_bias is not None
    whole = torch.cat((m.persistent, x))
    mixed, gates = (whole @ core.in_proj.weight.T).split([3 * WIDTH, 3], -1)
    mixed = convolve(mixed, core.conv.weight)
    q, k, v = (mixed * torch.sigmoid(mixed)).split(WIDTH, -1)
    q, k, v = (t / (t.square().sum(-1, keepdim=True) + 1e-6).sqrt() for t in (q, k, v))
    theta = 0.5 / chunk * torch.sigmoid(gates[:, 0])
    eta = torch.sigmoid(gates[:, 1] + core.momentum_bias)
    alpha = torch.sigmoid(gates[:, 2] + core.forget_bias)

    def memory(weights: list[Tensor], row: Tensor) -> Tensor:
        for i, w in enumerate(weights):
            row = (row * torch.sigmoid(row) if i else row) @ w
        return row

    now = [w[0] for w in core.initial]
    surprise = [torch.zeros_like(w) for w in now]
    read = []
    for t in range(len(whole)):
        if t == 0 or (t >= taught and (t - taught) % chunk == 0):
            start = now
        loss = (memory(start, k[t]) - v[t]).square().sum()
        slopes = torch.autograd.grad(loss, start, create_graph=True)
        surprise = [eta[t] * s - theta[t] * d for s, d in zip(surprise, slopes, strict=True)]
        now = [(1 - alpha[t]) * w + s for w, s in zip(now, surprise, strict=True)]
        read.append(memory(now, q[t]))
    y = torch.stack(read[taught:])
    assert m.norm is not None
    assert m.gate_proj is not None
    y = y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt() * m.norm.weight
    g = x @ m.gate_proj.weight.T
    return (y * g * torch.sigmoid(g)) @ m.out_proj.weight.T, [now, surprise]


def compare(m: MemoryLayer, x: Tensor, reference: Tensor) -> None:
    """Outputs and the gradient of every parameter and of the input."""
    leaves = [x, *m.parameters()]
    cotangent = torch.randn(x.shape, generator=torch.Generator().manual_seed(3)).double()
    ours = m(x)[0]
    assert error(ours, reference) < 1e-9
    mine = torch.autograd.grad((ours * cotangent).sum(), leaves)
    theirs = torch.autograd.grad((reference * cotangent).sum(), leaves)
    for a, b in zip(mine, theirs, strict=True):
        assert b.abs().max() > 0
        assert error(a, b) < 1e-8


@pytest.mark.parametrize("length", [1, 4, 5, 23])
@pytest.mark.parametrize(("name", "depth"), [("ttt-linear", 1), ("ttt-mlp", 2)])
def test_ttt_is_the_loop_of_the_paper(name: str, depth: int, length: int) -> None:
    m = build(name, **TTT)
    x = tokens(length).requires_grad_()
    results = [ttt_sequence(m, row, depth) for row in x]
    compare(m, x, torch.stack([r[0] for r in results]))
    with torch.no_grad():
        state = m.init_state(2, length, x.dtype)
        for piece in x.split([length - length // 2, length // 2] if length > 1 else 1, 1):
            _, state = m(piece, state)
    learned, _ = unpack(state.tensors, depth)
    for i in range(depth):
        want = torch.stack([torch.stack([head[i] for head in r[1]]) for r in results])
        assert error(learned.now[i], want) < 1e-9


@pytest.mark.parametrize("length", [1, 6, 23])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_titans_is_the_loop_of_the_paper(depth: int, length: int) -> None:
    m = build("titans-lmm", depth=depth, mini_batch=6, persistent=3)
    x = tokens(length).requires_grad_()
    results = [titans_sequence(m, row, depth) for row in x]
    compare(m, x, torch.stack([r[0] for r in results]))
    with torch.no_grad():
        state = m.init_state(2, length, x.dtype)
        for piece in x.split([length - length // 2, length // 2] if length > 1 else 1, 1):
            _, state = m(piece, state)
    learned, _ = unpack(state.tensors, depth)
    assert learned.momentum is not None
    for i in range(depth):
        for held, part in ((learned.now, 0), (learned.momentum, 1)):
            want = torch.stack([r[1][part][i] for r in results])
            assert error(held[i][:, 0], want) < 1e-9


FORMS: list[dict[str, Gene]] = [
    {"form": form, "depth": depth, "momentum": momentum, "forget": forget, "bias": bias}
    for form, depth, bias in (
        ("plain", 1, False),
        ("plain", 3, True),
        ("residual", 2, False),
        ("residual-norm", 1, True),
    )
    for momentum in (False, True)
    for forget in (False, True)
]


@pytest.mark.parametrize("genes", FORMS, ids=str)
def test_the_dual_form_is_the_definition(genes: dict[str, Gene]) -> None:
    """Between the published points too, with the mean loss, gradients included."""
    m = build("learned-memory", heads=2, loss="mean", mini_batch=7, rate=0.2, **genes)
    x = tokens(17).requires_grad_()
    with use_backend("definition"):
        reference = m(x)[0]
    compare(m, x, reference)


def test_a_linear_memory_in_batches_of_one_is_the_delta_rule() -> None:
    """W_t = W - 2 theta k (k W - v), what DeltaNet does."""
    m = build("learned-memory", heads=1, mini_batch=1, rate=0.2, conv=0)
    x = tokens(9)
    with torch.no_grad():
        _, state = m(x, m.init_state(2, 9, x.dtype))
        seen, _ = m.memory.views(x, None)
    weight = m.memory.initial[0].detach()[0].expand(2, -1, -1)
    for t in range(9):
        k, v = seen.k[:, t, 0, :, None], seen.v[:, t, 0, None]
        weight = weight - 2 * seen.rate[:, t, :, None] * k @ (k.mT @ weight - v)
    assert error(state.tensors["now0"][:, 0], weight) < 1e-10


@pytest.mark.parametrize("name", ["ttt-linear", "ttt-mlp", "titans-lmm"])
def test_the_memory_learns(name: str) -> None:
    """Its inner loss on a repeated sequence falls: the second reading is predicted better."""
    m = build(name, 64)
    x = tokens(64, 64).repeat(1, 6, 1)
    with torch.no_grad():
        seen, _ = m.memory.views(x, None)
        learned, _ = m.memory.start(2, x.dtype, "cpu")
        seen.q = seen.k
        losses = []
        for t in range(0, 384, 64):
            piece = type(seen)(
                *(None if f is None else f[:, t : t + 64] for f in vars(seen).values())
            )
            before = m.memory.recall(piece.k, learned.now)
            losses.append((before - piece.v).square().sum(-1).mean().item())
            _, learned = m.memory.learn(piece, learned, 0)
    assert losses[-1] < 0.9 * losses[0], losses


@pytest.mark.parametrize("name", ["ttt-linear", "ttt-mlp", "titans-lmm"])
def test_8192_tokens_in_float32(name: str) -> None:
    """Rounding does not add up: float32 against float64 all along, both halves by a state."""
    m, x = build(name, 32), tokens(8192, 32, batch=1)
    with torch.no_grad():
        reference = m(x)[0]
        m = m.float()
        first, state = m(x[:, :4003].float(), m.init_state(1, 8192, torch.float32))
        second, state = m(x[:, 4003:].float(), state)
    assert state.length == 8192
    assert error(torch.cat((first, second), 1), reference) < 1e-4


@pytest.mark.parametrize("name", ["ttt-linear", "ttt-mlp", "titans-lmm"])
@pytest.mark.parametrize("gates", [-1e4, 1e4])
def test_extreme_gates(name: str, gates: float) -> None:
    """Rates, momentum and forgetting shut and open beyond what float32 tells from 0 and 1."""
    m = build(name).float()
    core = m.memory
    with torch.no_grad():
        core.in_proj.weight[-core.config.splits[1] :] = 0.0
        core.in_proj.weight[-core.config.splits[1] :, 0] = gates
    x = tokens(33).float()
    x[:, :, 0] = 1.0
    y = m(x)[0]
    y.square().sum().backward()
    assert y.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in m.parameters())


def test_the_same_token_for_ever_does_not_diverge() -> None:
    """Gradients of a batch of like tokens add up; the default rate keeps their step in bounds."""
    m = build("titans-lmm", 32).float()
    with torch.no_grad():
        _, state = m(tokens(1, 32).float().repeat(1, 2000, 1), m.init_state(2, 2000, torch.float32))
    assert max(state.tensors[f"now{i}"].abs().max().item() for i in range(2)) < 5


def test_long_values_overflow_a_plain_mlp_and_values_of_length_one_do_not() -> None:
    x = 1e4 * tokens(64, 32).float()
    torch.manual_seed(0)
    assert not config("titans-lmm", 32, v_norm="none", rate=0.1).build()(x)[0].isfinite().all()
    torch.manual_seed(0)
    assert config("titans-lmm", 32, rate=0.1).build()(x)[0].isfinite().all()


def test_cost_at_the_published_width() -> None:
    """TTT-Linear 1.3B: width 2048, 32 heads of 64; per head W0 and b0, twice in the state."""
    cost = config("ttt-linear", 2048).cost(2048, torch.bfloat16)
    assert cost.state_bytes == 2 * 32 * 65 * 64 * 4 + 2 * 2048 * 3 * 2
    products = 2048 * (2 * 2048 + 32) + 2 * 2048 * 2048
    assert cost.params == products + 2 * 2048 * 4 + 32 * 65 * 64 + 2 * 2048 + 2 * 2048
    assert cost.flops_per_token == 2 * (products + 2 * 2048 * 4 + 2 * 32 * 65 * 64)


def test_what_does_not_divide_is_refused() -> None:
    with pytest.raises(GeneError, match="does not divide"):
        config("ttt-linear", heads=5)
    with pytest.raises(GeneError, match="no whole number"):
        config("ttt-mlp", heads=2, expand=1.3)


def test_slopes_are_autograds() -> None:
    z = torch.linspace(-6, 6, 101, dtype=torch.float64).requires_grad_()
    for name, act in (("gelu", F.gelu), ("silu", F.silu)):
        inner = Inner("plain", name, False)  # type: ignore[arg-type]
        (slope,) = torch.autograd.grad(act(z).sum(), z)
        assert (inner.slope(z) - slope).abs().max() < 1e-12
