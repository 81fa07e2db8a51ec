"""The gated short convolution against transformers' LFM2 layer and against its formula.

Tolerances as in test_recurrence.py: 1e-5 of the output's scale in float32, 1e-10 in float64.
"""

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, Lfm2Config
from transformers.models.lfm2.modeling_lfm2 import Lfm2ShortConv

from mendel.primitives.base import Gene, GeneError, Site
from mendel.primitives.catalogue import resolve
from mendel.primitives.convolution.short_conv import GatedConv, GatedConvConfig


def config(name: str, width: int = 64, **genes: Gene) -> GatedConvConfig:
    primitive, full = resolve(name, genes)
    made = primitive.configure(Site(width), full)
    assert isinstance(made, GatedConvConfig)
    return made


def build(name: str, **genes: Gene) -> GatedConv:
    torch.manual_seed(0)
    return config(name, **genes).build()


def tokens(length: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, length, 64, generator=generator, dtype=torch.float64).to(dtype)


def error(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()


@pytest.mark.parametrize("taps", [3, 4])
@pytest.mark.parametrize("length", [1, 2, 37, 130])
def test_lfm2_conv_is_the_layer_of_transformers(length: int, taps: int) -> None:
    ours = build("lfm2-conv", taps=taps)
    theirs_config = Lfm2Config(
        hidden_size=64,
        conv_L_cache=taps,
        num_hidden_layers=1,
        layer_types=["conv"],
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=32,
    )
    theirs = Lfm2ShortConv(theirs_config, 0)
    theirs.load_state_dict(
        {
            "in_proj.weight": ours.in_proj.weight.detach(),
            "conv.weight": ours.conv.weight.detach()[:, None],
            "out_proj.weight": ours.out_proj.weight.detach(),
        }
    )
    x = tokens(length)
    mine, yours = x.clone().requires_grad_(), x.clone().requires_grad_()
    cotangent = torch.randn(x.shape)
    y, reference = ours(mine)[0], theirs(yours)
    assert error(y, reference) < 1e-5
    (y * cotangent).sum().backward()
    (reference * cotangent).sum().backward()
    assert mine.grad is not None
    assert yours.grad is not None
    assert error(mine.grad, yours.grad) < 1e-5

    cache = DynamicCache(config=theirs_config)
    with torch.no_grad():
        theirs(x, past_key_values=cache)
        _, state = ours(x, ours.init_state(2, length, x.dtype))
        assert state is not None
        # transformers keeps one input more than the next call needs.
        assert error(state.tensors["conv"], cache.get_conv_state(0, state_idx=0)[:, :, 1:]) < 1e-5
        step = tokens(length + 1)[:, -1:]
        assert error(ours(step, state)[0], theirs(step, past_key_values=cache)) < 1e-5


@pytest.mark.parametrize("taps", [2, 7, 33])
def test_it_is_its_formula(taps: int) -> None:
    ours = build("gated-conv", taps=taps, expand=2.0).double()
    x = tokens(20, torch.float64)
    before, after, u = (x @ ours.in_proj.weight.T).split(128, -1)
    gated = before * u
    mixed = torch.zeros_like(gated)
    for t in range(20):
        for back in range(min(taps, t + 1)):
            mixed[:, t] += ours.conv.weight[:, taps - 1 - back] * gated[:, t - back]
    assert error(ours(x)[0], (after * mixed) @ ours.out_proj.weight.T) < 1e-10


def test_it_forgets_after_its_taps() -> None:
    module, x = build("gated-conv", taps=4).double(), tokens(12, torch.float64).requires_grad_()
    (gradient,) = torch.autograd.grad(module(x)[0][:, 8].square().sum(), x)
    reached = [t for t in range(12) if gradient[:, t].abs().max() > 0]
    assert reached == [5, 6, 7, 8]


def test_cost_at_the_published_width() -> None:
    """LFM2-1.2B: width 2048, three taps, two inputs kept in bf16."""
    cost = config("lfm2-conv", 2048).cost(32_768, torch.bfloat16)
    assert cost.params == 4 * 2048**2 + 3 * 2048
    assert cost.state_bytes == 2 * 2048 * 2


def test_what_does_not_divide_is_refused() -> None:
    with pytest.raises(GeneError, match="no whole number of channels"):
        config("gated-conv", expand=1.01)
