"""HGRN against a float64 loop written from the paper; tolerance as in test_recurrence.py."""

import pytest
import torch
from torch import Tensor

from mendel.primitives.base import Gene, Site
from mendel.primitives.catalogue import resolve
from mendel.primitives.diagonal.hgrn import Hgrn, HgrnConfig


def build(**genes: Gene) -> Hgrn:
    """The layer in float64 with every parameter away from its start."""
    primitive, full = resolve("hgrn", genes)
    made = primitive.configure(Site(32, "none", 1, 4), full)
    assert isinstance(made, HgrnConfig)
    torch.manual_seed(0)
    module = made.build()
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return module.double()


def tokens(length: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, length, 32, generator=generator, dtype=torch.float64)


def error(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()


def test_hgrn_is_the_loop_of_the_paper() -> None:
    """arXiv 2311.04823, eq. 2-7: complex numbers as such, token by token."""
    ours, length = build(), 23
    x = tokens(length)
    c, mu, g = (x @ ours.in_proj.weight.T + ours.in_proj.bias).split([64, 32, 64], -1)
    c = c / (1 + torch.exp(-c))
    c = torch.complex(*c.chunk(2, -1))
    bound = torch.sigmoid(ours.decay.lower[:, 0])
    f = bound + (1 - bound) / (1 + torch.exp(-mu))
    h = torch.zeros(2, 32, dtype=torch.complex128)
    out = []
    for t in range(length):
        h = f[:, t] * torch.exp(1j * ours.angle) * h + (1 - f[:, t]) * c[:, t]
        read = torch.sigmoid(g[:, t]) * torch.cat((h.real, h.imag), -1)
        out.append(read @ ours.out_proj.weight.T + ours.out_proj.bias)
    y = torch.stack(out, 1)
    assert error(ours(x)[0], y) < 1e-10
    state = ours.init_state(2, length, x.dtype)
    first, middle = ours(x[:, :8], state)
    second, last = ours(x[:, 8:], middle)
    assert error(torch.cat((first, second), 1), y) < 1e-10
    assert last is not None
    assert error(last.tensors["h"], torch.cat((h.real, h.imag), -1)) < 1e-10


@pytest.mark.parametrize("bias", [-1e4, 1e4])
def test_extreme_gates(bias: float) -> None:
    """Gates shut and open beyond what float32 tells from 0 and 1: finite, gradients too."""
    module = build().float()
    with torch.no_grad():
        module.in_proj.bias[64:96] = bias
    y = module(tokens(70).float())[0]
    y.square().sum().backward()
    assert y.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())
