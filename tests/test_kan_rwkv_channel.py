"""RWKV's channel mixer against transformers' and its formula; KAN against the recursion of splines.

Tolerances as in test_recurrence.py: 1e-5 of the output's scale in float32, 1e-10 in float64.
"""

import pytest
import torch
from torch import Tensor
from transformers import RwkvConfig
from transformers.models.rwkv.modeling_rwkv import RwkvFeedForward

from mendel.primitives.base import Gene, Site
from mendel.primitives.catalogue import resolve
from mendel.primitives.channel.kan import Kan, KanConfig, b_splines
from mendel.primitives.channel.rwkv import RwkvChannel, RwkvChannelConfig

WIDTH = 32


def rwkv(name: str, **genes: Gene) -> RwkvChannel:
    torch.manual_seed(0)
    primitive, full = resolve(name, genes)
    made = primitive.configure(Site(WIDTH), full)
    assert isinstance(made, RwkvChannelConfig)
    return made.build()


def kan(width: int = 8, **genes: Gene) -> Kan:
    torch.manual_seed(0)
    primitive, full = resolve("kan", genes)
    made = primitive.configure(Site(width), full)
    assert isinstance(made, KanConfig)
    return made.build()


def inputs(length: int, dtype: torch.dtype = torch.float32, width: int = WIDTH) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, length, width, generator=generator, dtype=torch.float64).to(dtype)


def error(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()


@pytest.mark.parametrize("length", [1, 2, 37])
@pytest.mark.parametrize("name", ["rwkv4-channel", "rwkv6-channel"])
def test_the_channel_mix_is_transformers(name: str, length: int) -> None:
    ours = rwkv(name)
    inner = ours.config.inner
    assert inner == {"rwkv4-channel": 4, "rwkv6-channel": 3.5}[name] * WIDTH
    theirs = RwkvFeedForward(RwkvConfig(hidden_size=WIDTH, intermediate_size=inner))
    assert ours.receptance is not None
    with torch.no_grad():
        # Theirs is the share of the token, ours that of the one before.
        theirs.time_mix_key.copy_(1 - ours.shift.mix[0])
        theirs.time_mix_receptance.copy_(1 - ours.shift.mix[1])
    for mine, yours in (
        (ours.key, theirs.key),
        (ours.value, theirs.value),
        (ours.receptance, theirs.receptance),
    ):
        yours.load_state_dict(mine.state_dict())
    x = inputs(length)
    cotangent = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    y, (reference, _) = ours(x)[0], theirs(x)
    assert error(y, reference) < 1e-5
    (y * cotangent).sum().backward()
    (reference * cotangent).sum().backward()
    pairs = [
        (p.grad, theirs.get_parameter(n).grad)
        for n, p in ours.named_parameters()
        if not n.startswith("shift")
    ]
    mixes = (theirs.time_mix_key.grad, theirs.time_mix_receptance.grad)
    assert ours.shift.mix.grad is not None
    for mine, grad in zip(ours.shift.mix.grad, mixes, strict=True):
        assert grad is not None
        pairs.append((mine, -grad[0, 0]))
    for mine, yours in pairs:
        assert mine is not None
        assert yours is not None
        if yours.abs().max() > 0:
            assert error(mine, yours) < 1e-5
        else:
            assert mine.abs().max() == 0

    # Decoding, one sequence: theirs mixes the sequences of a batch. Their state is (B, D, layers).
    with torch.no_grad():
        held = [torch.zeros(1, WIDTH, 1)]
        state = ours.init_state(1, length, torch.float32)
        for t in range(length):
            step, _ = theirs(x[:1, t : t + 1], held)
            got, new = ours(x[:1, t : t + 1], state)
            assert new is not None
            state = new
            assert error(got, step) < 1e-5
        assert torch.equal(state.tensors["shift"], held[0][..., 0])


@pytest.mark.parametrize("name", ["rwkv4-channel", "rwkv7-channel"])
@torch.no_grad()
def test_the_channel_mix_is_its_formula(name: str) -> None:
    ours = rwkv(name).double()
    x = inputs(9, torch.float64)
    wanted = torch.zeros_like(x)
    for t in range(9):
        before = x[:, t - 1] if t else torch.zeros_like(x[:, 0])
        mix = ours.shift.mix
        k = x[:, t] * (1 - mix[0]) + before * mix[0]
        y = (k @ ours.key.weight.T).clamp_min(0) ** 2 @ ours.value.weight.T
        if ours.receptance is not None:
            r = x[:, t] * (1 - mix[1]) + before * mix[1]
            y = y / (1 + (-(r @ ours.receptance.weight.T)).exp())
        wanted[:, t] = y
    assert (ours.receptance is None) == (name == "rwkv7-channel")
    assert error(ours(x)[0], wanted) < 1e-10


def test_cost_of_rwkv4_169m() -> None:
    """RWKV-4 169M: width 768; its channel mixer has 4 * 768 units."""
    primitive, genes = resolve("rwkv4-channel", {})
    cost = primitive.configure(Site(768), genes).cost(1024, torch.bfloat16)
    assert cost.params == 9 * 768**2 + 2 * 768
    assert cost.state_bytes == 768 * 2


def spline(knots: list[float], m: int, order: int, x: float) -> float:
    """The Cox-de Boor recursion for the m-th spline of that order over any knots."""
    if order == 0:
        return 1.0 if knots[m] <= x < knots[m + 1] else 0.0
    left = (x - knots[m]) / (knots[m + order] - knots[m])
    right = (knots[m + order + 1] - x) / (knots[m + order + 1] - knots[m + 1])
    return left * spline(knots, m, order - 1, x) + right * spline(knots, m + 1, order - 1, x)


def knots_of(config: KanConfig) -> list[float]:
    step = 2 * config.reach / config.grid
    count = config.grid + 2 * config.order + 1
    return [-config.reach + (i - config.order) * step for i in range(count)]


GRIDS: list[dict[str, Gene]] = [
    {},
    {"grid": 1, "order": 1, "reach": 2.0},
    {"grid": 8, "order": 2, "reach": 0.5},
    {"grid": 3, "order": 5, "reach": 3.0},
]


def by_the_formula(module: Kan, x: Tensor) -> Tensor:
    """Edge by edge: phi(x) = b silu(x) + s sum_m c_m B_m(x), summed over the inputs."""
    c, knots = module.config, knots_of(module.config)
    rows = x.flatten(0, 1)
    for layer in (module.entry, module.exit):
        outputs, count = layer.base.shape
        new = []
        for row in rows:
            edges = []
            for i in range(count):
                value = row[i].item()
                silu = row[i] / (1 + (-row[i]).exp())
                bases = torch.tensor(
                    [spline(knots, m, c.order, value) for m in range(c.splines)],
                    dtype=torch.float64,
                )
                curve = layer.splines[:, i] @ bases
                edges.append(layer.base[:, i] * silu + layer.spline_scale[:, i] * curve)
            new.append(torch.stack(edges).sum(0))
            assert new[-1].shape == (outputs,)
        rows = torch.stack(new)
    return rows.view(*x.shape)


@pytest.mark.parametrize("genes", GRIDS, ids=str)
def test_kan_is_its_formula(genes: dict[str, Gene]) -> None:
    module, x = kan(**genes).double(), inputs(4, torch.float64, 8)
    assert error(module(x)[0], by_the_formula(module, x)) < 1e-10


@pytest.mark.parametrize("genes", GRIDS, ids=str)
def test_the_splines_are_the_recursion_and_sum_to_1(genes: dict[str, Gene]) -> None:
    made = kan(**genes).config
    knots = knots_of(made)
    span = knots[-1] - knots[0]
    points = [knots[0] - 1, *(knots[0] + span * i / 50 + 1e-9 for i in range(51)), knots[-1] + 1]
    points += [-made.reach, made.reach, 1e30, -1e30]
    got = b_splines(torch.tensor(points, dtype=torch.float64), made.grid, made.order, made.reach)
    wanted = [[spline(knots, m, made.order, x) for m in range(made.splines)] for x in points]
    # Low orders jump at the knots, where two roundings of one knot may fall on both sides of it.
    inside = [
        i for i, x in enumerate(points) if made.order > 1 or min(abs(x - k) for k in knots) > 1e-6
    ]
    reference = torch.tensor(wanted, dtype=torch.float64)
    assert (got[inside] - reference[inside]).abs().max() < 1e-12
    between = [i for i, x in enumerate(points) if -made.reach <= x <= made.reach]
    assert (got[between].sum(-1) - 1).abs().max() < 1e-12
    assert got[-2:].abs().max() == 0


def test_kans_gradients() -> None:
    """Every gradient against numerical differences: order 3 has two continuous derivatives."""
    module = kan(4, expansion=2.0, reach=2.0).double()
    x = inputs(2, torch.float64, 4).requires_grad_()
    names = [n for n, _ in module.named_parameters()]

    def run(x: Tensor, *values: Tensor) -> Tensor:
        with_values = dict(zip(names, values, strict=True))
        y: Tensor = torch.func.functional_call(module, with_values, (x,))[0]
        return y

    assert torch.autograd.gradcheck(run, (x, *module.parameters()), fast_mode=False)


def test_beyond_the_grid_only_silu_is_left() -> None:
    module = kan(reach=1.0).double()
    far = torch.full((1, 1, 8), 50.0, dtype=torch.float64)
    with torch.no_grad():
        first = module.entry(far)
    sums = module.entry.base.detach().sum(1) * 50.0
    assert error(first.flatten(), sums) < 1e-12


def test_kan_can_be_any_curve_of_its_order() -> None:
    """Fitted by least squares, one edge is a given cubic to rounding: the splines span them."""
    x = torch.linspace(-1, 0.999, 200, dtype=torch.float64)
    bases = b_splines(x, 5, 3, 1.0)
    cubic = 2 * x**3 - x**2 + 0.5 * x - 3
    weights = torch.linalg.lstsq(bases, cubic[:, None]).solution
    assert error((bases @ weights).flatten(), cubic) < 1e-10


def test_cost_counts_every_edge() -> None:
    primitive, genes = resolve("kan", {"expansion": 1.0})
    cost = primitive.configure(Site(64), genes).cost(10, torch.float32)
    assert cost.params == 2 * 64 * 64 * (5 + 3 + 2)
    assert cost.flops_per_token == 2 * 2 * 64 * 64 * (5 + 3 + 1)
    assert cost.state_bytes == 0
