"""The delta rule: its points against transformers' layer and against float64 loops.

Tolerances as in test_recurrence.py: 1e-5 of the output's scale in float32, 1e-10 in float64.
"""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache, Qwen3NextConfig
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

from mendel.primitives.base import Gene, GeneError, Site
from mendel.primitives.catalogue import resolve
from mendel.primitives.recurrence.delta import Delta, DeltaConfig


def config(name: str, width: int = 64, **genes: Gene) -> DeltaConfig:
    primitive, full = resolve(name, genes)
    made = primitive.configure(Site(width), full)
    assert isinstance(made, DeltaConfig)
    return made


def build(name: str, **genes: Gene) -> Delta:
    """The layer with every parameter away from its start."""
    torch.manual_seed(0)
    module = config(name, **genes).build()
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return module


def tokens(length: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, length, 64, generator=generator, dtype=torch.float64).to(dtype)


def error(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()


def gated_delta_net_of_transformers(
    ours: Delta,
) -> tuple[Qwen3NextGatedDeltaNet, Qwen3NextConfig]:
    """Qwen3NextGatedDeltaNet with our weights: it keeps the rows of a key head together."""
    c = ours.config
    theirs_config = Qwen3NextConfig(
        hidden_size=c.width,
        linear_num_value_heads=c.heads,
        linear_num_key_heads=c.groups,
        linear_key_head_dim=c.key_dim,
        linear_value_head_dim=c.value_dim,
        linear_conv_kernel_dim=c.conv,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
        rms_norm_eps=1e-6,
        vocab_size=32,
    )
    theirs = Qwen3NextGatedDeltaNet(theirs_config, 0).eval()
    keys = c.groups * c.key_dim
    q, k, v, z, beta, decay = ours.in_proj.weight.detach().split(
        [keys, keys, c.inner, c.inner, c.heads, c.heads]
    )
    by_group = [t.view(c.groups, -1, c.width) for t in (q, k, v, z, beta, decay)]
    assert ours.conv is not None
    assert ours.dt is not None
    copies = {
        "in_proj_qkvz.weight": torch.cat(by_group[:4], 1).flatten(0, 1),
        "in_proj_ba.weight": torch.cat(by_group[4:], 1).flatten(0, 1),
        "conv1d.weight": ours.conv.weight[:, None],
        "A_log": ours.dt.A_log,
        "dt_bias": ours.dt.bias,
        "norm.weight": ours.norm.weight,
        "out_proj.weight": ours.out_proj.weight,
    }
    theirs.load_state_dict({name: t.detach() for name, t in copies.items()})
    return theirs, theirs_config


@pytest.mark.parametrize("groups", [0, 2])
@pytest.mark.parametrize("length", [1, 5, 37, 130])
def test_gated_deltanet_is_the_layer_of_transformers(length: int, groups: int) -> None:
    ours = build("gated-deltanet", groups=groups)
    theirs, theirs_config = gated_delta_net_of_transformers(ours)
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
        reference = theirs(x, cache_params=cache)
        y, state = ours(x, ours.init_state(2, length, x.dtype))
        assert error(y, reference) < 1e-5
        assert state is not None
        assert error(state.tensors["matrix"], cache.get_recurrent_state(0, state_idx=0)) < 1e-5
        # transformers keeps one input more than the next call needs.
        tail = cache.get_conv_state(0, state_idx=0)[:, :, 1:]
        assert error(state.tensors["conv"], tail) < 1e-5
        step = tokens(length + 1)[:, -1:]
        assert error(ours(step, state)[0], theirs(step, cache_params=cache)) < 1e-5


@pytest.mark.parametrize("negative", [False, True])
@pytest.mark.parametrize("name", ["deltanet", "gated-deltanet"])
def test_points_are_the_loop_of_the_paper(name: str, negative: bool) -> None:
    """S = a S (I - beta k k^T) + beta v k^T as matrices (2406.06484, 2412.06464, eq. 10)."""
    ours = build(name, negative_eigenvalues=negative).double()
    c, length = ours.config, 19
    x = tokens(length, torch.float64)
    assert ours.conv is not None
    keys = c.heads * c.key_dim
    qkv, z, beta, decay = torch.split(x @ ours.in_proj.weight.T, c.splits, -1)
    windows = F.pad(qkv, (0, 0, c.conv - 1, 0)).unfold(1, c.conv, 1)
    mixed = (windows * ours.conv.weight).sum(-1)
    q, k, v = (mixed * torch.sigmoid(mixed)).split([keys, keys, c.inner], -1)
    q, k, v = (t.view(2, length, c.heads, -1) for t in (q, k, v))
    q, k = (t / torch.sqrt(t.square().sum(-1, keepdim=True) + 1e-6) for t in (q, k))
    strength = (1 + negative) * torch.sigmoid(beta)
    alpha = torch.ones_like(strength)
    if ours.dt is not None:
        step = torch.log1p(torch.exp(decay + ours.dt.bias))
        alpha = torch.exp(-ours.dt.A_log.exp() * step)
    eye = torch.eye(c.key_dim, dtype=torch.float64)
    S = x.new_zeros(2, c.heads, c.value_dim, c.key_dim)
    o = []
    for t in range(length):
        kt, b = k[:, t, :, :, None], strength[:, t, :, None, None]
        S = alpha[:, t, :, None, None] * S @ (eye - b * kt @ kt.mT)
        S = S + b * v[:, t, :, :, None] @ kt.mT
        o.append((S @ q[:, t, :, :, None])[..., 0] / c.key_dim**0.5)
    read = torch.stack(o, 1)
    read = read / torch.sqrt(read.square().mean(-1, keepdim=True) + 1e-6) * ours.norm.weight
    y = read.flatten(2)
    if c.gate == "silu":
        y = y * z * torch.sigmoid(z)
    assert error(ours(x)[0], y @ ours.out_proj.weight.T) < 1e-10
    _, state = ours(x, ours.init_state(2, length, x.dtype))
    assert state is not None
    assert error(state.tensors["matrix"], S.mT) < 1e-10


def test_a_second_write_under_a_key_replaces_the_first() -> None:
    """What the delta rule is for: with beta = 1 and no decay the state holds the last value."""
    module = build("delta", conv=0, activation="none", gate="none", norm="none", heads=1).double()
    c = module.config
    assert (c.key_dim, c.value_dim) == (64, 64)
    with torch.no_grad():
        module.in_proj.weight.zero_()
        module.in_proj.weight[:64, :32] = torch.eye(64, 32)  # q
        module.in_proj.weight[64:128, :32] = torch.eye(64, 32)  # k
        module.in_proj.weight[128:192, 32:] = torch.eye(64, 32)  # v
        module.in_proj.weight[-1, 0] = 1e3  # beta = sigmoid(1e3) = 1 for keys with x_0 = 1
        module.out_proj.weight.copy_(torch.eye(64))
    x = torch.zeros(1, 3, 64, dtype=torch.float64)
    x[0, :, 0] = 1
    x[0, 0, 40], x[0, 1, 50], x[0, 2, 50] = 5.0, 7.0, 7.0
    _, state = module(x, module.init_state(1, 3, x.dtype))
    assert state is not None
    held = state.tensors["matrix"][0, 0, 0]
    assert held[50 - 32].item() == pytest.approx(7.0, rel=1e-5)
    assert abs(held[40 - 32].item()) < 1e-4


@pytest.mark.parametrize("norm", ["l2", "l1"])
@pytest.mark.parametrize("shift", [-30.0, 30.0])
def test_extreme_decays_and_betas(shift: float, norm: str) -> None:
    """Decays of 0 and 1 and beta up to 2: the state stays bounded over many tokens."""
    module = build("gated-deltanet", negative_eigenvalues=True, qk_norm=norm)
    assert module.dt is not None
    with torch.no_grad():
        module.dt.A_log.add_(shift)
        module.in_proj.weight[-8:-4].mul_(100)
    x = tokens(200)
    y, state = module(x, module.init_state(2, 200, x.dtype))
    assert state is not None
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())
    assert state.tensors["matrix"].abs().max() < 1e3


def test_sizes_of_the_points() -> None:
    """Qwen3-Next's layer: 32 value heads and 16 key heads of 128 at width 2048."""
    made = config("gated-deltanet", 2048, key_dim=128, groups=16)
    assert (made.heads, made.value_dim) == (32, 128)
    cost = made.cost(4096, torch.bfloat16)
    assert cost.params == 2048 * (2 * 2048 + 3 * 4096 + 64) + 4 * 8192 + 64 + 128
    assert cost.state_bytes == 32 * 128 * 128 * 4 + 3 * 8192 * 2


def test_a_layer_between_the_points() -> None:
    between = config("deltanet", decay="scalar")
    assert between not in (config("deltanet"), config("gated-deltanet"))
    assert between.build()(tokens(5))[0].isfinite().all()


@pytest.mark.parametrize(
    ("genes", "sentence"),
    [
        ({"heads": 3}, "heads=3 does not divide the inner width 64"),
        ({"groups": 3}, "groups=3 does not divide the 4 heads"),
        ({"expand": 1.01}, "no whole number of channels"),
    ],
)
def test_what_does_not_divide_is_refused(genes: dict[str, Gene], sentence: str) -> None:
    with pytest.raises(GeneError, match=sentence):
        config("delta", **genes)
