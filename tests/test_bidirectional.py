"""Recurrences that read the whole sequence: against torch's own, and two mixers of transformers.

Tolerances as in test_recurrence.py: 1e-5 of the output's scale in float32, 1e-10 in float64.
"""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import MambaConfig
from transformers.models.mamba.modeling_mamba import MambaMixer

from mendel.primitives.base import Gene, Site
from mendel.primitives.bidirectional import Bidirectional
from mendel.primitives.catalogue import resolve
from mendel.primitives.diagonal.selective import Selective
from mendel.primitives.recurrence.nonlinear import Nonlinear


def build(name: str, **genes: Gene) -> Bidirectional:
    """The layer with every parameter away from its start."""
    primitive, full = resolve(name, genes)
    torch.manual_seed(0)
    module = primitive.configure(Site(32), full).build()
    assert isinstance(module, Bidirectional)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return module


def tokens(length: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, length, 32, generator=generator, dtype=torch.float64).to(dtype)


def error(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()


def of_torch(ours: Bidirectional) -> nn.LSTM | nn.GRU:
    """torch's bidirectional layer with the same weights."""
    weights = {}
    for direction, suffix in ((ours.ahead, ""), (ours.back, "_reverse")):
        assert isinstance(direction, Nonlinear)
        c = direction.config
        hidden_bias = torch.zeros(c.gates * c.inner, dtype=torch.float64)
        if direction.inner_bias is not None:
            hidden_bias[2 * c.inner :] = direction.inner_bias[0].detach()
        weights |= {
            f"weight_ih_l0{suffix}": direction.in_proj.weight.detach(),
            f"bias_ih_l0{suffix}": direction.in_proj.bias.detach(),
            f"weight_hh_l0{suffix}": direction.mix[0].T.detach(),
            f"bias_hh_l0{suffix}": hidden_bias,
        }
    kind = nn.LSTM if c.cell == "lstm" else nn.GRU
    theirs = kind(32, c.inner, batch_first=True, bidirectional=True).double()
    theirs.load_state_dict(weights)
    return theirs


@pytest.mark.parametrize("length", [1, 5, 37])
@pytest.mark.parametrize("name", ["bilstm", "bigru"])
def test_bidirectional_lstm_and_gru_are_those_of_torch(name: str, length: int) -> None:
    """torch's layer concatenates the directions; one projection of both is ours, cut in two."""
    ours, x = build(name).double(), tokens(length)
    theirs = of_torch(ours)
    assert isinstance(ours.ahead, Nonlinear)
    assert isinstance(ours.back, Nonlinear)
    out = torch.cat((ours.ahead.out_proj.weight, ours.back.out_proj.weight), 1)
    mine, yours = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, reference = ours(mine)[0], theirs(yours)[0] @ out.T
    assert error(y, reference) < 1e-10
    cotangent = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=x.dtype)
    (y * cotangent).sum().backward()
    (reference * cotangent).sum().backward()
    assert mine.grad is not None
    assert yours.grad is not None
    assert error(mine.grad, yours.grad) < 1e-10
    for direction, suffix in ((ours.ahead, ""), (ours.back, "_reverse")):
        assert isinstance(direction, Nonlinear)
        for found, label in (
            (direction.in_proj.weight.grad, "weight_ih_l0"),
            (direction.in_proj.bias.grad, "bias_ih_l0"),
        ):
            right = getattr(theirs, label + suffix).grad
            assert found is not None
            assert error(found, right) < 1e-10
        assert direction.mix.grad is not None
        right = getattr(theirs, "weight_hh_l0" + suffix).grad.T
        # A single token has no earlier output, so the matrix has no gradient.
        assert (direction.mix.grad[0] - right).abs().max() <= 1e-10 * right.abs().max() + 1e-15


def test_bidirectional_slstm_is_two_slstms() -> None:
    """The second sees the tokens from the last to the first."""
    ours, x = build("slstm", causal=False).double(), tokens(19)
    back = torch.stack([ours.back(x[:, t:].flip(1))[0][:, -1] for t in range(19)], 1)
    ahead = torch.stack([ours.ahead(x[:, : t + 1])[0][:, -1] for t in range(19)], 1)
    assert error(ours(x)[0], ahead + back) < 1e-10


@pytest.mark.parametrize("length", [1, 5, 130])
def test_bidirectional_mamba_is_two_mixers_of_transformers(length: int) -> None:
    ours = build("bimamba")
    x = tokens(length, torch.float32)
    outputs = []
    for direction, seen in ((ours.ahead, x), (ours.back, x.flip(1))):
        assert isinstance(direction, Selective)
        assert direction.conv is not None
        assert direction.conv.bias is not None
        c = direction.config
        mixer = MambaMixer(
            MambaConfig(
                hidden_size=32,
                state_size=c.rows,
                expand=2,
                conv_kernel=c.conv,
                time_step_rank=c.rank,
                num_hidden_layers=1,
                vocab_size=32,
            ),
            0,
        ).eval()
        mixer.load_state_dict(
            {
                "in_proj.weight": direction.in_proj.weight.detach(),
                "conv1d.weight": direction.conv.weight[:, None].detach(),
                "conv1d.bias": direction.conv.bias.detach(),
                "x_proj.weight": direction.select.weight.detach(),
                "dt_proj.weight": direction.dt.weight.detach(),
                "dt_proj.bias": direction.dt.bias.detach(),
                "A_log": direction.A_log.detach(),
                "D": direction.skip.detach(),
                "out_proj.weight": direction.out_proj.weight.detach(),
            }
        )
        outputs.append(mixer(seen))
    assert error(ours(x)[0], outputs[0] + outputs[1].flip(1)) < 1e-5


def test_bidirectional_mamba_gradients_reach_both_directions_alike() -> None:
    """On a palindrome, with equal weights, both directions do the same and learn the same."""
    ours = build("bimamba").double()
    ours.back.load_state_dict(ours.ahead.state_dict())
    half = tokens(9)
    x = torch.cat((half, half.flip(1)), 1)
    y = ours(x)[0]
    assert error(y, y.flip(1)) < 1e-10
    F.gelu(y).square().sum().backward()
    for (label, a), b in zip(ours.ahead.named_parameters(), ours.back.parameters(), strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert error(a.grad, b.grad) < 1e-9, label
