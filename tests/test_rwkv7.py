"""RWKV-7 against a float64 loop written from the paper; tolerance as in test_recurrence.py."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from mendel.primitives.base import Gene, Site
from mendel.primitives.catalogue import resolve
from mendel.primitives.recurrence.rwkv7 import Rwkv7, Rwkv7Config

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


def test_rwkv7_is_the_loop_of_the_paper() -> None:
    """arXiv 2503.14456, eq. 2-18, with the state as (values, keys) as it is written there."""
    ours, x = build(), tokens()
    assert ours.shift is not None
    before = torch.cat((torch.zeros_like(x[:, :1]), x[:, :-1]), 1)
    mixed = [x + (before - x) * mu for mu in ours.shift.mix]
    rows = ours.in_proj.weight.split([64, 64, 64, 64, 64, 128])
    r, k, v, d, a, g = (m @ w.T for m, w in zip(mixed, rows, strict=True))
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
    y = torch.stack(out, 1)
    assert error(ours(x)[0], y) < 1e-10
    state = ours.init_state(2, LENGTH, x.dtype)
    first, middle = ours(x[:, :8], state)
    second, last = ours(x[:, 8:], middle)
    assert error(torch.cat((first, second), 1), y) < 1e-10
    assert last is not None
    assert error(last.tensors["matrix"], S.mT) < 1e-10


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
