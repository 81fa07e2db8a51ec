"""The mLSTM: against transformers' layer, the unstabilised loop, and its own definition.

Tolerances as in test_recurrence.py: 1e-5 of the output's scale in float32, 1e-10 in float64.
"""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import xLSTMConfig
from transformers.models.xlstm.modeling_xlstm import xLSTMLayer

from mendel.kernels.backend import use_backend
from mendel.kernels.mlstm import mlstm
from mendel.primitives.base import Gene, Site
from mendel.primitives.catalogue import resolve
from mendel.primitives.recurrence.mlstm import Mlstm, MlstmConfig


def build(name: str, **genes: Gene) -> Mlstm:
    """The layer with every parameter away from its start."""
    primitive, full = resolve(name, genes)
    made = primitive.configure(Site(64), full)
    assert isinstance(made, MlstmConfig)
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


def mlstm_of_transformers(ours: Mlstm) -> xLSTMLayer:
    c = ours.config
    theirs = xLSTMLayer(
        xLSTMConfig(
            hidden_size=64,
            num_heads=c.heads,
            num_hidden_layers=1,
            qk_dim_factor=0.5,
            v_dim_factor=1.0,
            gate_soft_cap=c.cap,
            autocast_kernel_dtype="float32",
            chunk_size=16,
            eps=1e-12,  # the papers have none
            vocab_size=32,
        )
    ).eval()
    q, k, v, o = ours.in_proj.weight.detach().split([32, 32, 64, 64])
    i, f = ours.gates.weight.detach().chunk(2)
    i_bias, f_bias = ours.gates.bias.detach().chunk(2)
    theirs.load_state_dict(
        {
            "q.weight": q,
            "k.weight": k,
            "v.weight": v,
            "ogate_preact.weight": o,
            "igate_preact.weight": i,
            "igate_preact.bias": i_bias,
            "fgate_preact.weight": f,
            "fgate_preact.bias": f_bias,
            "multihead_norm.weight": ours.norm.weight.detach(),
            "out_proj.weight": ours.out_proj.weight.detach(),
        }
    )
    return theirs


@pytest.mark.parametrize("length", [1, 16, 37, 130])
def test_mlstm_is_the_layer_of_transformers(length: int) -> None:
    ours = build("mlstm")
    theirs = mlstm_of_transformers(ours)
    x = tokens(length)
    with torch.no_grad():
        reference, (C, n, m) = theirs(x)
        y, state = ours(x, ours.init_state(2, length, x.dtype))
        assert error(y, reference) < 1e-5
        assert error(ours(x)[0], reference) < 1e-5
        assert state is not None
        held = torch.cat((C, n.unsqueeze(-1)), -1) * m.view(2, -1, 1, 1).exp()
        mine = state.tensors["matrix"] * state.tensors["m"][..., None, None].exp()
        assert error(mine, held) < 1e-5


def inputs(length: int, size: float, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(length)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    found = {
        "q": normal(2, length, 3, 8),
        "k": normal(2, length, 3, 8),
        "v": normal(2, length, 3, 6),
        "input_gate": size * normal(2, length, 3),
        "log_forget": F.logsigmoid(size * normal(2, length, 3) + 2),
    }
    return {name: t.to(dtype) for name, t in found.items()}


def test_mlstm_is_the_loop_of_the_paper_without_its_stabiliser() -> None:
    """C and n as they are written in arXiv 2405.04517, eq. 19-27, exp(ig) and all."""
    given = inputs(29, 2.0)
    C, n = torch.zeros(2, 3, 8, 6).double(), torch.zeros(2, 3, 8).double()
    out = []
    for t in range(29):
        f, i = given["log_forget"][:, t].exp(), given["input_gate"][:, t].exp()
        k, q = given["k"][:, t], given["q"][:, t] / 8**0.5
        C = f[..., None, None] * C
        C = C + i[..., None, None] * k[..., None] * given["v"][:, t, :, None]
        n = f[..., None] * n + i[..., None] * k
        total = (n * q).sum(-1, keepdim=True).abs().clamp_min(1.0)
        out.append((C * q[..., None]).sum(2) / total)
    h, (matrix, m) = mlstm(**given)
    assert error(h, torch.stack(out, 1)) < 1e-10
    state = torch.cat((C, n[..., None]), -1)
    assert error(matrix * m[..., None, None].exp(), state) < 1e-10


@pytest.mark.parametrize("size", [1.0, 30.0, 1000.0])
@pytest.mark.parametrize("length", [1, 33, 100])
def test_fast_form_equals_the_definition(length: int, size: float) -> None:
    """Outputs, state and every gradient, with gates from ordinary to absurd, split in two."""
    found = []
    for backend in ("chunked", "definition"):
        leaves = {n: t.requires_grad_() for n, t in inputs(length, size).items()}
        with use_backend(backend):  # type: ignore[arg-type]
            first = {n: t[:, : length // 2] for n, t in leaves.items()}
            state = mlstm(**first)[1] if length > 1 else None
            h, (matrix, m) = mlstm(
                **{n: t[:, length // 2 :] for n, t in leaves.items()}, state=state
            )
        g = torch.Generator().manual_seed(9)
        (h * torch.randn(h.shape, generator=g, dtype=h.dtype)).sum().backward()
        # A first token's forget gate meets an empty state.
        grads = {n: torch.zeros_like(t) if t.grad is None else t.grad for n, t in leaves.items()}
        found.append({"h": h.detach(), "matrix": matrix.detach(), "m": m.detach(), **grads})
    for name, right in found[1].items():
        have = found[0][name]
        assert have.isfinite().all(), name
        # Gradients of gates cancel: what is left is the rounding of numbers of order 1.
        assert (have - right).norm() <= 1e-10 * right.norm() + 1e-11, name


def test_gates_decide_what_stays() -> None:
    """A token with a large input gate outweighs all before it; a shut one leaves no trace."""
    given = inputs(3, 0.0)
    given["input_gate"][:, 1] = 40.0
    given["input_gate"][:, 2] = -40.0
    h, _ = mlstm(**given)
    query, key = given["q"][:, 2], given["k"][:, 1]
    sign = (query * key).sum(-1, keepdim=True).sign()
    assert error(h[:, 2], sign * given["v"][:, 1]) < 1e-6
