"""S4 against HiPPO's own real matrix, and its fast forms against the definition, in float64.

The reference runs the dense matrix of the paper's appendix token by token; tolerance 1e-10 of the
output's scale, as both are float64 and the matrix' entries reach 2 N.
"""

import math

import pytest
import torch
from torch import Tensor

from mendel.kernels.backend import use_backend
from mendel.kernels.low_rank_state_space import low_rank_state_space
from mendel.kernels.time_invariant import PIECE, time_invariant
from mendel.primitives.base import Gene, GeneError, Site
from mendel.primitives.catalogue import resolve
from mendel.primitives.diagonal.hippo import legs
from mendel.primitives.diagonal.s4 import S4, S4Config

WIDTH = 8


def build(*, moved: bool = True, **genes: Gene) -> S4:
    """The layer in float64, with every parameter away from its start where `moved`."""
    primitive, full = resolve("s4", genes)
    made = primitive.configure(Site(WIDTH), full)
    assert isinstance(made, S4Config)
    torch.manual_seed(0)
    module = made.build()
    with torch.no_grad():
        for p in module.parameters() if moved else ():
            p.add_(0.1 * torch.randn_like(p))
    return module.double()


def tokens(length: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, length, WIDTH, generator=generator, dtype=torch.float64)


def error(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()


def hippo_legs(states: int) -> tuple[Tensor, Tensor]:
    """A and B as the paper prints them (arXiv 2111.00396, equation 2), entry by entry."""
    A = torch.zeros(states, states, dtype=torch.float64)
    for n in range(states):
        for k in range(n):
            A[n, k] = -math.sqrt((2 * n + 1) * (2 * k + 1))
        A[n, n] = -(n + 1)
    return A, torch.tensor([math.sqrt(2 * n + 1) for n in range(states)], dtype=torch.float64)


def whole(half: Tensor) -> Tensor:
    return torch.cat((half, half.conj()), -1)


@pytest.mark.parametrize("pairs", [1, 4, 32, 128])
def test_legs_is_normal_plus_low_rank(pairs: int) -> None:
    """V (Lambda - p p^*) V^* is HiPPO's matrix, V^* B is sqrt(2) p, and V is unitary."""
    A, B = hippo_legs(2 * pairs)
    start = legs(pairs)
    V, p = whole(start.vectors), whole(start.low_rank).to(torch.complex128)
    eigenvalues = whole(torch.complex(torch.full_like(start.frequencies, -0.5), start.frequencies))
    assert (V.mH @ V - torch.eye(2 * pairs)).abs().max() < 1e-12
    made = V @ (torch.diag(eigenvalues) - torch.outer(p, p.conj())) @ V.mH
    assert error(torch.view_as_real(made), torch.view_as_real(A + 0j)) < 1e-12
    assert error(torch.view_as_real(V @ p * 2**0.5), torch.view_as_real(B + 0j)) < 1e-12


@pytest.mark.parametrize("length", [1, 20, PIECE + 9])
def test_fresh_s4_runs_hippo_legs(length: int) -> None:
    """x_t = (1 - dt/2 A)^-1 ((1 + dt/2 A) x_{t-1} + dt B u) over A and B themselves, real."""
    ours, x = build(moved=False, state=16), tokens(length)
    # The module's Lambda, P and B are float32 numbers: 1e-7 of entries that reach 30.
    A, B = hippo_legs(16)
    V = whole(legs(8).vectors)
    C = (whole(torch.view_as_complex(ours.C.detach())) @ V.mH).real
    dt = ours.log_dt.detach().exp()
    one = torch.eye(16, dtype=torch.float64)
    below = torch.linalg.inv(one - dt[:, None, None] / 2 * A)
    step = below @ (one + dt[:, None, None] / 2 * A)
    write = below @ B * dt[:, None]
    h = torch.zeros(2, WIDTH, 16, dtype=torch.float64)
    out = []
    for t in range(length):
        h = torch.einsum("dnm,bdm->bdn", step, h) + write * x[:, t, :, None]
        y = (C * h).sum(-1) + ours.skip * x[:, t]
        y = y * (1 + torch.erf(y / 2**0.5)) / 2
        out.append(y @ ours.out_proj.weight.T + ours.out_proj.bias)
    assert error(ours(x)[0], torch.stack(out, 1)) < 1e-5
    _, state = ours(x, ours.init_state(2, length, x.dtype))
    assert state is not None
    held = whole(torch.view_as_complex(state.tensors["x"])) @ V.T
    assert held.imag.abs().max() < 1e-10
    assert error(held.real, h) < 1e-5


@pytest.mark.parametrize("length", [1, 2, 37, PIECE, 2 * PIECE + 7])
def test_s4_is_the_loop_of_the_paper(length: int) -> None:
    """Any Lambda, P, B, C: equation 4's bilinear matrices, all states, output layer of section 3.4.

    Outputs, state and the gradient of every parameter.
    """
    ours, x = build(state=8), tokens(length).requires_grad_()
    dt = ours.log_dt.exp()[:, None, None]
    eigenvalues = whole(torch.complex(-ours.A_log.exp(), ours.A_imag))
    P, B, C = (whole(torch.view_as_complex(t)) for t in (ours.P, ours.B, ours.C))
    A = torch.diag_embed(eigenvalues) - P[..., :, None] * P.conj()[..., None, :]
    one = torch.eye(8, dtype=torch.complex128)
    below = torch.linalg.inv(one - dt / 2 * A)
    step, write = below @ (one + dt / 2 * A), (below @ B[..., None] * dt).squeeze(-1)
    h = torch.zeros(2, WIDTH, 8, dtype=torch.complex128)
    out = []
    for t in range(length):
        h = torch.einsum("dnm,bdm->bdn", step, h) + write * x[:, t, :, None]
        y = (C * h).sum(-1)
        assert y.imag.abs().max() < 1e-10
        y = y.real + ours.skip * x[:, t]
        y = y * (1 + torch.erf(y / 2**0.5)) / 2
        out.append(y @ ours.out_proj.weight.T + ours.out_proj.bias)
    reference, mine = torch.stack(out, 1), ours(x)[0]
    assert error(mine, reference) < 1e-10
    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=x.dtype)
    leaves = [x, *ours.parameters()]
    found = torch.autograd.grad((mine * weight).sum(), leaves)
    right = torch.autograd.grad((reference * weight).sum(), leaves, allow_unused=True)
    for a, b in zip(found, right, strict=True):
        assert b is not None
        assert (a - b).norm() <= 1e-9 * b.norm() + 1e-12
    _, state = ours(x, ours.init_state(2, length, x.dtype))
    assert state is not None
    assert error(state.tensors["x"], torch.view_as_real(h[..., :4].resolve_conj())) < 1e-10


def system(real: Tensor, length: int) -> dict[str, Tensor]:
    """Inputs, a state, and random p, b, c of three channels with four pairs."""
    g = torch.Generator().manual_seed(length)
    shapes = {"u": (2, length, 3), "imag": (3, 4), "state": (2, 3, 4, 2)}
    shapes |= dict.fromkeys(("p", "b", "c"), (3, 4, 2))
    made = {n: torch.randn(s, generator=g, dtype=torch.float64) for n, s in shapes.items()}
    return {"real": real, **made}


@pytest.mark.parametrize("rate", [1e-9, 1e-3, 1.0, 1e3])
@pytest.mark.parametrize("length", [2, PIECE - 1, PIECE, 3 * PIECE + 5])
def test_convolution_equals_the_recurrence(length: int, rate: float) -> None:
    """From a state: outputs, last state and every gradient, from states that hardly fade in the
    whole sequence to states that are gone after a token."""
    inputs = system(torch.full((3, 4), rate, dtype=torch.float64), length)
    found = []
    for backend in ("chunked", "definition"):
        leaves = {name: t.clone().requires_grad_() for name, t in inputs.items()}
        p, b, c = (torch.view_as_complex(leaves[name]) for name in ("p", "b", "c"))
        a = torch.complex(-leaves["real"], leaves["imag"])
        small = min(1.0, math.sqrt(rate))
        with use_backend(backend):  # type: ignore[arg-type]
            y, last = low_rank_state_space(leaves["u"], a, small * p, b, c, leaves["state"])
        grads = torch.autograd.grad(y.square().mean() + last.square().mean(), leaves.values())
        found.append([y.detach(), last.detach(), *grads])
    for label, have, right in zip(["y", "last", *inputs], *found, strict=True):
        assert (have - right).norm() <= 1e-9 * right.norm(), label


def test_one_token_is_a_step_of_the_convolution() -> None:
    inputs = system(torch.rand(3, 4, dtype=torch.float64), 5)
    p, b, c = (torch.view_as_complex(inputs[name]) for name in ("p", "b", "c"))
    a = torch.complex(-inputs["real"], inputs["imag"])
    right, last = low_rank_state_space(inputs["u"], a, p, b, c, inputs["state"])
    now, steps = inputs["state"], []
    for t in range(5):
        y, now = low_rank_state_space(inputs["u"][:, t : t + 1], a, p, b, c, now)
        steps.append(y)
    assert error(torch.cat(steps, 1), right) < 1e-12
    assert error(now, last) < 1e-12


@pytest.mark.parametrize("log_dt", [-30.0, 30.0])
def test_extreme_step_sizes(log_dt: float) -> None:
    """Time that stands still and time that rushes: finite, gradients too, and as the loop."""
    ours = build(state=16)
    with torch.no_grad():
        ours.log_dt.fill_(log_dt)
    x = tokens(70)
    y = ours(x)[0]
    y.square().sum().backward()
    assert y.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in ours.parameters())
    with torch.no_grad(), use_backend("definition"):
        assert error(y.detach(), ours(x)[0]) < 1e-9


@pytest.mark.parametrize("length", [1, 2, PIECE, 2 * PIECE + 7])
def test_real_states_equal_the_recurrence(length: int) -> None:
    """The real form of time_invariant: outputs, state, gradients, with and without a state."""
    g = torch.Generator().manual_seed(length)
    u = torch.randn(2, length, 3, generator=g, dtype=torch.float64)
    a = -torch.rand(3, 4, generator=g, dtype=torch.float64)
    c = torch.randn(3, 4, generator=g, dtype=torch.float64)
    state = torch.randn(2, 3, 4, generator=g, dtype=torch.float64)
    for start in (None, state):
        found = []
        for backend in ("chunked", "definition"):
            leaves = [t.clone().requires_grad_() for t in (u, a, c)]
            with use_backend(backend):  # type: ignore[arg-type]
                y, last = time_invariant(*leaves, start)
            grads = torch.autograd.grad(y.square().sum() + last.square().sum(), leaves)
            found.append([y.detach(), last.detach(), *grads])
        for have, right in zip(*found, strict=True):
            assert (have - right).norm() <= 1e-10 * right.norm()


@pytest.mark.parametrize(
    "genes", [{"spectrum": "lin"}, {"discretisation": "zoh"}], ids=["spectrum", "discretisation"]
)
def test_what_does_not_go_with_low_rank_is_refused(genes: dict[str, Gene]) -> None:
    with pytest.raises(GeneError, match="structure=dplr goes with"):
        build(**genes)
