"""RWKV-4: against transformers' layer, the unstabilised loop, and the definition.

Tolerances as in test_recurrence.py: 1e-5 of the output's scale in float32, 1e-10 in float64.
"""

import pytest
import torch
from torch import Tensor
from transformers import RwkvConfig
from transformers.models.rwkv.modeling_rwkv import RwkvSelfAttention

from mendel.kernels.backend import use_backend
from mendel.kernels.wkv import wkv
from mendel.primitives.base import Site
from mendel.primitives.catalogue import resolve
from mendel.primitives.diagonal.rwkv4 import Rwkv4


def build() -> Rwkv4:
    """The layer with every parameter away from its start."""
    primitive, full = resolve("rwkv4", {})
    torch.manual_seed(0)
    module = primitive.configure(Site(64), full).build()
    assert isinstance(module, Rwkv4)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return module


def tokens(length: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, length, 64, generator=generator)


def error(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()


@pytest.mark.parametrize("length", [1, 5, 37, 130])
def test_rwkv4_is_the_layer_of_transformers(length: int) -> None:
    """The forward pass of whole sequences; theirs has no backward pass on a CPU."""
    ours = build()
    assert ours.shift is not None
    theirs = RwkvSelfAttention(RwkvConfig(hidden_size=64, num_hidden_layers=1, vocab_size=32), 0)
    r, k, v = ours.in_proj.weight.detach().chunk(3)
    # Their mix is the share of the token itself.
    mix = 1 - ours.shift.mix.detach()[:, None, None]
    theirs.load_state_dict(
        {
            "time_decay": ours.decay.detach(),
            "time_first": ours.bonus.detach(),
            "time_mix_receptance": mix[0],
            "time_mix_key": mix[1],
            "time_mix_value": mix[2],
            "receptance.weight": r,
            "key.weight": k,
            "value.weight": v,
            "output.weight": ours.out_proj.weight.detach(),
        }
    )
    x = tokens(length)
    with torch.no_grad():
        reference, _ = theirs(x)
        assert error(ours(x)[0], reference) < 1e-5
        y, _ = ours(x, ours.init_state(2, length, x.dtype))
        assert error(y, reference) < 1e-5


def inputs(length: int, size: float) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(length)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    return {
        "k": size * normal(2, length, 5),
        "v": normal(2, length, 5),
        "log_decay": -normal(5).exp(),
        "bonus": normal(5),
    }


def test_wkv_is_the_sum_of_the_paper() -> None:
    """arXiv 2305.13048, eq. 16, as sums over all earlier tokens, exponentials and all."""
    given = inputs(23, 1.0)
    k, v, g, u = given.values()
    out = []
    for t in range(23):
        weights = [torch.exp((t - 1 - i) * g + k[:, i]) for i in range(t)]
        weights.append(torch.exp(u + k[:, t]))
        total = sum(weights[1:], start=weights[0])
        terms = [w * v[:, i] for i, w in enumerate(weights)]
        out.append(sum(terms[1:], start=terms[0]) / total)
    assert error(wkv(**given)[0], torch.stack(out, 1)) < 1e-10


@pytest.mark.parametrize("size", [1.0, 100.0, 1e4])
@pytest.mark.parametrize("length", [2, 33, 100])
def test_fast_form_equals_the_definition(length: int, size: float) -> None:
    """Averages, state and every gradient, with ordinary and with absurd keys, split in two."""
    found = []
    for backend in ("chunked", "definition"):
        leaves = {n: t.requires_grad_() for n, t in inputs(length, size).items()}
        with use_backend(backend):  # type: ignore[arg-type]
            rest = {"log_decay": leaves["log_decay"], "bonus": leaves["bonus"]}
            k, v, half = leaves["k"], leaves["v"], length // 2
            first, state = wkv(k[:, :half], v[:, :half], **rest)
            second, (num, den, m) = wkv(k[:, half:], v[:, half:], **rest, state=state)
        y = torch.cat((first, second), 1)
        g = torch.Generator().manual_seed(9)
        (y * torch.randn(y.shape, generator=g, dtype=y.dtype)).sum().backward()
        grads = {"d" + n: t.grad for n, t in leaves.items()}
        found.append({"y": y.detach(), "num": num, "den": den, "m": m, **grads})
    for name, right in found[1].items():
        have = found[0][name]
        assert right is not None
        assert have is not None
        assert have.isfinite().all(), name
        assert (have - right).norm() <= 1e-9 * right.norm() + 1e-11, name
