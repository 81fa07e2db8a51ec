"""S4D against a float64 loop and the integral that it stands for; tolerance 1e-10 in float64."""

import pytest
import torch
from torch import Tensor

from mendel.kernels.backend import use_backend
from mendel.kernels.time_invariant import PIECE, time_invariant
from mendel.primitives.base import Gene, GeneError, Site
from mendel.primitives.catalogue import resolve
from mendel.primitives.diagonal.s4 import S4, S4Config


def build(name: str = "s4d", **genes: Gene) -> S4:
    """The layer in float64 with every parameter away from its start."""
    primitive, full = resolve(name, genes)
    made = primitive.configure(Site(16), full)
    assert isinstance(made, S4Config)
    torch.manual_seed(0)
    module = made.build()
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return module.double()


def tokens(length: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, length, 16, generator=generator, dtype=torch.float64)


def error(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()


@pytest.mark.parametrize("discretisation", ["zoh", "bilinear"])
@pytest.mark.parametrize("spectrum", ["lin", "inv", "real"])
def test_s4d_is_the_loop_of_the_paper(spectrum: str, discretisation: str) -> None:
    """arXiv 2206.11893, eq. 2-3 and section 3, over all N states: both halves of each pair."""
    ours = build(spectrum=spectrum, discretisation=discretisation, state=8)
    x, length = tokens(20), 20
    dt = ours.log_dt.exp()[:, None]
    half = torch.complex(-ours.A_log.exp(), ours.A_imag)
    C = torch.view_as_complex(ours.C)
    A, C = torch.cat((half, half.conj()), 1), torch.cat((C, C.conj()), 1)
    if discretisation == "zoh":
        Abar = torch.exp(dt * A)
        Bbar = (Abar - 1) / A
    else:
        Abar, Bbar = (1 + dt / 2 * A) / (1 - dt / 2 * A), dt / (1 - dt / 2 * A)
    h = torch.zeros(2, 16, 8, dtype=torch.complex128)
    out = []
    for t in range(length):
        h = Abar * h + Bbar * x[:, t, :, None]
        y = (C * h).sum(-1)
        assert y.imag.abs().max() < 1e-12
        y = y.real + ours.skip * x[:, t]
        y = y * (1 + torch.erf(y / 2**0.5)) / 2
        left, right = (y @ ours.out_proj.weight.T + ours.out_proj.bias).chunk(2, -1)
        out.append(left * torch.sigmoid(right))
    assert error(ours(x)[0], torch.stack(out, 1)) < 1e-10
    _, state = ours(x, ours.init_state(2, length, x.dtype))
    assert state is not None
    held = torch.view_as_complex(state.tensors["x"]) * Bbar[:, :4]
    assert error(torch.view_as_real(held), torch.view_as_real(h[..., :4])) < 1e-10


def test_zero_order_hold_is_the_integral() -> None:
    """x(dt) = exp(dt A) x(0) + int_0^dt exp(s A) ds u, integrated in 10,000 steps."""
    ours = build(state=4)
    log_a, cb = ours.discrete()
    dt = ours.log_dt.exp()[:, None]
    a = torch.complex(-ours.A_log.exp(), ours.A_imag)
    steps = (torch.arange(10_000) + 0.5) / 10_000
    integral = (torch.exp(a[..., None] * dt[..., None] * steps).mean(-1) * dt).detach()
    found = (cb / torch.view_as_complex(ours.C)).detach()
    assert (found - integral).abs().max() < 1e-8
    assert (log_a - dt * a).abs().max() < 1e-15


@pytest.mark.parametrize("length", [1, 2, PIECE, PIECE + 1, 2 * PIECE + 7])
def test_convolution_equals_the_recurrence(length: int) -> None:
    """Outputs, state and every gradient, from zero and from a state, over several pieces."""
    g = torch.Generator().manual_seed(length)
    u = torch.randn(2, length, 3, generator=g, dtype=torch.float64)
    real, imag = torch.rand(3, 2, generator=g).double(), 3 * torch.rand(3, 2, generator=g).double()
    c = torch.randn(3, 2, 2, generator=g, dtype=torch.float64)
    state = torch.randn(2, 3, 2, 2, generator=g, dtype=torch.float64)
    for start in (None, state):
        found = []
        for backend in ("chunked", "definition"):
            leaves = [t.clone().requires_grad_() for t in (u, real, imag, c)]
            a = torch.complex(-0.1 * leaves[1], leaves[2])
            with use_backend(backend):  # type: ignore[arg-type]
                y, last = time_invariant(leaves[0], a, torch.view_as_complex(leaves[3]), start)
            (y.square().sum() + last.square().sum()).backward()
            grads = [t.grad for t in leaves]
            found.append([y.detach(), last.detach(), *grads])
        for have, right in zip(*found, strict=True):
            assert have is not None
            assert right is not None
            assert (have - right).norm() <= 1e-10 * right.norm()


def test_float32_keeps_its_digits_over_many_tokens() -> None:
    """2,000 tokens of the slowest and fastest oscillations, float32 against float64."""
    module = build(state=64)
    x = tokens(2000)
    with torch.no_grad():
        right = module(x)[0]
        assert error(module.float()(x.float())[0], right) < 1e-5


def test_an_odd_state_is_refused() -> None:
    with pytest.raises(GeneError, match="state=7 is odd"):
        build(state=7)
