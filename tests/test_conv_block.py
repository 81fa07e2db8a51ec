"""Conformer's, ConvNeXt's and ConvMixer's blocks against transformers' layers and their formulas.

Tolerances as in test_recurrence.py: 1e-5 of the output's scale in float32, 1e-10 in float64.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import ConvNextConfig, Wav2Vec2BertConfig, Wav2Vec2ConformerConfig
from transformers.models.convnext.modeling_convnext import ConvNextLayer
from transformers.models.wav2vec2_bert.modeling_wav2vec2_bert import Wav2Vec2BertConvolutionModule
from transformers.models.wav2vec2_conformer.modeling_wav2vec2_conformer import (
    Wav2Vec2ConformerConvolutionModule,
)

from mendel.primitives.base import BidirectionalError, Gene, GeneError, Site, State
from mendel.primitives.catalogue import resolve
from mendel.primitives.convolution.conv_block import ConvBlock, ConvBlockConfig

WIDTH = 48
LENGTHS = [1, 2, 37, 130]


def config(name: str, width: int = WIDTH, **genes: Gene) -> ConvBlockConfig:
    primitive, full = resolve(name, genes)
    made = primitive.configure(Site(width), full)
    assert isinstance(made, ConvBlockConfig)
    return made


def build(name: str, **genes: Gene) -> ConvBlock:
    """The block with every parameter drawn, also those that start at 0, 1 or next to it."""
    torch.manual_seed(0)
    module = config(name, **genes).build()
    for parameter in module.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter)
    return module


def tokens(length: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, length, WIDTH, generator=generator, dtype=torch.float64).to(dtype)


def error(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()


def same_with_gradients(ours: nn.Module, theirs: nn.Module, x: Tensor) -> None:
    """Equal outputs, and equal gradients of the input and of the depthwise convolution."""
    mine, yours = x.clone().requires_grad_(), x.clone().requires_grad_()
    cotangent = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    y, reference = ours(mine)[0], theirs(yours)
    assert error(y, reference) < 1e-5
    (y * cotangent).sum().backward()
    (reference * cotangent).sum().backward()
    assert mine.grad is not None
    assert yours.grad is not None
    assert error(mine.grad, yours.grad) < 1e-5
    weights = [p.grad for n, p in ours.named_parameters() if n == "conv.weight"]
    depthwise = [p.grad for n, p in theirs.named_parameters() if "conv.weight" in n and p.ndim > 2]
    depthwise = [g for g in depthwise if g is not None and g.shape[1] == 1]
    assert weights[0] is not None
    assert len(depthwise) == 1
    assert error(weights[0], depthwise[0].flatten(1)[:, -weights[0].shape[1] :]) < 1e-5


@torch.no_grad()
def copy_conformer(ours: ConvBlock, theirs: nn.Module) -> None:
    assert ours.entry is not None
    assert ours.norm is not None or ours.conv.bias is not None
    theirs.pointwise_conv1.weight.copy_(ours.entry.weight[..., None])
    theirs.depthwise_conv.weight.copy_(ours.conv.weight[:, None])
    theirs.pointwise_conv2.weight.copy_(ours.exit.weight[..., None])
    theirs.layer_norm = nn.Identity()  # the backbone's norm in a genome


@pytest.mark.parametrize("taps", [3, 31])
@pytest.mark.parametrize("length", LENGTHS)
def test_causal_conformer_is_wav2vec2_berts(length: int, taps: int) -> None:
    ours = build("conformer-conv", taps=taps)
    settings = Wav2Vec2BertConfig(
        hidden_size=WIDTH, conv_depthwise_kernel_size=taps, conformer_conv_dropout=0.0
    )
    theirs = Wav2Vec2BertConvolutionModule(settings)
    copy_conformer(ours, theirs)
    assert ours.norm is not None
    theirs.depthwise_layer_norm.load_state_dict(ours.norm.state_dict())
    same_with_gradients(ours, theirs, tokens(length))


@pytest.mark.parametrize("taps", [3, 31])
@pytest.mark.parametrize("length", LENGTHS)
@torch.no_grad()
def test_centred_conformer_is_wav2vec2_conformers(length: int, taps: int) -> None:
    """BatchNorm with fixed statistics is a scale and a shift per channel, which fold into the
    convolution: norm=none with biases must be it, token by token."""
    ours = build("conformer-conv", taps=taps, causal=False, norm="none", bias=True)
    settings = Wav2Vec2ConformerConfig(
        hidden_size=WIDTH,
        conv_depthwise_kernel_size=taps,
        conformer_conv_dropout=0.0,
        hidden_act="swish",
    )
    theirs = Wav2Vec2ConformerConvolutionModule(settings).eval()
    for linear in (ours.entry, ours.exit):
        assert linear is not None
        linear.bias.zero_()
    copy_conformer(ours, theirs)
    batch_norm = theirs.batch_norm
    for values in (batch_norm.weight, batch_norm.running_mean, batch_norm.bias):
        nn.init.normal_(values)
    batch_norm.running_var.uniform_(0.5, 2.0)
    scale = batch_norm.weight / (batch_norm.running_var + batch_norm.eps).sqrt()
    assert ours.conv.bias is not None
    ours.conv.weight.mul_(scale[:, None])
    ours.conv.bias.copy_(batch_norm.bias - batch_norm.running_mean * scale)
    x = tokens(length)
    assert error(ours(x)[0], theirs(x)) < 1e-5


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", LENGTHS)
def test_convnext_is_transformers_on_a_line(length: int, causal: bool) -> None:
    """A picture one pixel high leaves the middle row of the 7 by 7 kernel; zeros over later tokens
    make it causal."""
    ours = build("convnext", taps=4 if causal else 7, causal=causal)
    theirs = ConvNextLayer(ConvNextConfig(hidden_act="gelu"), WIDTH)
    theirs.layernorm.eps = 1e-5  # ours, in the place of 1e-6
    with torch.no_grad():
        theirs.dwconv.weight.zero_()
        theirs.dwconv.weight[:, 0, 3, : ours.config.taps].copy_(ours.conv.weight)
        theirs.dwconv.bias.copy_(ours.conv.bias)
        assert ours.norm is not None
        assert ours.up is not None
        theirs.layernorm.load_state_dict(ours.norm.state_dict())
        theirs.pwconv1.load_state_dict(ours.up.state_dict())
        theirs.pwconv2.load_state_dict(ours.exit.state_dict())
        theirs.layer_scale_parameter.copy_(ours.scale)

    class Line(nn.Module):
        """(B, T, D) through the layer, without its residual."""

        def forward(self, x: Tensor) -> Tensor:
            picture = x.mT[:, :, None]
            return (theirs(picture) - picture).squeeze(2).mT

    mine, yours = tokens(length).requires_grad_(), tokens(length).requires_grad_()
    cotangent = torch.randn(mine.shape, generator=torch.Generator().manual_seed(2))
    y, reference = ours(mine)[0], Line()(yours)
    assert error(y, reference) < 1e-5
    (y * cotangent).sum().backward()
    (reference * cotangent).sum().backward()
    assert mine.grad is not None
    assert yours.grad is not None
    assert error(mine.grad, yours.grad) < 1e-5
    ours_grad, theirs_grad = ours.conv.weight.grad, theirs.dwconv.weight.grad
    assert ours_grad is not None
    assert theirs_grad is not None
    assert error(ours_grad, theirs_grad[:, 0, 3, : ours.config.taps]) < 1e-5


def by_the_formula(module: ConvBlock, x: Tensor) -> Tensor:
    """Token by token, as the docstring of conv_block.py writes the three papers' formulas."""
    c = module.config
    weights = dict(module.named_parameters())

    def linear(name: str, v: Tensor) -> Tensor:
        y = weights[f"{name}.weight"] @ v
        return y + weights[f"{name}.bias"] if f"{name}.bias" in weights else y

    def norm(name: str, v: Tensor) -> Tensor:
        if f"{name}.weight" not in weights:
            return v
        if c.norm == "rmsnorm":
            return v / (v.square().mean() + 1e-6).sqrt() * weights[f"{name}.weight"]
        spread = ((v - v.mean()).square().mean() + 1e-5).sqrt()
        return (v - v.mean()) / spread * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    act = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu}[c.activation]
    batch, length, _ = x.shape
    out = torch.zeros_like(x)
    first = -(c.taps - 1) if c.causal else -((c.taps - 1) // 2)
    for b in range(batch):
        entered = []
        for t in range(length):
            u = x[b, t] if c.entry == "none" else linear("entry", x[b, t])
            if c.entry == "glu":
                u = u[: c.inner] * torch.sigmoid(u[c.inner :])
            entered.append(u)
        for t in range(length):
            u = torch.zeros(c.inner, dtype=x.dtype)
            for w in range(c.taps):
                if 0 <= t + first + w < length:
                    u = u + weights["conv.weight"][:, w] * entered[t + first + w]
            if "conv.bias" in weights:
                u = u + weights["conv.bias"]
            if c.middle == "act-norm":
                u = norm("norm", act(u))
            elif c.middle == "norm":
                u = norm("norm", u)
            elif c.middle == "norm-act":
                u = act(norm("norm", u))
            if c.shortcut:
                u = u + x[b, t]
            if c.exit == "mlp":
                y = linear("exit", act(linear("up", u)))
            elif c.exit == "act-norm":
                y = norm("exit_norm", act(linear("exit", u)))
            else:
                y = linear("exit", u)
            out[b, t] = y * weights["scale"] if "scale" in weights else y
    return out


CASES: list[tuple[str, dict[str, Gene]]] = [
    ("conformer-conv", {"taps": 7}),
    ("convmixer", {}),
    ("convmixer", {"taps": 4, "norm": "rmsnorm"}),
    ("convnext", {"taps": 2, "activation": "relu"}),
    ("conv-block", {"entry": "linear", "expand": 2.0, "middle": "none", "exit": "mlp"}),
    ("conv-block", {"expand": 0.5, "middle": "act-norm", "scale": 0.1, "bias": True}),
    ("conv-block", {"shortcut": True, "norm": "none", "exit": "act-norm", "taps": 40}),
]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("name", "genes"), CASES, ids=str)
def test_a_block_is_its_formula(name: str, genes: dict[str, Gene], causal: bool) -> None:
    """Outputs and every gradient in float64, with even and odd numbers of taps."""
    module = build(name, causal=causal, **genes).double()
    x = tokens(11, torch.float64)
    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    gradients = []
    for form in (lambda v: module(v)[0], lambda v: by_the_formula(module, v)):
        module.zero_grad()
        leaf = x.clone().requires_grad_()
        y = form(leaf)
        (y * weight).sum().backward()
        gradients.append([y, leaf.grad, *(p.grad for p in module.parameters())])
    for got, wanted in zip(*gradients, strict=True):
        assert got is not None
        assert wanted is not None
        assert error(got, wanted) < 1e-10


@pytest.mark.parametrize(("taps", "before", "after"), [(2, 0, 1), (7, 3, 3), (8, 3, 4)])
def test_a_centred_convolution_sees_as_many_on_both_sides(
    taps: int, before: int, after: int
) -> None:
    module = build("conv-block", causal=False, taps=taps).double()
    x = tokens(20, torch.float64).requires_grad_()
    (gradient,) = torch.autograd.grad(module(x)[0][:, 10].square().sum(), x)
    reached = [t for t in range(20) if gradient[:, t].abs().max() > 0]
    assert reached == list(range(10 - before, 10 + after + 1))


def test_a_centred_block_has_no_state() -> None:
    module = build("conformer-conv", causal=False)
    with pytest.raises(BidirectionalError):
        module.init_state(1, 8, torch.float32)
    with pytest.raises(BidirectionalError):
        module(tokens(2), State())
    assert module.config.cost(64, torch.float32).state_bytes == 0


def test_what_does_not_go_together_is_refused() -> None:
    with pytest.raises(GeneError, match="expand=2 needs an entry that widens; entry is none"):
        config("convnext", expand=2.0)
    with pytest.raises(GeneError, match="shortcut adds 48 channels to 96"):
        config("conv-block", expand=2.0, shortcut=True)


def test_cost_of_conformer_large() -> None:
    """Conformer L (table 1): width 512, 32 taps."""
    cost = config("conformer-conv", 512, taps=32).cost(1024, torch.bfloat16)
    assert cost.params == 2 * 512 * 512 + 512 * 32 + 2 * 512 + 512 * 512
    assert cost.state_bytes == 31 * 512 * 2
