"""All published recurrent layers at once: gradients against the definitions, and long sequences."""

import pytest
import torch
from torch import Tensor

from mendel.kernels.backend import use_backend
from mendel.primitives.base import Operator, Site
from mendel.primitives.catalogue import CATALOGUE, resolve
from mendel.primitives.recurrent_parts import PIECE

BOUNDED = {"causal-mixer", "mlp-mixer"}
"""Tables over positions end at 512 tokens: there is no long sequence to be accurate on."""
POINTS = [
    point.name
    for row in CATALOGUE
    for point in row.points
    if point.view is not None and point.name not in BOUNDED
]
FAMILIES = ("attention", "shared-block", "mlp", "moe")
"""The primitives beside the recurrence family: their points have no place in its view."""
LOOPS = ("lstm", "gru", "bilstm", "bigru", "slstm")
"""Their only form is the loop over tokens."""


def build(name: str) -> Operator:
    """The layer in float64 with every parameter away from its start."""
    primitive, full = resolve(name, {})
    torch.manual_seed(0)
    module = primitive.configure(Site(32, "none", 1, 4), full).build().double()
    assert isinstance(module, Operator)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return module


def tokens(length: int, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, length, 32, generator=generator, dtype=torch.float64)


def test_every_point_of_the_family_has_its_place_in_the_unified_view() -> None:
    lacking = [
        p.name for row in CATALOGUE if row.name not in FAMILIES for p in row.points if not p.view
    ]
    assert lacking == []


def test_the_views_give_the_constants_of_the_definitions() -> None:
    """Based scales its scores; only a pole's real part decays; RWKV-7 removes from the state before
    its decay."""
    views = {p.name: p.view for row in CATALOGUE for p in row.points if p.view is not None}
    assert "s = q^T k / sqrt(K)" in views["based"].update
    assert "- Re(A) |x|^2" in views["s4d"].loss
    assert "- Re(L) |x|^2" in views["s5"].loss
    assert "beside a weight decay" in views["rwkv7"].loss


@pytest.mark.parametrize("name", [name for name in POINTS if name not in LOOPS])
def test_gradients_are_those_of_the_definition(name: str) -> None:
    """Every parameter's and the input's, the operators' own loops against their fast forms.

    In float64 the two differ by about 1e-15 per term; 1e-9 of a gradient's norm leaves room for the
    cancellation in gates, and 1e-12 for gradients that are zero up to rounding.
    """
    module, x = build(name), tokens(67).requires_grad_()
    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=x.dtype)
    leaves = [x, *module.parameters()]
    fast = torch.autograd.grad((module(x)[0] * weight).sum(), leaves)
    with use_backend("definition"):
        right = torch.autograd.grad((module(x)[0] * weight).sum(), leaves)
    labels = ["x", *(label for label, _ in module.named_parameters())]
    for label, a, b in zip(labels, fast, right, strict=True):
        assert (a - b).norm() <= 1e-9 * b.norm() + 1e-12, label


@pytest.mark.parametrize("name", [name for name in POINTS if name not in LOOPS])
def test_float32_keeps_its_digits_over_8192_tokens(name: str) -> None:
    """Sums of 8,192 terms of 2^-24 err by about 1e-5 at worst; nothing may grow beyond that."""
    module, x = build(name), tokens(8192, batch=1)
    with torch.no_grad():
        right = module(x)[0]
        found = module.float()(x.float())[0]
    assert (found.double() - right).abs().max() < 2e-5 * right.abs().max()


@pytest.mark.parametrize("name", ["retnet", "mamba2", "based", "rwkv6", "rwkv7", "deltanet", "kda"])
def test_a_long_call_in_pieces_is_the_whole_call(name: str) -> None:
    """Without gradients a long sequence goes piece by piece; with them it goes whole."""
    module, x = build(name), tokens(2 * PIECE + 37, batch=1)
    whole = module(x)[0].detach()
    with torch.no_grad():
        pieces = module(x)[0]
        state = module.init_state(1, x.shape[1], x.dtype)
        head, state = module(x[:, : PIECE + 3], state)
        tail, state = module(x[:, PIECE + 3 :], state)
    assert state is not None
    assert state.length == x.shape[1]
    torch.testing.assert_close(pieces, whole, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(torch.cat((head, tail), 1), whole, rtol=1e-9, atol=1e-9)
