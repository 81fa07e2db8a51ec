"""RWKV-7 against a float64 loop written from the paper; tolerance as in test_recurrence.py."""

import math

import pytest
import torch
from flop_count import counter as flop_counter
from torch import Tensor
from torch.nn import functional as F

from mendel.genome.build import build as build_model
from mendel.genome.check import TOLERANCE, difference
from mendel.genome.cost import cost
from mendel.genome.notation import parse
from mendel.primitives.base import Carry, Gene, Site
from mendel.primitives.catalogue import resolve
from mendel.primitives.recurrence.rwkv7 import Rwkv7, Rwkv7Config
from mendel.primitives.recurrent_parts import PIECE, is_long

LENGTH = 21


def build(**genes: Gene) -> Rwkv7:
    """The layer in float64 with every parameter away from its start."""
    primitive, full = resolve("rwkv7", genes)
    made = primitive.configure(Site(64), full)
    assert isinstance(made, Rwkv7Config)
    torch.manual_seed(0)
    module = made.build()
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return module.double()


def tokens(length: int = LENGTH) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, length, 64, generator=generator, dtype=torch.float64)


def error(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()


def loop(ours: Rwkv7, x: Tensor, first: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Output, last state and values by arXiv 2503.14456, eq. 2-18, with the state as (values, keys)
    as it is written there. `first` are the values of the first layer."""
    assert ours.shift is not None
    before = torch.cat((torch.zeros_like(x[:, :1]), x[:, :-1]), 1)
    mixed = [x + (before - x) * mu for mu in ours.shift.mix]
    c = ours.config
    rows = ours.in_proj.weight.split([64, 64, 64 + c.value_rank, c.rank, c.rank, c.gate_rank])
    r, k, v, d, a, g = (m @ w.T for m, w in zip(mixed, rows, strict=True))
    if ours.value is not None:
        v, low = v[..., :64], v[..., 64:]
        assert first is not None
        v = v + (first - v) * torch.sigmoid(low @ ours.value.weight.T + ours.value.bias)
    values = v
    d = torch.tanh(d) @ ours.decay.weight.T + ours.decay.bias
    w = torch.exp(-math.exp(-0.5) * torch.sigmoid(d))
    a = torch.sigmoid(a @ ours.rate.weight.T + ours.rate.bias)
    g = torch.sigmoid(g) @ ours.gate.weight.T
    kappa = k * ours.removal
    k = k * (1 + (a - 1) * ours.mixing)
    r, k, v, w, a, kappa = (t.view(2, LENGTH, 4, 16) for t in (r, k, v, w, a, kappa))
    kappa = kappa / torch.sqrt(kappa.square().sum(-1, keepdim=True) + 1e-6)
    S = x.new_zeros(2, 4, 16, 16)
    out = []
    for t in range(LENGTH):
        removal = kappa[:, t, :, :, None] @ (a[:, t] * kappa[:, t])[:, :, None, :]
        S = S @ (torch.diag_embed(w[:, t]) - removal) + v[:, t, :, :, None] @ k[:, t, :, None, :]
        read = (S @ r[:, t, :, :, None])[..., 0] / 16**0.5
        p = F.group_norm(read.flatten(1), 4, ours.norm.weight, ours.norm.bias, 1e-5)
        bonus = (r[:, t] * ours.bonus * k[:, t]).sum(-1, keepdim=True) * v[:, t]
        out.append((g[:, t] * (p + bonus.flatten(1))) @ ours.out_proj.weight.T)
    return torch.stack(out, 1), S, values


def test_rwkv7_is_the_loop_of_the_paper() -> None:
    ours, x = build(), tokens()
    y, S, _ = loop(ours, x)
    assert error(ours(x)[0], y) < 1e-10
    state = ours.init_state(2, LENGTH, x.dtype)
    first, middle = ours(x[:, :8], state)
    second, last = ours(x[:, 8:], middle)
    assert error(torch.cat((first, second), 1), y) < 1e-10
    assert last is not None
    assert error(last.tensors["matrix"], S.mT) < 1e-10


def test_the_first_layers_values_are_mixed_into_those_of_later_ones() -> None:
    """Three layers in a row: the third one mixes in the first one's values, not the second's."""
    layers = [
        build(value_mix="lend", rank=8),
        *(build(value_mix="mix", value_rank=n, rank=8, gate_rank=24) for n in (4, 5)),
    ]
    assert {layer.config.carries for layer in layers} == {"values 64"}
    expected = given = tokens()
    first, earlier = None, None
    for layer in layers:
        expected, _, values = loop(layer, expected, first)
        first = values if first is None else first
        carry = Carry(earlier)
        given = layer(given, None, carry)[0]
        earlier = carry.later
        assert error(given, expected) < 1e-10
        assert error(earlier[0], first) < 1e-10


def test_a_later_layer_alone_is_a_first_one() -> None:
    ours, x = build(value_mix="mix"), tokens()
    assert error(ours(x)[0], loop(ours, x, ours_values(ours, x))[0]) < 1e-10


def ours_values(ours: Rwkv7, x: Tensor) -> Tensor:
    """The values before they are mixed."""
    assert ours.shift is not None
    before = torch.cat((torch.zeros_like(x[:, :1]), x[:, :-1]), 1)
    mixed = x + (before - x) * ours.shift.mix[2]
    return mixed @ ours.in_proj.weight[128:192].T


@torch.no_grad()
def test_values_are_handed_on_in_the_pieces_of_a_long_call() -> None:
    """Without gradients a long call goes in pieces; what is handed on is that of the whole."""
    x = tokens(PIECE + 40).float()
    found = []
    for pieces in (False, True):
        y, earlier = x, None
        for genes in ({"value_mix": "lend"}, {"value_mix": "mix"}):
            layer = build(**genes, rank=8).float()
            carry = Carry(earlier)
            if pieces:
                assert is_long(y)
                y = layer(y, None, carry)[0]
            else:
                with torch.enable_grad():
                    y = layer(y, None, carry)[0].detach()
            earlier = carry.later
        assert earlier is not None
        found.append((y, earlier[0]))
    for one, other in zip(*found, strict=True):
        assert error(one, other) < 1e-5


def test_cost_with_mixed_values() -> None:
    """In a model of three layers, where the counter sees what is decoded."""
    genome = parse(
        "{width=64, norm=layernorm, embedding_norm=true} rwkv7(value_mix=lend)"
        " > rwkv7-channel > [rwkv7(value_mix=mix, gate_rank=40, value_rank=6) > rwkv7-channel]*2"
    )
    assert difference(genome, seed=1) <= TOLERANCE
    model = build_model(genome)
    counted = cost(genome, 5, torch.float32).total
    assert counted.params == sum(p.numel() for p in model.parameters())
    state = model.init_state(1, 5)
    assert counted.state_bytes == state.bytes()
    with torch.no_grad(), flop_counter() as counter:
        for token in torch.randint(256, (1, 5)).split(1, 1):
            state = model(token, state)[1]
    assert counter.get_total_flops() == pytest.approx(5 * counted.flops_per_token, rel=1e-12)


def test_what_is_removed_is_gone() -> None:
    """With a rate of 1 and no decay the state holds nothing under the last removal key."""
    ours = build().float()
    with torch.no_grad():
        ours.rate.bias.fill_(1e3)
        ours.decay.bias.fill_(-1e3)
        ours.in_proj.weight[128:192] = 0  # v, so that only the start state is there
        state = ours.init_state(2, 4, torch.float32)
        state.tensors["matrix"].normal_()
        x = tokens(1).float()
        assert ours.shift is not None
        key = (x - x * ours.shift.mix[1]) @ ours.in_proj.weight[64:128].T * ours.removal
        _, after = ours(x, state)
        assert after is not None
        key = F.normalize(key.view(2, 4, 16), dim=-1)
        held = torch.einsum("bhkv,bhk->bhv", after.tensors["matrix"], key)
    assert held.abs().max() < 1e-4
