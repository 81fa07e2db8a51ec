"""Hyena against the direct sums of its paper, its filters, and the long convolution by pieces.

Tolerances: 1e-10 of the scale in float64. In float32 an FFT of n numbers errs by about
log2(n) 2^-24 of the largest; 1e-5 leaves a factor of ten at 8,192 tokens.
"""

import math

import pytest
import torch
from torch import Tensor

from mendel.kernels.backend import use_backend
from mendel.kernels.long_conv import long_conv
from mendel.primitives.base import Gene, GeneError, Site
from mendel.primitives.catalogue import resolve
from mendel.primitives.convolution.hyena import Hyena, HyenaConfig, HyenaState
from mendel.primitives.position import ContextError

WIDTH = 16
GENES: list[dict[str, Gene]] = [
    {},
    {"order": 1, "taps": 4, "length": 20, "bands": 3},
    {"order": 3, "length": 300, "frequency": 1.0, "slow": 0.0, "filter_layers": 1},
]


def config(width: int = WIDTH, **genes: Gene) -> HyenaConfig:
    primitive, full = resolve("hyena", genes)
    made = primitive.configure(Site(width), full)
    assert isinstance(made, HyenaConfig)
    return made


def build(**genes: Gene) -> Hyena:
    torch.manual_seed(0)
    return config(**genes).build()


def tokens(length: int, dtype: torch.dtype = torch.float64, width: int = WIDTH) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, length, width, generator=generator, dtype=torch.float64).to(dtype)


def error(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()


def tap(module: Hyena, order: int, t: int) -> Tensor:
    """h^n_t for all channels: the paper's section 3.3, one position at a time."""
    c = module.config
    place = t / c.length
    features = [place]
    features += [math.cos(2 * math.pi * k * place) for k in range(1, c.bands + 1)]
    features += [math.sin(2 * math.pi * k * place) for k in range(1, c.bands + 1)]
    h = torch.tensor(features, dtype=torch.float64)
    weights = dict(module.filters.named_parameters())
    for i in range(c.filter_layers):
        h = torch.sin(
            c.frequency * (weights[f"layers.{i}.weight"] @ h + weights[f"layers.{i}.bias"])
        )
    h = weights["last.weight"][order * c.width : (order + 1) * c.width] @ h
    steps = torch.arange(c.width, dtype=torch.float64) / (c.width - 1)
    return h * torch.exp(-(c.slow + (c.fast - c.slow) * steps) * place)


def by_the_formula(module: Hyena, x: Tensor) -> Tensor:
    """Definition 3.1 with direct sums."""
    c, (batch, length, width) = module.config, x.shape
    mixed = x @ module.in_proj.weight.T
    streams = []
    for t in range(length):
        s = torch.zeros_like(mixed[:, 0])
        for back in range(min(c.taps, t + 1)):
            s = s + module.conv.weight[:, c.taps - 1 - back] * mixed[:, t - back]
        streams.append(s)
    z = [s[:, :width] for s in streams]
    for n in range(c.order):
        h = [tap(module, n, t) for t in range(length)]
        new = []
        for t in range(length):
            total = torch.zeros(batch, width, dtype=x.dtype)
            for s in range(t + 1):
                total = total + h[t - s] * z[s]
            new.append(streams[t][:, (n + 1) * width : (n + 2) * width] * total)
        z = new
    return torch.stack(z, 1) @ module.out_proj.weight.T


@pytest.mark.parametrize("genes", GENES, ids=str)
def test_it_is_its_definition(genes: dict[str, Gene]) -> None:
    """Outputs and every gradient, over several pieces of the fast form."""
    module, x = build(**genes).double(), tokens(150)
    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    results = []
    for form in (lambda v: module(v)[0], lambda v: by_the_formula(module, v)):
        module.zero_grad()
        leaf = x.clone().requires_grad_()
        y = form(leaf)
        (y * weight).sum().backward()
        results.append([y, leaf.grad, *(p.grad for p in module.parameters())])
    for got, wanted in zip(*results, strict=True):
        assert got is not None
        assert wanted is not None
        assert error(got, wanted) < 1e-10


@pytest.mark.parametrize("genes", GENES, ids=str)
@torch.no_grad()
def test_steps_are_the_definition_and_the_state_is_the_inputs(genes: dict[str, Gene]) -> None:
    module, x = build(**genes).double(), tokens(40)
    wanted = by_the_formula(module, x)
    state = module.init_state(2, 50, torch.float64)
    parts = []
    for t in range(40):
        y, state = module(x[:, t : t + 1], state)
        parts.append(y)
    assert error(torch.cat(parts, 1), wanted) < 1e-10
    held = state.tensors["inputs"]
    assert held.shape == (2, module.config.order, WIDTH, 50)
    assert held[..., 40:].abs().max() == 0
    prefilled = module(x, module.init_state(2, 50, torch.float64))[1]
    assert error(prefilled.tensors["inputs"], held) < 1e-10
    assert error(prefilled.tensors["conv"], state.tensors["conv"]) < 1e-10


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 127, 128, 129, 300])
def test_the_long_convolution_is_its_definition(length: int) -> None:
    generator = torch.Generator().manual_seed(length)
    u = torch.randn(2, length, 5, generator=generator, dtype=torch.float64)
    taps = torch.randn(5, length + 7, generator=generator, dtype=torch.float64)
    weight = torch.randn(u.shape, generator=generator, dtype=torch.float64)
    results = []
    for backend in ("chunked", "definition"):
        leaves = [t.clone().requires_grad_() for t in (u, taps)]
        with use_backend(backend):  # type: ignore[arg-type]
            y = long_conv(*leaves)
        (y * weight).sum().backward()
        results.append([y, *(leaf.grad for leaf in leaves)])
    for got, wanted in zip(*results, strict=True):
        assert got is not None
        assert wanted is not None
        assert error(got, wanted) < 1e-12


@torch.no_grad()
def test_later_tokens_change_no_bit_of_earlier_outputs() -> None:
    """Large numbers right behind a token, infinity and nan from the next piece on."""
    module = build().eval()
    x = tokens(333, torch.float32)
    poisoned = x.clone()
    poisoned[:, 200:] = torch.tensor([torch.inf, torch.nan] * (WIDTH // 2))
    generator = torch.Generator().manual_seed(5)
    taps = torch.randn(WIDTH, 333, generator=generator)
    assert torch.equal(long_conv(poisoned, taps)[:, :128], long_conv(x, taps)[:, :128])
    late = x.clone()
    late[:, 200:] = 1e6
    assert torch.equal(module(late)[0][:, :200], module(x)[0][:, :200])


@torch.no_grad()
def test_8192_tokens_in_float32() -> None:
    module, x = build(length=256), tokens(8192, torch.float32)
    single = module(x)[0]
    assert single.isfinite().all()
    assert error(single, module.double()(x.double())[0]) < 1e-5


@torch.no_grad()
def test_filters_of_extreme_decays() -> None:
    """Without decay and with one that leaves the first tap alone."""
    still = build(slow=0.0, fast=0.0, length=64).double().filters(4096)
    assert still.isfinite().all()
    assert still[..., -64:].abs().max() > 0.1 * still[..., :64].abs().max()
    gone = build(slow=1000.0, fast=1000.0, length=1).double().filters(4096)
    assert gone[..., 0].abs().max() > 0
    assert gone[..., 1:].abs().max() == 0


@torch.no_grad()
def test_filters_start_with_energy_near_1() -> None:
    taps = build().filters(4096)
    energy = taps.square().sum(-1)
    assert 0.5 < energy.mean().item() < 2.0


def test_a_clone_keeps_the_filters() -> None:
    module, x = build().double(), tokens(9)
    with torch.no_grad():
        _, state = module(x[:, :8], module.init_state(2, 9, torch.float64))
        assert isinstance(state, HyenaState)
        copy = state.clone()
        assert copy.bytes() == state.bytes()
        first, _ = module(x[:, 8:], state)
        again, _ = module(x[:, 8:], copy)
    assert torch.equal(first, again)


def test_a_full_cache_is_refused() -> None:
    module = build()
    with torch.no_grad():
        _, state = module(tokens(5, torch.float32), module.init_state(2, 5, torch.float32))
        with pytest.raises(ContextError, match="cache of Hyena holds 5 tokens; this call needs 6"):
            module(tokens(1, torch.float32), state)


def test_slow_above_fast_is_refused() -> None:
    with pytest.raises(GeneError, match="slow=5 is more than fast=2"):
        config(slow=5.0, fast=2.0)


def test_bytes_grow_with_the_context() -> None:
    made = config(512, order=2)
    short, long = (made.cost(n, torch.bfloat16).state_bytes for n in (1000, 3000))
    assert short == (2 * 1000 + 3 * 2) * 512 * 2
    assert long - short == 2000 * 2 * 512 * 2
