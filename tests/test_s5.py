"""S5 against a float64 loop written from the paper; tolerance 1e-10 of the output's scale."""

import pytest
import torch
from torch import Tensor

from mendel.primitives.base import Gene, GeneError, Site
from mendel.primitives.catalogue import resolve
from mendel.primitives.diagonal.hippo import legs
from mendel.primitives.diagonal.s5 import S5, S5Config

WIDTH = 16


def build(*, moved: bool = True, **genes: Gene) -> S5:
    """The layer in float64, with every parameter away from its start where `moved`."""
    primitive, full = resolve("s5", genes)
    made = primitive.configure(Site(WIDTH), full)
    assert isinstance(made, S5Config)
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


def loop(ours: S5, x: Tensor) -> tuple[Tensor, Tensor]:
    """arXiv 2208.04933, equations 2, 5 and 6 over all states, both of each pair, as complex
    numbers; the output layer of appendix G.1. The outputs and the last state of one of each pair.
    """
    n = ours.config.pairs
    half = torch.complex(-ours.A_log.exp(), ours.A_imag)
    B, C = torch.complex(*ours.B.weight.chunk(2, 0)), torch.complex(*ours.C.weight.chunk(2, 1))
    Lambda, dt = torch.cat((half, half.conj())), ours.log_dt.exp().repeat(2)
    B, C = torch.cat((B, B.conj()), 0), torch.cat((C, C.conj()), 1)
    Lambda_bar = torch.exp(Lambda * dt)
    B_bar = ((Lambda_bar - 1) / Lambda)[:, None] * B
    h = torch.zeros(x.shape[0], 2 * n, dtype=torch.complex128)
    out = []
    for t in range(x.shape[1]):
        h = Lambda_bar * h + x[:, t].to(B_bar.dtype) @ B_bar.T
        y = h @ C.T
        assert y.imag.abs().max() < 1e-10
        y = y.real + ours.skip * x[:, t]
        y = y * (1 + torch.erf(y / 2**0.5)) / 2
        z = y @ ours.out_proj.weight.T + ours.out_proj.bias
        if ours.config.out == "glu":
            z, gate = z.chunk(2, -1)
            y = z / (1 + torch.exp(-gate))
        else:
            y = y / (1 + torch.exp(-z)) if ours.config.out == "gate" else z
        out.append(y)
    return torch.stack(out, 1), h[:, :n]


@pytest.mark.parametrize("out", ["gate", "glu", "linear"])
@pytest.mark.parametrize("length", [1, 2, 23, 130])
def test_s5_is_the_loop_of_the_paper(length: int, out: str) -> None:
    """Outputs, the state carried over a split, and every gradient."""
    ours = build(out=out, state=12, blocks=2)
    x = tokens(length).requires_grad_()
    reference, last = loop(ours, x)
    mine = ours(x)[0]
    assert error(mine, reference) < 1e-10
    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=x.dtype)
    named = {"x": x, **dict(ours.named_parameters())}
    found = torch.autograd.grad((mine * weight).sum(), named.values())
    right = torch.autograd.grad((reference * weight).sum(), named.values())
    for label, a, b in zip(named, found, right, strict=True):
        assert (a - b).norm() <= 1e-9 * b.norm() + 1e-12, label
    state, outputs = ours.init_state(2, length, x.dtype), []
    for part in x.split([length // 3, length - length // 3], 1):
        if part.shape[1]:
            y, after = ours(part, state)
            assert after is not None
            state = after
            outputs.append(y)
    assert error(torch.cat(outputs, 1), reference) < 1e-10
    assert error(state.tensors["x"], torch.cat((last.real, last.imag), -1)) < 1e-10


@pytest.mark.parametrize("blocks", [1, 2])
def test_the_start_is_the_normal_part_of_hippo(blocks: int) -> None:
    """With one step size, a fresh layer is a real system of the matrix A + P P^T and real B', C'.

    The layer's weights are float32 numbers: 1e-5 of the output's scale.
    """
    ours, x = build(moved=False, state=16, blocks=blocks, out="linear"), tokens(30)
    with torch.no_grad():
        ours.log_dt.fill_(-2.0)
    n = torch.arange(16 // blocks, dtype=torch.float64)
    A = -torch.sqrt(torch.outer(2 * n + 1, 2 * n + 1)).tril(-1) - torch.diag(n + 1)
    A = torch.block_diag(*[A + torch.outer(torch.sqrt(n + 0.5), torch.sqrt(n + 0.5))] * blocks)
    V = torch.block_diag(*[legs(8 // blocks).vectors] * blocks)
    B, C = torch.complex(*ours.B.weight.chunk(2, 0)), torch.complex(*ours.C.weight.chunk(2, 1))
    # V and its conjugate are one unitary matrix, so these invert B = V^* B' and C = C' V.
    B, C = 2 * (V @ B).real, 2 * (C @ V.mH).real
    step = torch.matrix_exp(A * torch.exp(torch.tensor(-2.0, dtype=torch.float64)))
    write = torch.linalg.solve(A, (step - torch.eye(16)) @ B)
    h, out = torch.zeros(2, 16, dtype=torch.float64), []
    for t in range(30):
        h = h @ step.T + x[:, t] @ write.T
        y = h @ C.T + ours.skip * x[:, t]
        y = y * (1 + torch.erf(y / 2**0.5)) / 2
        out.append(y @ ours.out_proj.weight.T + ours.out_proj.bias)
    assert error(ours(x)[0], torch.stack(out, 1)) < 1e-5


@pytest.mark.parametrize(("log_dt", "rate"), [(-30.0, 0.0), (30.0, 0.0), (0.0, 30.0), (0.0, -40.0)])
def test_extremes(log_dt: float, rate: float) -> None:
    """Nothing fades, all is gone after a token: finite in float32, gradients too, as the loop."""
    ours = build(state=12)
    with torch.no_grad():
        ours.log_dt.fill_(log_dt)
        ours.A_log.fill_(rate)
    x = tokens(70)
    single = build(state=12).float()
    single.load_state_dict(ours.state_dict())
    y = single(x.float())[0]
    y.square().sum().backward()
    assert y.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in single.parameters())
    if log_dt <= 0 and rate <= 0:
        assert error(y.detach(), loop(ours, x)[0].detach()) < 1e-5


def test_bfloat16_keeps_a_float32_state() -> None:
    """8 bits of mantissa in the products; the state and its sums stay in float32."""
    ours = build().to(torch.bfloat16)
    x = tokens(500).to(torch.bfloat16)
    with torch.no_grad():
        y, state = ours(x, ours.init_state(2, 500, x.dtype))
        assert state is not None
        assert state.tensors["x"].dtype == torch.float32
        assert error(y, build()(tokens(500))[0]) < 6e-2


def test_states_that_do_not_divide_are_refused() -> None:
    with pytest.raises(GeneError, match="state=12 is no whole number of pairs"):
        build(state=12, blocks=4)
