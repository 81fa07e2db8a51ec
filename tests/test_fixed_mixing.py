"""FNet and MLP-Mixer's token mixing against transformers' layers and against their formulas.

Tolerances as in test_hyena.py. The causal forms are this project's; their formulas stand in the
docstrings of fourier.py and token_mlp.py, and the loops here are written from those.
"""

import cmath
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import FNetConfig, PatchTSMixerConfig
from transformers.models.fnet.modeling_fnet import FNetBasicFourierTransform
from transformers.models.patchtsmixer.modeling_patchtsmixer import PatchTSMixerMLP

from mendel.primitives.base import BidirectionalError, Config, Gene, Site, State
from mendel.primitives.catalogue import resolve
from mendel.primitives.convolution.token_mlp import CausalTokenMlp, TokenMlp
from mendel.primitives.position import ContextError

WIDTH = 12


def config(name: str, width: int = WIDTH, **genes: Gene) -> Config:
    primitive, full = resolve(name, genes)
    return primitive.configure(Site(width), full)


def build(name: str, **genes: Gene) -> nn.Module:
    torch.manual_seed(0)
    module = config(name, **genes).build()
    for parameter in module.parameters():
        if parameter.abs().max() == 0:
            nn.init.normal_(parameter)
    return module


def tokens(length: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, length, WIDTH, generator=generator, dtype=torch.float64).to(dtype)


def error(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()


def decode(module: nn.Module, x: Tensor, pieces: list[int]) -> tuple[Tensor, State]:
    state = module.init_state(x.shape[0], x.shape[1], x.dtype)  # type: ignore[operator]
    outputs = []
    for part in x.split(pieces, 1):
        y, state = module(part, state)
        outputs.append(y)
    return torch.cat(outputs, 1), state


@pytest.mark.parametrize("length", [1, 2, 37, 130])
def test_fnet_is_the_layer_of_transformers(length: int) -> None:
    ours = build("fnet")
    theirs = FNetBasicFourierTransform(FNetConfig(hidden_size=WIDTH))
    mine, yours = (tokens(length, torch.float32).requires_grad_() for _ in range(2))
    y, (reference,) = ours(mine)[0], theirs(yours)
    assert error(y, reference) < 1e-5
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    (y * cotangent).sum().backward()
    (reference * cotangent).sum().backward()
    assert mine.grad is not None
    assert yours.grad is not None
    assert error(mine.grad, yours.grad) < 1e-5
    scaled = build("fnet", scale="orthonormal")(mine)[0]
    assert error(scaled, reference / math.sqrt(length * WIDTH)) < 1e-5


def causal_fnet(x: Tensor, period: int) -> Tensor:
    """Re sum_{s <= t} sum_c exp(-2 pi i (t s / N + d c / D)) x_{s,c}, number by number."""
    batch, length, width = x.shape
    rows = []
    for t in range(length):
        total = torch.zeros(batch, width, dtype=torch.complex128)
        for s in range(t + 1):
            wave = cmath.exp(-2j * math.pi * ((t * s) % period) / period)
            for c in range(width):
                over = [cmath.exp(-2j * math.pi * d * c / width) for d in range(width)]
                total = (
                    total + wave * torch.tensor(over, dtype=torch.complex128) * x[:, s, c : c + 1]
                )
        rows.append(total.real)
    return torch.stack(rows, 1)


@pytest.mark.parametrize("period", [1, 7, 64, 512])
def test_causal_fnet_is_its_formula(period: int) -> None:
    """Shorter and longer than the period; over more than one piece of the convolution."""
    x = tokens(70)
    wanted = causal_fnet(x, period)
    module = build("causal-fnet", period=period, scale="none")
    assert error(module(x)[0], wanted) < 1e-10
    for pieces in ([1] * 70, [70], [5, 40, 1, 24]):
        y, state = decode(module, x, pieces)
        assert error(y, wanted) < 1e-10
        sums = state.tensors["sums"]
        folded = torch.zeros_like(sums)
        for s in range(70):
            folded[:, s % period] += x[:, s]
        assert error(sums, folded) < 1e-12
    counts = torch.arange(1, 71).double() * WIDTH
    scaled = build("causal-fnet", period=period)(x)[0]
    assert error(scaled, wanted / counts.sqrt()[:, None]) < 1e-10


def test_the_last_token_of_a_period_is_fnets() -> None:
    """Only the last token sees the whole period; there the published transform agrees."""
    x = tokens(16)
    causal = build("causal-fnet", period=16, scale="none")(x)[0]
    assert error(causal[:, -1], build("fnet")(x)[0][:, -1]) < 1e-12


@torch.no_grad()
def test_8192_tokens_in_float32() -> None:
    for name in ("fnet", "causal-fnet"):
        module, x = build(name), tokens(8192)
        assert error(module(x.float())[0], module(x)[0]) < 1e-5


def test_a_fourier_state_never_exceeds_the_period() -> None:
    made = config("causal-fnet", 64, period=100)
    assert made.cost(30, torch.bfloat16).state_bytes == 30 * 64 * 4
    assert made.cost(10_000, torch.bfloat16).state_bytes == 100 * 64 * 4
    module = build("causal-fnet")
    with pytest.raises(ContextError, match="holds 5 tokens; this call needs 6"):
        module(tokens(6), module.init_state(2, 5, torch.float64))  # type: ignore[operator]


def test_bidirectional_forms_have_no_state() -> None:
    for name in ("fnet", "mlp-mixer"):
        module = build(name)
        with pytest.raises(BidirectionalError):
            module.init_state(1, 8, torch.float32)  # type: ignore[operator]
        with pytest.raises(BidirectionalError):
            module(tokens(3), State())


@pytest.mark.parametrize("units", [1, 2])
def test_mixer_is_the_mlp_of_transformers(units: int) -> None:
    """PatchTSMixer's MLP over the tokens of a sequence as long as the tables."""
    ours = build("mlp-mixer", length=20, units=units)
    assert isinstance(ours, TokenMlp)
    theirs = PatchTSMixerMLP(20, 20, PatchTSMixerConfig(expansion_factor=units, dropout=0.0))
    theirs.fc1.load_state_dict(ours.entry.state_dict())
    theirs.fc2.load_state_dict(ours.exit.state_dict())
    x = tokens(20, torch.float32)
    cotangent = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    y, reference = ours(x)[0], theirs(x.mT).mT
    assert error(y, reference) < 1e-5
    (y * cotangent).sum().backward()
    (reference * cotangent).sum().backward()
    for mine, yours in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert mine.grad is not None
        assert yours.grad is not None
        assert error(mine.grad, yours.grad) < 1e-5


@pytest.mark.parametrize("length", [1, 5, 19])
def test_a_shorter_sequence_takes_the_first_rows(length: int) -> None:
    ours = build("mlp-mixer", length=20, activation="silu").double()
    assert isinstance(ours, TokenMlp)
    x = tokens(length)
    padded = torch.zeros(2, 20, WIDTH, dtype=torch.float64)
    padded[:, :length] = x
    assert error(ours(x)[0], ours(padded)[0][:, :length]) < 1e-12


def triangular(module: CausalTokenMlp, x: Tensor) -> Tensor:
    """Pair by pair, the tables read from their packed rows."""
    c, (batch, length, width) = module.config, x.shape
    act = {"gelu": F.gelu, "relu2": lambda v: v.clamp_min(0) ** 2}[c.activation]

    def at(t: int, s: int) -> int:
        return sum(range(1, t + 1)) + s

    hidden, rows = [], []
    for t in range(length):
        units = []
        for u in range(c.units):
            total = torch.zeros(batch, width, dtype=x.dtype) + module.entry_bias[t, u]
            for s in range(t + 1):
                total = total + module.entry[at(t, s), u] * x[:, s]
            units.append(act(total))
        hidden.append(units)
    for t in range(length):
        total = torch.zeros(batch, width, dtype=x.dtype) + module.exit_bias[t]
        for j in range(t + 1):
            for u in range(c.units):
                total = total + module.exit[at(t, j), u] * hidden[j][u]
        rows.append(total)
    return torch.stack(rows, 1)


@pytest.mark.parametrize("activation", ["gelu", "relu2"])
@pytest.mark.parametrize("units", [1, 3])
def test_the_triangular_mlp_is_its_formula(units: int, activation: str) -> None:
    """Outputs, every gradient, and the steps."""
    module = build("causal-mixer", length=25, units=units, activation=activation).double()
    assert isinstance(module, CausalTokenMlp)
    x = tokens(22)
    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    results = []
    for form in (lambda v: module(v)[0], lambda v: triangular(module, v)):
        module.zero_grad()
        leaf = x.clone().requires_grad_()
        y = form(leaf)
        (y * weight).sum().backward()
        results.append([y.detach(), leaf.grad, *(p.grad for p in module.parameters())])
    for got, wanted in zip(*results, strict=True):
        assert got is not None
        assert wanted is not None
        assert error(got, wanted) < 1e-10
    with torch.no_grad():
        for pieces in ([1] * 22, [22], [5, 1, 16]):
            y, state = decode(module, x, pieces)
            assert error(y, results[1][0]) < 1e-10  # type: ignore[arg-type]
            assert torch.equal(state.tensors["x"], x)


def test_a_table_ends() -> None:
    sentence = "the token-mixing MLP serves 8 tokens; this call needs 9"
    for name in ("mlp-mixer", "causal-mixer"):
        with pytest.raises(ContextError, match=sentence):
            build(name, length=8).double()(tokens(9))
    module = build("causal-mixer", length=8).double()
    assert isinstance(module, CausalTokenMlp)
    with torch.no_grad():
        _, state = module(tokens(8), module.init_state(2, 100, torch.float64))
        with pytest.raises(ContextError, match=sentence):
            module(tokens(1), state)
        with pytest.raises(ContextError, match="holds 4 tokens; this call needs 5"):
            module(tokens(5), module.init_state(2, 4, torch.float64))


def test_cost_of_mixer_b16() -> None:
    """Mixer B/16 (table 1): 196 tokens, width 768; 392 hidden units here, 384 published."""
    cost = config("mlp-mixer", 768, length=196).cost(196, torch.bfloat16)
    assert cost.params == 2 * 196 * 392 + 196 + 392
    causal = config("causal-mixer", 768, length=196)
    assert causal.cost(196, torch.bfloat16).params == 2 * 2 * 196 * 197 // 2 + 2 * 196 + 196
    assert causal.cost(9999, torch.bfloat16).state_bytes == 3 * 196 * 768 * 2
