"""Between the points: random settings of the recurrent primitives' axes keep their promises.

The contract tests move one axis at a time from each point; a search moves them all. In float64 the
orders of summation differ by about 1e-14 per term, so 1e-10 of the output's scale.
"""

import random

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mendel.primitives.base import (
    Carry,
    Gene,
    GeneError,
    Operator,
    Primitive,
    Site,
    carries,
    is_causal,
)
from mendel.primitives.convolution.short_conv import SHORT_CONV
from mendel.primitives.diagonal.gated_scan import GATED_SCAN
from mendel.primitives.diagonal.hgrn import HGRN
from mendel.primitives.diagonal.mega import MEGA
from mendel.primitives.diagonal.rwkv4 import RWKV4
from mendel.primitives.diagonal.s4 import STATE_SPACE
from mendel.primitives.diagonal.s5 import SHARED_STATE_SPACE
from mendel.primitives.diagonal.selective import SELECTIVE
from mendel.primitives.recurrence.delta_axes import DELTA
from mendel.primitives.recurrence.matrix_axes import RECURRENCE
from mendel.primitives.recurrence.mlstm import MLSTM
from mendel.primitives.recurrence.nonlinear import NONLINEAR
from mendel.primitives.recurrence.rwkv7 import RWKV7
from mendel.primitives.recurrent_parts import auto_heads

WIDTH, TOKENS = 32, 19
PRIMITIVES = (
    RECURRENCE,
    DELTA,
    RWKV7,
    MLSTM,
    SELECTIVE,
    STATE_SPACE,
    SHARED_STATE_SPACE,
    MEGA,
    GATED_SCAN,
    HGRN,
    RWKV4,
    NONLINEAR,
    SHORT_CONV,
)


def draw(primitive: Primitive, seed: int) -> dict[str, Gene]:
    """Random values of all axes that go together in a causal layer."""
    rng = random.Random(f"{primitive.name} {seed}")
    while True:
        genes: dict[str, Gene] = {
            axis.name: rng.choice(axis.options or axis.search or (axis.default,))
            for axis in primitive.axes
        }
        try:
            config = primitive.configure(Site(WIDTH), primitive.complete(genes))
        except GeneError:
            continue
        if is_causal(config):
            return genes


CASES = [
    pytest.param(p, draw(p, seed), id=f"{p.name}-{seed}") for p in PRIMITIVES for seed in range(12)
]


def build(primitive: Primitive, genes: dict[str, Gene]) -> Operator:
    torch.manual_seed(0)
    module = primitive.configure(Site(WIDTH), primitive.complete(genes)).build()
    assert isinstance(module, Operator)
    return module


def tokens(dtype: torch.dtype, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, TOKENS, WIDTH, generator=generator, dtype=torch.float64).to(dtype)


def pieces(module: Operator, x: Tensor, lengths: list[int]) -> Tensor:
    state = module.init_state(x.shape[0], TOKENS, x.dtype)
    outputs, at = [], 0
    for n in lengths:
        y, after = module(x[:, at : at + n], state)
        assert after is not None
        assert after.length == at + n
        outputs.append(y)
        at, state = at + n, after
    return torch.cat(outputs, 1)


@pytest.mark.parametrize(("primitive", "genes"), CASES)
def test_whole_steps_and_pieces_agree(primitive: Primitive, genes: dict[str, Gene]) -> None:
    module, x = build(primitive, genes).double(), tokens(torch.float64)
    with torch.no_grad():
        whole, none = module(x)
        assert none is None
        for lengths in ([1] * TOKENS, [TOKENS], [7, 1, 11]):
            assert (pieces(module, x, lengths) - whole).abs().max() < 1e-10 * whole.abs().max()


@pytest.mark.parametrize(("primitive", "genes"), CASES)
def test_gradients_are_finite_and_reach_everything(
    primitive: Primitive, genes: dict[str, Gene]
) -> None:
    module, x = build(primitive, genes), tokens(torch.float32, batch=4)
    more: dict[str, Carry] = {}
    if carries(module.config) is not None:
        # Alone, a layer has nothing to mix into its values.
        more["carry"] = Carry([torch.randn(*x.shape[:2], module.config.inner)])
    module(x, **more)[0].square().sum().backward()
    for label, p in module.named_parameters():
        assert p.grad is not None, label
        assert p.grad.isfinite().all(), label
        assert p.grad.abs().max() > 0, label


@pytest.mark.parametrize(("primitive", "genes"), CASES)
def test_bf16_stays_near_float32(primitive: Primitive, genes: dict[str, Gene]) -> None:
    """8 bits of mantissa through projections, recurrence and norm: a few per cent."""
    module = build(primitive, genes).bfloat16()
    x = tokens(torch.bfloat16)
    with torch.no_grad():
        low = module(x)[0]
        assert low.dtype == torch.bfloat16
        high = module.float()(x.float())[0]
    assert (low.float() - high).norm() < 0.05 * high.norm()


@pytest.mark.parametrize(("primitive", "genes"), CASES)
def test_autocast_keeps_the_state_in_float32(primitive: Primitive, genes: dict[str, Gene]) -> None:
    """The training form of a bf16 device: the weights stay float32, the projections are bf16."""
    module, x = build(primitive, genes), tokens(torch.float32)
    reference = module(x)[0].detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = module(x)[0]
        _, state = module(x, module.init_state(2, TOKENS, torch.bfloat16))
    assert (y.float() - reference).norm() < 0.05 * reference.norm()
    y.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())
    assert state is not None
    dtypes = {name: t.dtype for name, t in state.tensors.items()}
    for inputs in ("conv", "shift", "keys", "values"):
        assert dtypes.pop(inputs, torch.bfloat16) == torch.bfloat16
    assert set(dtypes.values()) <= {torch.float32}


@pytest.mark.parametrize(("primitive", "genes"), CASES)
def test_costs_are_the_counted_ones(primitive: Primitive, genes: dict[str, Gene]) -> None:
    config = primitive.configure(Site(WIDTH), primitive.complete(genes))
    module, x = build(primitive, genes), tokens(torch.float32, batch=1)
    cost = config.cost(TOKENS, torch.float32)
    assert cost.params == sum(p.numel() for p in module.parameters())
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        pieces(module, x, [1] * TOKENS)
    assert counter.get_total_flops() == cost.flops_per_token * TOKENS
    for dtype in (torch.float32, torch.bfloat16):
        state = module.init_state(1, 5, dtype)
        assert state.bytes() == config.cost(5, dtype).state_bytes


@pytest.mark.parametrize("width", [16, 24, 48, 64, 80, 100, 320, 768, 2048, 4096])
@pytest.mark.parametrize("primitive", PRIMITIVES, ids=lambda p: p.name)
def test_points_fit_every_width(primitive: Primitive, width: int) -> None:
    """Counted on the meta device: no memory, the real shapes."""
    for point in ({}, *(p.genes for p in primitive.points)):
        config = primitive.configure(Site(width), primitive.complete(point))
        with torch.device("meta"):
            module = config.build()
        cost = config.cost(1, torch.float32)
        assert cost.params == sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("inner", "target", "heads"),
    [
        (128, 64, 4),
        (256, 64, 4),
        (4096, 64, 64),
        (4096, 128, 32),
        (1536, 64, 24),
        (640, 64, 10),
        (100, 64, 4),
        (122, 64, 61),
        (7, 64, 7),
        (1, 64, 1),
    ],
)
def test_heads_by_themselves(inner: int, target: int, heads: int) -> None:
    assert auto_heads(inner, target) == heads


@pytest.mark.parametrize(
    "primitive", [p for p in PRIMITIVES if p is not SHORT_CONV], ids=lambda p: p.name
)
def test_every_recurrent_point_has_its_place_in_the_unified_view(primitive: Primitive) -> None:
    for point in primitive.points:
        assert point.view is not None, point.name
        for line in (point.view.update, point.view.stores, point.view.forgets, point.view.loss):
            assert 5 <= len(line) <= 90, (point.name, line)
