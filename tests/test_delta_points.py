"""Kimi Delta Attention and DeltaProduct: against transformers' layer and float64 loops.

Tolerances as in test_recurrence.py: 1e-5 of the output's scale in float32, 1e-10 in float64.
"""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache, KimiLinearConfig
from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearDeltaAttention

from mendel.primitives.base import Gene, Site
from mendel.primitives.catalogue import resolve
from mendel.primitives.recurrence.delta import Delta, DeltaConfig, delta_product


def build(name: str, **genes: Gene) -> Delta:
    """The layer with every parameter away from its start."""
    primitive, full = resolve(name, genes)
    made = primitive.configure(Site(64), full)
    assert isinstance(made, DeltaConfig)
    torch.manual_seed(0)
    module = made.build()
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return module


def tokens(length: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, length, 64, generator=generator, dtype=torch.float64).to(dtype)


def error(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()


def kimi_of_transformers(ours: Delta) -> tuple[KimiLinearDeltaAttention, KimiLinearConfig]:
    c = ours.config
    theirs_config = KimiLinearConfig(
        hidden_size=c.width,
        linear_num_heads=c.heads,
        linear_head_dim=c.key_dim,
        linear_conv_kernel_dim=c.conv,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
        rms_norm_eps=1e-6,
        vocab_size=32,
    )
    theirs = KimiLinearDeltaAttention(theirs_config, 0).eval()
    rows = torch.split(ours.in_proj.weight.detach(), [64, 64, 64, *c.splits[1:]])
    assert ours.conv is not None
    assert ours.decay is not None
    assert ours.decay.up is not None
    assert ours.gate_up is not None
    copies = {
        "q_proj.weight": rows[0],
        "k_proj.weight": rows[1],
        "v_proj.weight": rows[2],
        "g_a_proj.weight": rows[3],
        "b_proj.weight": rows[4],
        "forget_gate.f_a_proj.weight": rows[5],
        "forget_gate.f_b_proj.weight": ours.decay.up.weight,
        "forget_gate.dt_bias": ours.decay.bias.flatten(),
        "forget_gate.A_log": ours.decay.A_log.view(1, 1, -1, 1),
        "g_b_proj.weight": ours.gate_up.weight,
        "conv1d.weight": ours.conv.weight[:, None],
        "o_norm.weight": ours.norm.weight,
        "o_proj.weight": ours.out_proj.weight,
    }
    theirs.load_state_dict({name: t.detach() for name, t in copies.items()})
    return theirs, theirs_config


@pytest.mark.parametrize("length", [1, 5, 37, 130])
def test_kda_is_the_layer_of_transformers(length: int) -> None:
    ours = build("kda")
    theirs, theirs_config = kimi_of_transformers(ours)
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
        step = tokens(length + 1)[:, -1:]
        assert error(ours(step, state)[0], theirs(step, cache_params=cache)) < 1e-5


def mixed_by_hand(ours: Delta, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(q, k, v) after convolution and SiLU, then gate, beta and decay inputs."""
    assert ours.conv is not None
    mixed, z, beta, decay = torch.split(x @ ours.in_proj.weight.T, ours.config.splits, -1)
    windows = F.pad(mixed, (0, 0, ours.config.conv - 1, 0)).unfold(1, ours.config.conv, 1)
    mixed = (windows * ours.conv.weight).sum(-1)
    return mixed * torch.sigmoid(mixed), z, torch.sigmoid(beta), decay


def unit(t: Tensor) -> Tensor:
    return t / torch.sqrt(t.square().sum(-1, keepdim=True) + 1e-6)


def normed(ours: Delta, o: list[Tensor]) -> Tensor:
    read = torch.stack(o, 1)
    read = read / torch.sqrt(read.square().mean(-1, keepdim=True) + 1e-6) * ours.norm.weight
    return read.flatten(2)


def test_kda_is_the_loop_of_the_paper() -> None:
    """S = (I - beta k k^T) Diag(alpha) S + beta k v^T as matrices (arXiv 2510.26692, eq. 1)."""
    ours = build("kda", negative_eigenvalues=True).double()
    c, length = ours.config, 19
    x = tokens(length, torch.float64)
    assert ours.decay is not None
    assert ours.decay.up is not None
    assert ours.gate_up is not None
    qkv, z, beta, low = mixed_by_hand(ours, x)
    q, k, v = (t.view(2, length, c.heads, -1) for t in qkv.split(64, -1))
    q, k, beta = unit(q), unit(k), 2 * beta
    step = (low @ ours.decay.up.weight.T).view(2, length, c.heads, -1) + ours.decay.bias
    alpha = torch.exp(-ours.decay.A_log.exp() * torch.log1p(torch.exp(step)))
    eye = torch.eye(c.key_dim, dtype=torch.float64)
    S = x.new_zeros(2, c.heads, c.key_dim, c.value_dim)
    o = []
    for t in range(length):
        kt, b = k[:, t, :, :, None], beta[:, t, :, None, None]
        S = (eye - b * kt @ kt.mT) @ (alpha[:, t, :, :, None] * S)
        S = S + b * kt @ v[:, t, :, None]
        o.append((S.mT @ q[:, t, :, :, None])[..., 0] / c.key_dim**0.5)
    y = normed(ours, o) * torch.sigmoid(z @ ours.gate_up.weight.T)
    assert error(ours(x)[0], y @ ours.out_proj.weight.T) < 1e-10
    _, state = ours(x, ours.init_state(2, length, x.dtype))
    assert state is not None
    assert error(state.tensors["matrix"], S) < 1e-10


@pytest.mark.parametrize("decay", ["none", "scalar", "vector"])
@pytest.mark.parametrize("steps", [2, 3])
def test_deltaproduct_is_the_loop_of_the_paper(steps: int, decay: str) -> None:
    """A(x) = prod_j (I - beta_j k_j k_j^T), decayed once per token (arXiv 2502.10297, sec. 3)."""
    ours = build("deltaproduct", steps=steps, decay=decay).double()
    c, length = ours.config, 11
    x = tokens(length, torch.float64)
    qkv, _, beta, raw = mixed_by_hand(ours, x)
    q, k, v = qkv.split([64, steps * 64, steps * 64], -1)
    q = unit(q.view(2, length, c.heads, -1))
    k, v = (t.view(2, length, steps, c.heads, -1) for t in (k, v))
    k, beta = unit(k), 2 * beta.view(2, length, steps, c.heads)
    alpha = x.new_ones(2, length, c.heads, 1)
    if ours.dt is not None:
        alpha = ours.dt(raw)[1].exp()[..., None]
    elif ours.decay is not None:
        alpha = ours.decay(raw)[0].exp()
    eye = torch.eye(c.key_dim, dtype=torch.float64)
    S = x.new_zeros(2, c.heads, c.key_dim, c.value_dim)
    o = []
    for t in range(length):
        S = alpha[:, t, :, :, None] * S
        for j in range(steps):
            kt, b = k[:, t, j, :, :, None], beta[:, t, j, :, None, None]
            S = (eye - b * kt @ kt.mT) @ S + b * kt @ v[:, t, j, :, None]
        o.append((S.mT @ q[:, t, :, :, None])[..., 0] / c.key_dim**0.5)
    assert error(ours(x)[0], normed(ours, o) @ ours.out_proj.weight.T) < 1e-10
    _, state = ours(x[:, :4], ours.init_state(2, length, x.dtype))
    for t in range(4, length):
        _, state = ours(x[:, t : t + 1], state)
    assert state is not None
    assert error(state.tensors["matrix"], S) < 1e-10


def test_a_product_of_two_steps_can_turn_by_any_angle() -> None:
    """Two Householder reflections make a rotation, which one step with beta <= 2 cannot."""
    k = torch.tensor([[1.0, 0.0], [0.8, 0.6]], dtype=torch.float64)
    state = torch.eye(2, dtype=torch.float64)[None, None]
    zeros = torch.zeros(1, 2, 1, 2, dtype=torch.float64)
    beta = torch.full((1, 2, 1), 2.0, dtype=torch.float64)
    _, turned = delta_product(zeros[:, :1], k[None, :, None], zeros, beta, None, state)
    assert torch.linalg.det(turned[0, 0]).item() == pytest.approx(1.0)
    assert turned[0, 0].trace().item() == pytest.approx(2 * (2 * 0.8**2 - 1))
