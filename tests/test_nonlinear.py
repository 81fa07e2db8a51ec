"""LSTM and GRU against torch's own, the sLSTM against its unstabilised float64 loop.

Tolerances as in test_recurrence.py: 1e-5 of the output's scale in float32, 1e-10 in float64.
"""

import pytest
import torch
from torch import Tensor, nn

from mendel.primitives.base import Gene, GeneError, Site
from mendel.primitives.catalogue import resolve
from mendel.primitives.recurrence.nonlinear import Nonlinear, NonlinearConfig


def build(name: str, **genes: Gene) -> Nonlinear:
    """The layer in float64 with every parameter away from its start."""
    primitive, full = resolve(name, genes)
    made = primitive.configure(Site(32), full)
    assert isinstance(made, NonlinearConfig)
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


def of_torch(ours: Nonlinear) -> nn.LSTM | nn.GRU:
    c = ours.config
    theirs = (nn.LSTM if c.cell == "lstm" else nn.GRU)(32, c.inner, batch_first=True).double()
    hidden_bias = torch.zeros(c.gates * c.inner, dtype=torch.float64)
    if ours.inner_bias is not None:
        hidden_bias[2 * c.inner :] = ours.inner_bias[0].detach()
    theirs.load_state_dict(
        {
            "weight_ih_l0": ours.in_proj.weight.detach(),
            "bias_ih_l0": ours.in_proj.bias.detach(),
            "weight_hh_l0": ours.mix[0].T.detach(),
            "bias_hh_l0": hidden_bias,
        }
    )
    return theirs


@pytest.mark.parametrize("length", [1, 5, 37])
@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_lstm_and_gru_are_those_of_torch(name: str, length: int) -> None:
    ours, x = build(name), tokens(length)
    theirs = of_torch(ours)
    mine, yours = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, (h, last) = ours(mine)[0], theirs(yours)
    reference = h @ ours.out_proj.weight.T
    assert error(y, reference) < 1e-10
    cotangent = torch.randn(x.shape, dtype=torch.float64)
    (y * cotangent).sum().backward()
    (reference * cotangent).sum().backward()
    assert mine.grad is not None
    assert yours.grad is not None
    assert error(mine.grad, yours.grad) < 1e-10
    _, state = ours(x, ours.init_state(2, length, x.dtype))
    assert state is not None
    parts = last if isinstance(last, tuple) else (last,)
    for part, right in zip(state.tensors.values(), parts, strict=True):
        assert error(part, right[0]) < 1e-10


@pytest.mark.parametrize("heads", [1, 4])
def test_slstm_is_the_loop_of_the_paper(heads: int) -> None:
    """arXiv 2405.04517, eq. 8-14 without the stabiliser, a head's gates seeing that head only."""
    ours = build("slstm", heads=heads)
    x, width = tokens(15).requires_grad_(), 32 // heads
    wx = (x @ ours.in_proj.weight.T + ours.in_proj.bias).view(2, 15, 4, heads, width)
    R = ours.mix.view(heads, width, 4, width)
    c, n, h = (x.new_zeros(2, heads, width) for _ in range(3))
    out = []
    for t in range(15):
        i, f, z, o = (wx[:, t] + torch.einsum("bhk,hkgj->bghj", h, R)).unbind(1)
        i, f, o = torch.exp(i), 1 / (1 + torch.exp(-f)), 1 / (1 + torch.exp(-o))
        c = f * c + i * torch.tanh(z)
        n = f * n + i
        h = o * c / n
        out.append(h)
    read = torch.stack(out, 1)
    centred = read - read.mean(-1, keepdim=True)
    normed = centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + 1e-5)
    y = (normed.flatten(2) * ours.norm.weight + ours.norm.bias) @ ours.out_proj.weight.T
    mine = ours(x)[0]
    assert error(mine, y) < 1e-10
    found = torch.autograd.grad(mine.square().sum(), [x, *ours.parameters()])
    right = torch.autograd.grad(y.square().sum(), [x, *ours.parameters()])
    assert all(error(a, b) < 1e-9 for a, b in zip(found, right, strict=True))
    _, state = ours(x, ours.init_state(2, 15, x.dtype))
    assert state is not None
    scale = state.tensors["m"].exp()
    assert error(state.tensors["c"] * scale, c.flatten(1)) < 1e-10
    assert error(state.tensors["n"] * scale, n.flatten(1)) < 1e-10


@pytest.mark.parametrize("bias", [-1e4, 1e4])
@pytest.mark.parametrize("gate", [0, 1])
def test_extreme_gates_of_the_slstm(gate: int, bias: float) -> None:
    """Input and forget gates shut or open beyond every exponent: finite, gradients too."""
    module = build("slstm").float()
    with torch.no_grad():
        module.in_proj.bias[gate * 32 : (gate + 1) * 32] = bias
    y = module(tokens(40).float())[0]
    assert y.isfinite().all()
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())


def test_heads_that_do_not_divide_are_refused() -> None:
    with pytest.raises(GeneError, match="heads=3 does not divide"):
        build("lstm", heads=3)
