"""Mamba's selective scan: against transformers' mixers, and float64 loops.

Tolerances as in test_recurrence.py: 1e-5 of the output's scale in float32, 1e-10 in float64.
"""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache, JambaConfig, MambaConfig
from transformers.models.jamba.modeling_jamba import JambaMambaMixer
from transformers.models.mamba.modeling_mamba import MambaMixer

from mendel.kernels.backend import use_backend
from mendel.kernels.selective_scan import selective_scan
from mendel.primitives.base import Gene, Site
from mendel.primitives.catalogue import resolve
from mendel.primitives.diagonal.selective import Selective, SelectiveConfig


def config(name: str, width: int = 64, **genes: Gene) -> SelectiveConfig:
    primitive, full = resolve(name, genes)
    made = primitive.configure(Site(width), full)
    assert isinstance(made, SelectiveConfig)
    return made


def build(name: str, **genes: Gene) -> Selective:
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


def copies(ours: Selective) -> dict[str, Tensor]:
    assert ours.conv is not None
    assert ours.conv.bias is not None
    found = {
        "in_proj.weight": ours.in_proj.weight,
        "conv1d.weight": ours.conv.weight[:, None],
        "conv1d.bias": ours.conv.bias,
        "x_proj.weight": ours.select.weight,
        "dt_proj.weight": ours.dt.weight,
        "dt_proj.bias": ours.dt.bias,
        "A_log": ours.A_log,
        "D": ours.skip,
        "out_proj.weight": ours.out_proj.weight,
    }
    if ours.norms is not None:
        for name, norm in zip(["dt", "b", "c"], ours.norms, strict=True):
            found[f"{name}_layernorm.weight"] = norm
    return {name: t.detach() for name, t in found.items()}


@pytest.mark.parametrize("length", [1, 5, 37, 130])
def test_mamba_is_the_mixer_of_transformers(length: int) -> None:
    ours = build("mamba")
    c = ours.config
    theirs_config = MambaConfig(
        hidden_size=64,
        state_size=c.rows,
        expand=2,
        conv_kernel=c.conv,
        time_step_rank=c.rank,
        num_hidden_layers=1,
        vocab_size=32,
    )
    theirs = MambaMixer(theirs_config, 0).eval()
    theirs.load_state_dict(copies(ours))
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
        theirs(x, cache_params=cache)
        _, state = ours(x, ours.init_state(2, length, x.dtype))
        assert state is not None
        assert error(state.tensors["h"], cache.get_recurrent_state(0, state_idx=0)) < 1e-5
        step = tokens(length + 1)[:, -1:]
        assert error(ours(step, state)[0], theirs(step, cache_params=cache)) < 1e-5


@pytest.mark.parametrize("length", [1, 37])
def test_jambas_mamba_is_the_mixer_of_transformers(length: int) -> None:
    ours = build("jamba-mamba")
    c = ours.config
    theirs_config = JambaConfig(
        hidden_size=64,
        mamba_d_state=c.rows,
        mamba_expand=2,
        mamba_d_conv=c.conv,
        mamba_dt_rank=c.rank,
        num_hidden_layers=2,
        rms_norm_eps=1e-6,
        vocab_size=32,
        use_mamba_kernels=False,
    )
    theirs = JambaMambaMixer(theirs_config, 0).eval()
    theirs.load_state_dict(copies(ours))
    x = tokens(length)
    assert error(ours(x)[0], theirs(x)) < 1e-5


def test_mamba_is_the_loop_of_the_paper() -> None:
    """Algorithm 2 of arXiv 2312.00752 with the zero-order hold of A and Euler's step of B."""
    ours = build("mamba").double()
    c, length = ours.config, 13
    x = tokens(length, torch.float64)
    assert ours.conv is not None
    assert ours.conv.bias is not None
    u, z = (x @ ours.in_proj.weight.T).split(128, -1)
    windows = F.pad(u, (0, 0, c.conv - 1, 0)).unfold(1, c.conv, 1)
    u = (windows * ours.conv.weight).sum(-1) + ours.conv.bias
    u = u * torch.sigmoid(u)
    low, B, C = (u @ ours.select.weight.T).split([4, 16, 16], -1)
    dt = torch.log1p(torch.exp(low @ ours.dt.weight.T + ours.dt.bias))
    A = -torch.exp(ours.A_log)
    h = x.new_zeros(2, 128, 16)
    y = []
    for t in range(length):
        step = dt[:, t, :, None]
        h = torch.exp(step * A) * h + step * B[:, t, None] * u[:, t, :, None]
        y.append((h * C[:, t, None]).sum(-1) + ours.skip * u[:, t])
    out = (torch.stack(y, 1) * z * torch.sigmoid(z)) @ ours.out_proj.weight.T
    assert error(ours(x)[0], out) < 1e-10
    _, state = ours(x, ours.init_state(2, length, x.dtype))
    assert state is not None
    assert error(state.tensors["h"], h) < 1e-10


@pytest.mark.parametrize(
    ("width", "depth", "total"),
    [
        (768, 24, 129_135_360),
        (1024, 48, 371_516_416),
        (1536, 48, 793_204_224),
        (2048, 48, 1_372_178_432),
        (2560, 64, 2_768_345_600),
    ],
)
def test_parameters_of_the_published_models(width: int, depth: int, total: int) -> None:
    """Released models: a layer and its norm per block, a last norm, 50,280 tied embeddings."""
    layer = config("mamba", width).cost(1, torch.float32).params
    assert depth * (layer + width) + width + 50_280 * width == total


def scan_inputs(length: int, size: float, dtype: torch.dtype) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(length)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    found = {
        "x": normal(2, length, 5),
        "dt": F.softplus(normal(2, length, 5)) * size,
        "a": -normal(5, 3).exp(),
        "b": normal(2, length, 3),
        "c": normal(2, length, 3),
        "state": normal(2, 5, 3),
    }
    return {name: t.to(dtype) for name, t in found.items()}


@pytest.mark.parametrize("size", [1.0, 1e-4, 1e4])
@pytest.mark.parametrize(
    ("length", "dtype"),
    [(1, torch.float64), (33, torch.float64), (300, torch.float64), (300, torch.float32)],
)
def test_scan_equals_its_definition(length: int, dtype: torch.dtype, size: float) -> None:
    """Outputs, final state and every gradient; 300 tokens are two pieces."""
    found = []
    for backend in ("chunked", "definition"):
        leaves = {n: t.requires_grad_() for n, t in scan_inputs(length, size, dtype).items()}
        with use_backend(backend):  # type: ignore[arg-type]
            y, final = selective_scan(**leaves)
        g = torch.Generator().manual_seed(9)
        weight = torch.randn(y.shape, generator=g, dtype=torch.float64).to(dtype)
        ((y * weight).sum() + final.square().sum()).backward()
        grads = {n: t.grad for n, t in leaves.items()}
        found.append({"y": y.detach(), "final": final.detach(), **grads})
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    for name, right in found[1].items():
        have = found[0][name]
        assert right is not None
        assert have is not None
        assert (have - right).norm() <= tolerance * right.norm() + 1e-30, name
