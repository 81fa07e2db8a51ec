"""Mega against a float64 loop written from the paper; tolerance 1e-10 of the output's scale."""

import math

import pytest
import torch
from torch import Tensor

from mendel.primitives.base import Gene, Site, State
from mendel.primitives.catalogue import resolve
from mendel.primitives.diagonal.chunk_attention import laplace
from mendel.primitives.diagonal.mega import Mega, MegaConfig
from mendel.primitives.position import ContextError

WIDTH = 16
CHUNK = 6
FUNCTIONS = ["softmax", "laplace", "none"]


def build(attention: str = "softmax", **genes: Gene) -> Mega:
    """The layer in float64 with every parameter away from its start."""
    primitive, full = resolve("mega", {"attention": attention, "chunk": CHUNK, "dims": 5, **genes})
    made = primitive.configure(Site(WIDTH), full)
    assert isinstance(made, MegaConfig)
    torch.manual_seed(0)
    module = made.build()
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return module.double()


def tokens(length: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, length, WIDTH, generator=generator, dtype=torch.float64)


def error(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def loop(ours: Mega, x: Tensor) -> tuple[Tensor, Tensor]:
    """Y and the averages' last state, token by token and key by key.

    The damped average of section 3.1, Z, queries, keys, values and gates of section 3.2, the
    attention functions of section 3.3 and the chunks of section 3.4.
    """
    c, ema = ours.config, ours.average
    alpha, delta = sigmoid(ema.alpha), sigmoid(ema.delta)
    h = torch.zeros(x.shape[0], WIDTH, c.dims, dtype=x.dtype)
    parts = [w.T for w in ours.in_proj.weight.split(c.splits)]
    biases = ours.in_proj.bias.split(c.splits)
    keys: list[Tensor] = []
    values: list[Tensor] = []
    out = []
    for t in range(x.shape[1]):
        h = alpha * ema.beta * x[:, t, :, None] + (1 - alpha * delta) * h
        averaged = (ema.eta * h).sum(-1)
        z, gamma, phi, candidate = (averaged @ w + b for w, b in zip(parts, biases, strict=True))
        phi = sigmoid(phi)
        if ours.attention is not None:
            att, place = ours.attention, t % c.chunk
            if place == 0:
                keys, values = [], []
            z = silu(z)
            keys.append(att.scales[1] * z + (att.shifts[1] if c.attention == "laplace" else 0))
            values.append(silu(x[:, t] @ ours.value.weight.T + ours.value.bias))
            q = att.scales[0] * z + att.shifts[0]
            scores = [(q * k).sum(-1) for k in keys]
            if c.attention == "softmax":
                scores = [s / math.sqrt(c.key_dim) for s in scores]
                scores = [s + att.bias[place - i] for i, s in enumerate(scores)]
                total = sum((torch.exp(s) for s in scores), start=torch.zeros(()))
                weights = [torch.exp(s) / total for s in scores]
            else:
                scores = [s / len(keys) + att.bias[place - i] for i, s in enumerate(scores)]
                mean, deviation = math.sqrt(0.5), math.sqrt(1 / (4 * math.pi))
                weights = [
                    0.5 * (1 + torch.erf((s - mean) / (deviation * math.sqrt(2)))) for s in scores
                ]
            o = sum((w[:, None] * v for w, v in zip(weights, values, strict=True)), start=0 * gamma)
            candidate = candidate + (silu(gamma) * o) @ ours.back.weight.T
        out.append(phi * silu(candidate) + (1 - phi) * x[:, t])
    return torch.stack(out, 1), h


@pytest.mark.parametrize("length", [1, 5, 6, 7, 29])
@pytest.mark.parametrize("attention", FUNCTIONS)
def test_mega_is_the_loop_of_the_paper(attention: str, length: int) -> None:
    """With the slot's residual the layer is the paper's Y; the gradient of every parameter too."""
    ours = build(attention)
    x = tokens(length).requires_grad_()
    reference, _ = loop(ours, x)
    mine = x + ours(x)[0]
    assert error(mine, reference) < 1e-10
    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=x.dtype)
    named = {"x": x, **dict(ours.named_parameters())}
    found = torch.autograd.grad((mine * weight).sum(), named.values())
    right = torch.autograd.grad((reference * weight).sum(), named.values(), allow_unused=True)
    for label, a, b in zip(named, found, right, strict=True):
        assert b is not None
        assert (a - b).norm() <= 1e-9 * b.norm() + 1e-12, label


@pytest.mark.parametrize(
    "pieces", [[1] * 29, [29], [5, 1, 6, 17], [6, 6, 17], [13, 16], [28, 1], [7, 2, 2, 2, 16]]
)
@pytest.mark.parametrize("attention", FUNCTIONS)
def test_split_anywhere_equals_the_loop(attention: str, pieces: list[int]) -> None:
    """Calls that end before, at and behind the ends of chunks; the averages' state."""
    ours, x = build(attention), tokens(29)
    with torch.no_grad():
        reference, h = loop(ours, x)
        state: State | None = ours.init_state(2, 29, x.dtype)
        out = []
        for part in x.split(pieces, 1):
            y, state = ours(part, state)
            out.append(part + y)
    assert error(torch.cat(out, 1), reference) < 1e-10
    assert state is not None
    ema = ours.average
    held = state.tensors["average"] * sigmoid(ema.alpha) * ema.beta
    assert error(held, h) < 1e-10


def test_laplace_follows_the_squared_relu() -> None:
    """Equal value and slope at sqrt(1/2), which is what fixes mean and deviation."""
    x = torch.tensor(math.sqrt(0.5), dtype=torch.float64, requires_grad=True)
    value = laplace(x)
    (slope,) = torch.autograd.grad(value, x)
    assert value.item() == pytest.approx(x.item() ** 2, abs=1e-12)
    assert slope.item() == pytest.approx(2 * x.item(), abs=1e-12)


@pytest.mark.parametrize("alpha", [-1e4, 1e4])
@pytest.mark.parametrize("delta", [-1e4, 1e4])
def test_extreme_averages(alpha: float, delta: float) -> None:
    """Nothing written, nothing forgotten, all forgotten: finite, gradients too, as the loop."""
    ours = build("laplace").float()
    with torch.no_grad():
        ours.average.alpha.fill_(alpha)
        ours.average.delta.fill_(delta)
    x = tokens(200)
    y = ours(x.float())[0]
    y.square().sum().backward()
    assert y.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in ours.parameters())
    with torch.no_grad():
        assert error(x + y.double(), loop(ours.double(), x)[0]) < 1e-4


@pytest.mark.parametrize("attention", FUNCTIONS)
@pytest.mark.parametrize("scale", [0.0, 1e4])
def test_extreme_inputs(attention: str, scale: float) -> None:
    ours = build(attention).float()
    x = (tokens(20) * scale).float().requires_grad_()
    y = ours(x)[0]
    y.sum().backward()
    assert y.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in ours.parameters())


@pytest.mark.parametrize("attention", FUNCTIONS)
def test_float32_keeps_its_digits_over_8192_tokens(attention: str) -> None:
    """Slow averages over 8,192 tokens: sums of 8,192 terms of 2^-24 err by 1e-5 at worst."""
    ours = build(attention, chunk=64)
    with torch.no_grad():
        ours.average.alpha.sub_(4)
        ours.average.delta.sub_(4)
    x = tokens(8192)[:1]
    with torch.no_grad():
        right = ours(x)[0]
        assert error(ours.float()(x.float())[0], right) < 2e-5


def test_a_cache_shorter_than_a_chunk_refuses_more_tokens() -> None:
    ours = build()
    _, state = ours(tokens(3), ours.init_state(2, 4, torch.float64))
    with pytest.raises(ContextError, match="holds 4 tokens; this call needs 5"):
        ours(tokens(2), state)
