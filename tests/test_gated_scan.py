"""The diagonal gated recurrence: its points against transformers' block and against loops.

Tolerances as in test_recurrence.py: 1e-5 of the output's scale in float32, 1e-10 in float64.
"""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import RecurrentGemmaConfig
from transformers.models.recurrent_gemma.modeling_recurrent_gemma import (
    RecurrentGemmaRecurrentBlock,
)

from mendel.primitives.base import Gene, GeneError, Site
from mendel.primitives.catalogue import resolve
from mendel.primitives.diagonal.gated_scan import GatedScan, GatedScanConfig


def config(name: str, width: int = 64, **genes: Gene) -> GatedScanConfig:
    primitive, full = resolve(name, genes)
    made = primitive.configure(Site(width), full)
    assert isinstance(made, GatedScanConfig)
    return made


def build(name: str, **genes: Gene) -> GatedScan:
    """The layer with every parameter away from its start (biases start at zero)."""
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


def block_of_transformers(ours: GatedScan) -> RecurrentGemmaRecurrentBlock:
    """RecurrentGemmaRecurrentBlock with our weights."""
    c = ours.config
    theirs = RecurrentGemmaRecurrentBlock(
        RecurrentGemmaConfig(
            hidden_size=c.width,
            lru_width=c.inner,
            num_attention_heads=c.blocks,
            conv1d_width=c.conv,
            num_hidden_layers=1,
        ),
        0,
    )
    assert ours.conv is not None
    assert ours.conv.bias is not None
    assert ours.block_gates is not None
    assert ours.rg_lru is not None
    y, u = ours.in_proj.weight.split(c.inner)
    y_bias, u_bias = ours.in_proj.bias.split(c.inner)
    i, r = ours.block_gates.weight.chunk(2, -1)
    i_bias, r_bias = ours.block_gates.bias.chunk(2, -1)
    copies = {
        "linear_y.weight": y,
        "linear_y.bias": y_bias,
        "linear_x.weight": u,
        "linear_x.bias": u_bias,
        "linear_out.weight": ours.out_proj.weight,
        "linear_out.bias": ours.out_proj.bias,
        "conv_1d.weight": ours.conv.weight[:, None],
        "conv_1d.bias": ours.conv.bias,
        "rg_lru.recurrent_param": ours.rg_lru.decay,
        "rg_lru.input_gate_weight": i,
        "rg_lru.input_gate_bias": i_bias,
        "rg_lru.recurrent_gate_weight": r,
        "rg_lru.recurrent_gate_bias": r_bias,
    }
    theirs.load_state_dict({name: t.detach() for name, t in copies.items()})
    return theirs


@pytest.mark.parametrize("blocks", [1, 4])
@pytest.mark.parametrize("length", [3, 37, 130])
def test_rg_lru_is_the_block_of_transformers(length: int, blocks: int) -> None:
    ours = build("rg-lru", blocks=blocks)
    theirs = block_of_transformers(ours)
    x, position = tokens(length), torch.arange(length).expand(2, -1)
    mine, yours = x.clone().requires_grad_(), x.clone().requires_grad_()
    cotangent = torch.randn(x.shape)
    y = ours(mine)[0]
    reference = theirs(yours, position, None, use_cache=False)[0]
    assert error(y, reference) < 1e-5
    (y * cotangent).sum().backward()
    (reference * cotangent).sum().backward()
    assert mine.grad is not None
    assert yours.grad is not None
    assert error(mine.grad, yours.grad) < 1e-5

    with torch.no_grad():
        theirs(x, position, None)
        y, state = ours(x, ours.init_state(2, length, x.dtype))
        assert state is not None
        assert theirs.conv1d_state is not None
        assert error(state.tensors["h"], theirs.rg_lru.recurrent_states) < 1e-5
        assert error(state.tensors["conv"], theirs.conv1d_state) < 1e-5
        step = tokens(length + 1)[:, -1:]
        reference = theirs(step, torch.full((2, 1), length), None)[0]
        assert error(ours(step, state)[0], reference) < 1e-5


@pytest.mark.parametrize("gate_input", ["branch", "input"])
def test_rg_lru_is_the_loop_of_the_paper(gate_input: str) -> None:
    """Eq. 1-4 of arXiv 2402.19427, with the released model's unscaled first token."""
    ours = build("rg-lru", gate_input=gate_input, branch="none", blocks=1).double()
    c, length = ours.config, 17
    x = tokens(length, torch.float64)
    u = x @ ours.in_proj.weight[:64].T + ours.in_proj.bias[:64]
    assert ours.conv is not None
    assert ours.conv.bias is not None
    assert ours.rg_lru is not None
    windows = F.pad(u, (0, 0, c.conv - 1, 0)).unfold(1, c.conv, 1)
    u = (windows * ours.conv.weight).sum(-1) + ours.conv.bias
    if ours.block_gates is None:
        gates = x @ ours.in_proj.weight[64:].T + ours.in_proj.bias[64:]
    else:
        gates = u @ ours.block_gates.weight[0] + ours.block_gates.bias[0]
    i, r = torch.sigmoid(gates).chunk(2, -1)
    base = torch.sigmoid(-ours.rg_lru.decay)
    h = torch.zeros(2, 64, dtype=torch.float64)
    out = []
    for t in range(length):
        a = base ** (8 * r[:, t])
        h = a * h + (torch.sqrt(1 - a**2) if t else 1) * i[:, t] * u[:, t]
        out.append(h)
    y = torch.stack(out, 1) @ ours.out_proj.weight.T + ours.out_proj.bias
    assert error(ours(x)[0], y) < 1e-10


def test_mingru_is_the_loop_of_the_paper() -> None:
    """h = (1 - z) h + z g(W x), arXiv 2410.01201, section 3.1 with g of appendix B."""
    ours = build("mingru").double()
    c, length = ours.config, 17
    assert (c.inner, c.conv, c.branch) == (128, 0, "none")
    x = tokens(length, torch.float64)
    u, k = (x @ ours.in_proj.weight.T + ours.in_proj.bias).chunk(2, -1)
    z = 1 / (1 + torch.exp(-k))
    g = torch.where(u >= 0, u + 0.5, 1 / (1 + torch.exp(-u)))
    h = torch.zeros(2, 128, dtype=torch.float64)
    out = []
    for t in range(length):
        h = (1 - z[:, t]) * h + z[:, t] * g[:, t]
        out.append(h)
    y = torch.stack(out, 1) @ ours.out_proj.weight.T + ours.out_proj.bias
    assert error(ours(x)[0], y) < 1e-10
    _, state = ours(x, ours.init_state(2, length, x.dtype))
    assert state is not None
    assert error(state.tensors["h"], h) < 1e-10


def test_minlstm_is_the_loop_of_the_paper() -> None:
    """h = f' h + i' g(W x) with the gates over their sum, arXiv 2410.01201, section 3.2."""
    ours = build("minlstm").double()
    length = 17
    x = tokens(length, torch.float64)
    u, f, i = (x @ ours.in_proj.weight.T + ours.in_proj.bias).split(128, -1)
    f, i = 1 / (1 + torch.exp(-f)), 1 / (1 + torch.exp(-i))
    g = torch.where(u >= 0, u + 0.5, 1 / (1 + torch.exp(-u)))
    h = torch.zeros(2, 128, dtype=torch.float64)
    out = []
    for t in range(length):
        total = f[:, t] + i[:, t]
        h = f[:, t] / total * h + i[:, t] / total * g[:, t]
        out.append(h)
    y = torch.stack(out, 1) @ ours.out_proj.weight.T + ours.out_proj.bias
    assert error(ours(x)[0], y) < 1e-10
    _, state = ours(x, ours.init_state(2, length, x.dtype))
    assert state is not None
    assert error(state.tensors["h"], h) < 1e-10


@pytest.mark.parametrize("bias", [-200.0, 200.0])
@pytest.mark.parametrize("name", ["rg-lru", "mingru", "minlstm"])
def test_extreme_gates(name: str, bias: float) -> None:
    """Gates shut and open beyond what float32 tells from 0 and 1: finite, gradients too."""
    module = build(name)
    with torch.no_grad():
        gates = module.block_gates.bias if module.block_gates else module.in_proj.bias[128:]
        gates.fill_(bias)
    x = tokens(70).requires_grad_()
    y = module(x)[0]
    y.square().sum().backward()
    assert y.isfinite().all()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())


def test_decays_of_rg_lru_start_where_the_paper_puts_them() -> None:
    """a^c is uniform in 0.9..0.999 (arXiv 2402.19427, section 2.4)."""
    torch.manual_seed(0)
    module = config("rg-lru", 4096).build()
    assert module.rg_lru is not None
    a = torch.exp(-8 * F.softplus(module.rg_lru.decay.detach().double()))
    assert 0.9 - 1e-4 < a.min() < 0.901
    assert 0.998 < a.max() < 0.999 + 1e-4
    assert a.mean().item() == pytest.approx(0.9495, abs=0.002)


def test_the_first_token_is_known_by_the_state() -> None:
    """Only a state of length 0 starts a sequence, even where its tensors are all zero."""
    module = build("rg-lru")
    x = tokens(1)
    with torch.no_grad():
        fresh = module.init_state(2, 4, x.dtype)
        used = module.init_state(2, 4, x.dtype)
        used.length = 1
        assert error(module(x, fresh)[0], module(x)[0]) < 1e-6
        assert error(module(x, used)[0], module(x)[0]) > 1e-2


def test_a_layer_between_the_points() -> None:
    """minGRU's one gate inside Griffin's block."""
    between = config("rg-lru", gates="mingru")
    assert between not in (config("rg-lru"), config("mingru"))
    assert between.build()(tokens(5))[0].isfinite().all()


def test_blocks_that_are_not_there_make_no_difference() -> None:
    assert config("mingru", blocks=4) == config("mingru")


@pytest.mark.parametrize(
    ("genes", "sentence"),
    [
        ({"blocks": 3}, "blocks=3 does not divide the inner width 64"),
        ({"expand": 1.01}, "no whole number of channels"),
    ],
)
def test_what_does_not_divide_is_refused(genes: dict[str, Gene], sentence: str) -> None:
    with pytest.raises(GeneError, match=sentence):
        config("gated-scan", **genes)
