"""The matrix-state recurrence: its points against independent layers and loops.

Tolerances: against transformers, which adds chunks of other lengths in float32, 1e-5 of the
output's scale (a sum of n float32 terms errs by about sqrt(n) * 2^-24, n < 10^4 here). Against the
float64 loops 1e-10 for the same reason.
"""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache, Mamba2Config
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

from mendel.primitives.base import Gene, GeneError, Site
from mendel.primitives.catalogue import resolve
from mendel.primitives.decays import InputDecay
from mendel.primitives.recurrence.matrix_state import Recurrence, RecurrenceConfig


def config(name: str, width: int = 64, **genes: Gene) -> RecurrenceConfig:
    primitive, full = resolve(name, genes)
    made = primitive.configure(Site(width), full)
    assert isinstance(made, RecurrenceConfig)
    return made


def build(name: str, **genes: Gene) -> Recurrence:
    """The layer with every parameter away from its start (scales that are all one prove little)."""
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


def mamba2_of_transformers(ours: Recurrence) -> tuple[Mamba2Mixer, Mamba2Config]:
    """Mamba2Mixer with our weights."""
    c = ours.config
    theirs_config = Mamba2Config(
        hidden_size=c.width,
        num_heads=c.heads,
        head_dim=c.value_dim,
        state_size=c.key_dim,
        expand=2,
        n_groups=c.groups,
        conv_kernel=c.conv,
        num_hidden_layers=1,
        chunk_size=16,
        vocab_size=32,
    )
    theirs = Mamba2Mixer(theirs_config, 0).eval()
    assert ours.conv is not None
    assert ours.conv.bias is not None
    assert ours.dt is not None
    assert ours.skip is not None
    copies = {
        "in_proj.weight": ours.in_proj.weight,
        "conv1d.weight": ours.conv.weight[:, None],
        "conv1d.bias": ours.conv.bias,
        "A_log": ours.dt.A_log,
        "dt_bias": ours.dt.bias,
        "D": ours.skip,
        "norm.weight": ours.norm.weight,
        "out_proj.weight": ours.out_proj.weight,
    }
    theirs.load_state_dict({k: v.detach() for k, v in copies.items()})
    return theirs, theirs_config


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("length", [1, 5, 37, 130])
def test_mamba2_is_the_mixer_of_transformers(length: int, groups: int) -> None:
    ours = build("mamba2", groups=groups)
    theirs, theirs_config = mamba2_of_transformers(ours)
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
        matrix = cache.get_recurrent_state(0, state_idx=0).transpose(2, 3)
        assert error(state.tensors["matrix"], matrix) < 1e-5
        # transformers keeps one input more than the next call needs.
        tail = cache.get_conv_state(0, state_idx=0)[:, :, 1:]
        assert error(state.tensors["conv"], tail) < 1e-5
        step = tokens(length + 1)[:, -1:]
        assert error(ours(step, state)[0], theirs(step, cache_params=cache)) < 1e-5


def test_mamba2_is_the_loop_of_the_paper() -> None:
    """The selective state space model with scalar A (arXiv 2405.21060), token by token."""
    ours = build("mamba2", groups=2).double()
    c, length = ours.config, 19
    x = tokens(length, torch.float64)
    assert ours.conv is not None
    assert ours.conv.bias is not None
    assert ours.dt is not None
    assert ours.skip is not None
    keys = c.groups * c.key_dim
    z, xbc, dt = torch.split(x @ ours.in_proj.weight.T, [c.inner, c.inner + 2 * keys, c.heads], -1)
    padded = F.pad(xbc, (0, 0, c.conv - 1, 0))
    windows = padded.unfold(1, c.conv, 1)
    u, b, r = F.silu((windows * ours.conv.weight).sum(-1) + ours.conv.bias).split(
        [c.inner, keys, keys], -1
    )
    delta = torch.log1p(torch.exp(dt + ours.dt.bias))
    S = x.new_zeros(2, c.heads, c.key_dim, c.value_dim)
    per_group = c.heads // c.groups
    outputs = []
    for t in range(length):
        y = []
        S = S.clone()
        for h in range(c.heads):
            g = slice(h // per_group * c.key_dim, (h // per_group + 1) * c.key_dim)
            value = u[:, t, h * c.value_dim : (h + 1) * c.value_dim]
            step = delta[:, t, h, None, None]
            decay = torch.exp(-step * ours.dt.A_log[h].exp())
            S[:, h] = decay * S[:, h] + step * b[:, t, g, None] * value[:, None]
            y.append((S[:, h] * r[:, t, g, None]).sum(1) + ours.skip[h] * value)
        gated = torch.cat(y, -1) * z[:, t] * torch.sigmoid(z[:, t])
        parts = gated.view(2, c.groups, -1)
        normed = parts / torch.sqrt(parts.square().mean(-1, keepdim=True) + 1e-5)
        outputs.append((normed.flatten(1) * ours.norm.weight) @ ours.out_proj.weight.T)
    assert error(ours(x)[0], torch.stack(outputs, 1)) < 1e-10
    _, state = ours(x, ours.init_state(2, length, x.dtype))
    assert state is not None
    assert error(state.tensors["matrix"], S) < 1e-10


@pytest.mark.parametrize("heads", [2, 4])
def test_retnet_is_the_loop_of_the_paper(heads: int) -> None:
    """Multi-scale retention in its recurrent form (arXiv 2307.08621, eq. 6 and 8), complex."""
    ours = build("retnet", heads=heads).double()
    c, length = ours.config, 23
    assert (c.heads, c.key_dim, c.value_dim) == (heads, 64 // heads, 128 // heads)
    x = tokens(length, torch.float64)
    g, v, k, q = torch.split(x @ ours.in_proj.weight.T, [128, 128, 64, 64], -1)
    v = v.view(2, length, heads, -1)
    qc, kc = (torch.view_as_complex(t.reshape(2, length, heads, -1, 2)) for t in (q, k))
    theta = 10000.0 ** (-torch.arange(0, c.key_dim, 2, dtype=torch.float64) / c.key_dim)
    gamma = 1 - 2.0 ** (-5 - torch.arange(heads, dtype=torch.float64))
    S = torch.zeros(2, heads, c.key_dim // 2, c.value_dim, dtype=torch.complex128)
    o = []
    for n in range(length):
        turn = torch.exp(1j * n * theta)
        written = (kc[:, n] * turn).conj()[..., None] * v[:, n, :, None]
        S = gamma[:, None, None] * S + written
        o.append(((qc[:, n] * turn)[..., None] * S).sum(2).real / c.key_dim**0.5)
    read = torch.stack(o, 1).reshape(2 * length, -1)
    normed = F.group_norm(read, heads, ours.norm.weight, ours.norm.bias, 1e-5)
    y = (g * torch.sigmoid(g) * normed.view(2, length, -1)) @ ours.out_proj.weight.T
    assert error(ours(x)[0], y) < 1e-10


def test_linear_attention_is_the_loop_of_the_paper() -> None:
    """S and z of arXiv 2006.16236, eq. 18-20, with phi = elu + 1."""
    ours = build("linear-attention").double()
    c, length = ours.config, 21
    x = tokens(length, torch.float64)
    v, k, q = (t.view(2, length, 4, 16) for t in (x @ ours.in_proj.weight.T).split(64, -1))
    q, k = (torch.where(t > 0, t + 1, torch.exp(t)) for t in (q, k))
    S, z = x.new_zeros(2, 4, 16, 16), x.new_zeros(2, 4, 16)
    o = []
    for t in range(length):
        S = S + k[:, t, :, :, None] * v[:, t, :, None, :]
        z = z + k[:, t]
        total = (q[:, t] * z).sum(-1, keepdim=True)
        o.append((q[:, t, :, :, None] * S).sum(2) / total)
    y = torch.stack(o, 1).flatten(2) @ ours.out_proj.weight.T
    assert error(ours(x)[0], y) < 1e-10
    _, state = ours(x, ours.init_state(2, length, x.dtype))
    assert state is not None
    assert error(state.tensors["matrix"], torch.cat((S, z[..., None]), -1)) < 1e-10
    assert c.cost(9, torch.bfloat16).state_bytes == 4 * 16 * 17 * 4


def test_sigmoid_decay_is_its_formula() -> None:
    """Scalar decay sigmoid(x)^(1/16), without gate and norm, as a sum over all pairs."""
    ours = build("recurrence", decay_form="sigmoid", gate="none", norm="none", heads=2).double()
    x = tokens(15, torch.float64)
    v, k, q, d = torch.split(x @ ours.in_proj.weight.T, [128, 64, 64, 2], -1)
    v, k, q = (t.view(2, 15, 2, -1) for t in (v, k, q))
    assert isinstance(ours.decay, InputDecay)
    total = (torch.sigmoid(d + ours.decay.bias[:, 0]) ** (1 / 16)).log().cumsum(1).transpose(1, 2)
    weight = torch.exp(total[..., :, None] - total[..., None, :]).tril()
    scores = torch.einsum("bthk,bshk->bhts", q, k) * weight / 32**0.5
    o = torch.einsum("bhts,bshv->bthv", scores, v).flatten(2)
    assert error(ours(x)[0], o @ ours.out_proj.weight.T) < 1e-10


@pytest.mark.parametrize(
    ("width", "depth", "total"),
    [
        (768, 24, 128_989_632),
        (1024, 48, 368_346_624),
        (1536, 48, 780_161_280),
        (2048, 48, 1_343_757_312),
        (2560, 64, 2_702_599_680),
    ],
)
def test_parameters_of_the_published_mamba2_models(width: int, depth: int, total: int) -> None:
    """Released models: a layer and its norm per block, a last norm, 50,288 tied embeddings."""
    layer = config("mamba2", width).cost(1, torch.float32).params
    assert depth * (layer + width) + width + 50_288 * width == total


def test_parameters_of_the_published_retnet_layer() -> None:
    """8 d^2 per layer beside the norm (arXiv 2307.08621, section 3.1)."""
    made = config("retnet", 2048, heads=8)
    assert (made.key_dim, made.value_dim) == (256, 512)
    assert made.cost(1, torch.float32).params == 8 * 2048**2 + 2 * 4096


def test_state_bytes_of_mamba2_at_a_published_size() -> None:
    """64 heads of (128, 64) in float32 and 3 inputs of 4096 + 2 * 128 channels in bf16."""
    cost = config("mamba2", 2048).cost(4096, torch.bfloat16)
    assert cost.state_bytes == 64 * 128 * 64 * 4 + 3 * (4096 + 256) * 2


@pytest.mark.parametrize("shift", [-30.0, 30.0])
@pytest.mark.parametrize("parameter", ["A_log", "bias"])
def test_extreme_decays(parameter: str, shift: float) -> None:
    """Decays of 0 and of 1: finite, and the steps still agree with the whole."""
    module = build("mamba2")
    assert module.dt is not None
    with torch.no_grad():
        getattr(module.dt, parameter).add_(shift)
    x = tokens(70)
    y = module(x)[0]
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())
    state = module.init_state(2, 70, x.dtype)
    steps = []
    with torch.no_grad():
        for t in range(70):
            out, next_state = module(x[:, t : t + 1], state)
            assert next_state is not None
            steps.append(out)
            state = next_state
    assert error(torch.cat(steps, 1), y.detach()) < 1e-5


def test_rotation_far_from_the_start_keeps_its_digits() -> None:
    """Only distances matter to q and k, so a shifted sequence has the same read-outs."""
    module = build("retnet")
    x = tokens(9)
    with torch.no_grad():
        near = module.init_state(2, 9, x.dtype)
        far = module.init_state(2, 9, x.dtype)
        far.length = 1_000_003
        assert error(module(x, far)[0], module(x, near)[0]) < 1e-5


def test_a_layer_between_the_points() -> None:
    """RetNet with Mamba-2's convolution: neither point, and the convolution matters."""
    plain, between = config("retnet"), config("retnet", conv=4)
    assert between not in (plain, config("mamba2"))
    assert between.decay == "fixed"
    module = build("retnet", conv=4)
    x = tokens(8)
    y = module(x)[0]
    assert module.conv is not None
    with torch.no_grad():
        module.conv.weight[:, :-1] = 0
    assert error(module(x)[0], y) > 1e-2


def test_a_form_of_decay_that_is_not_there_makes_no_difference() -> None:
    assert config("retnet", decay_form="sigmoid") == config("retnet")


@pytest.mark.parametrize(
    ("genes", "sentence"),
    [
        ({"heads": 3}, "heads=3 does not divide the inner width 128"),
        ({"groups": 3}, "groups=3 does not divide the 4 heads"),
        ({"expand": 1.01}, "no whole number of channels"),
        ({"rotary": True, "key_dim": 15}, "key_dim=15 is odd"),
        ({"normaliser": True}, "must be positive"),
        ({"normaliser": True, "feature": "elu+1", "rotary": True}, "rotary=false"),
        ({"feature": "taylor", "key_dim": 64}, "key_dim=64 is above 32"),
        ({"feature": "hedgehog", "decay": "vector"}, "decay=vector is one per key channel"),
    ],
)
def test_what_does_not_divide_is_refused(genes: dict[str, Gene], sentence: str) -> None:
    with pytest.raises(GeneError, match=sentence):
        config("recurrence", **genes)
