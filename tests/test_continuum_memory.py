"""HOPE's continuum memory against a float64 loop written from the paper's update.

Tolerances as in test_learned_memory.py.
"""

import pytest
import torch
from torch import Tensor

from mendel.kernels.backend import use_backend
from mendel.primitives.base import Gene, GeneError, Site
from mendel.primitives.catalogue import resolve
from mendel.primitives.memory.continuum import Continuum, ContinuumConfig

WIDTH = 12
CHUNKS = (3, 6, 12)
RATE = 0.5


def config(width: int = WIDTH, **genes: Gene) -> ContinuumConfig:
    primitive, full = resolve("hope-cms", genes)
    made = primitive.configure(Site(width), full)
    assert isinstance(made, ContinuumConfig)
    return made


def build(**genes: Gene) -> Continuum:
    """The layer in float64 with every parameter away from its start."""
    torch.manual_seed(0)
    small: dict[str, Gene] = {"chunk": 3, "ratio": 2, "heads": 2}
    module = config(**(small | genes)).build()
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return module.double()


def tokens(length: int, width: int = WIDTH, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, length, width, generator=generator, dtype=torch.float64)


def error(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()


def sequence(m: Continuum, x: Tensor) -> tuple[Tensor, list[Tensor], list[list[Tensor]]]:
    """One sequence (T, D): every token passes all levels; a level that has seen C_l tokens takes
    the sum of eta_t grad over them. Returns outputs, last weights, all weights of every level."""
    half = WIDTH // 2
    weights = list(m.initial)
    waiting = [torch.zeros_like(w) for w in weights]
    seen: list[list[Tensor]] = [[], [], []]
    out = []
    for t, row in enumerate(x):
        said = m.in_proj.weight @ row
        u = row.view(2, half)
        for level, chunk in enumerate(CHUNKS):
            target = said[level * WIDTH : (level + 1) * WIDTH].view(2, half)
            gate = said[3 * WIDTH + 2 * level : 3 * WIDTH + 2 * level + 2]
            eta = RATE / chunk * torch.sigmoid(gate)

            def mlp(pair: list[Tensor], u: Tensor, level: int = level) -> Tensor:
                h = torch.einsum("hi,hio->ho", u, pair[0])
                h = torch.einsum("hi,hio->ho", h * torch.sigmoid(h), pair[1])
                if m.norm_weight is None or m.norm_bias is None:
                    return u + h
                std = (h.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
                h = (h - h.mean(-1, keepdim=True)) / std
                return u + h * m.norm_weight[level] + m.norm_bias[level]

            own = slice(2 * level, 2 * level + 2)
            pair = [w.view_as(w) for w in weights[own]]
            # One term per head: their sum has every head's gradient in its own block.
            loss = (mlp(pair, u) - target).square().mean(-1).sum()
            slopes = torch.autograd.grad(loss, pair, create_graph=True)
            u = mlp(weights[own], u)
            waiting[own] = [
                w + eta[:, None, None] * s for w, s in zip(waiting[own], slopes, strict=True)
            ]
            if (t + 1) % chunk == 0:
                weights[own] = [w - s for w, s in zip(weights[own], waiting[own], strict=True)]
                waiting[own] = [torch.zeros_like(s) for s in waiting[own]]
            seen[level].append(weights[2 * level])
        out.append(u.flatten())
    return torch.stack(out), weights + waiting, seen


@pytest.mark.parametrize("form", ["residual-norm", "residual"])
@pytest.mark.parametrize("length", [4, 13, 31])
def test_it_is_the_loop_of_the_paper(length: int, form: str) -> None:
    m = build(form=form, rate=RATE)
    x = tokens(length).requires_grad_()
    results = [sequence(m, row) for row in x]
    reference = torch.stack([r[0] for r in results])
    ours = m(x)[0]
    assert error(ours, reference) < 1e-9
    cotangent = torch.randn(x.shape, generator=torch.Generator().manual_seed(3)).double()
    leaves = dict(m.named_parameters()) | {"x": x}
    mine = torch.autograd.grad((ours * cotangent).sum(), [*leaves.values()])
    theirs = torch.autograd.grad((reference * cotangent).sum(), [*leaves.values()])
    for label, a, b in zip(leaves, mine, theirs, strict=True):
        assert b.abs().max() > 0, label
        assert error(a, b) < 1e-8, label
    with torch.no_grad():
        state = m.init_state(2, length, x.dtype)
        for piece in x.split([length - length // 2, length // 2], 1):
            _, state = m(piece, state)
    for i in range(6):
        assert error(state.tensors[f"weights{i}"], torch.stack([r[1][i] for r in results])) < 1e-9
        waiting = torch.stack([r[1][6 + i] for r in results])
        assert (state.tensors[f"pending{i}"] - waiting).abs().max() < 1e-9


def test_the_levels_change_at_their_own_frequencies() -> None:
    m, x = build(), tokens(24, batch=1)
    state, changed = m.init_state(1, 24, x.dtype), []
    with torch.no_grad():
        for t in range(24):
            before = [state.tensors[f"weights{2 * level}"].clone() for level in range(3)]
            _, state = m(x[:, t : t + 1], state)
            after = [state.tensors[f"weights{2 * level}"] for level in range(3)]
            changed.append([not torch.equal(a, b) for a, b in zip(before, after, strict=True)])
    for level, chunk in enumerate(CHUNKS):
        assert [t + 1 for t in range(24) if changed[t][level]] == list(range(chunk, 25, chunk))


def test_the_chunked_form_is_the_definition() -> None:
    for genes in ({"form": "plain"}, {"inner_activation": "gelu", "levels": 2}, {"heads": 1}):
        m, x = build(**genes), tokens(17)  # type: ignore[arg-type]
        with torch.no_grad(), use_backend("definition"):
            reference = m(x)[0]
        assert error(m(x)[0], reference) < 1e-10


def test_a_level_learns() -> None:
    """The same tokens again and again: with targets that can be met, the inner loss falls."""
    torch.manual_seed(0)
    m = config(32, levels=1, chunk=16, form="residual").build().double()
    x = tokens(16, 32).repeat(1, 40, 1)
    with torch.no_grad():
        y = m(x)[0]
        targets = m.in_proj(x)[..., :32]
    losses = (y - targets).square().mean(-1).mean(0).view(40, 16).mean(-1)
    assert losses[-1] < 0.5 * losses[0]


def test_8192_tokens_in_float32_by_a_state() -> None:
    torch.manual_seed(0)
    m, x = config(32).build().double(), tokens(8192, 32, batch=1)
    with torch.no_grad():
        reference = m(x)[0]
        m = m.float()
        first, state = m(x[:, :4003].float(), m.init_state(1, 8192, torch.float32))
        second, _ = m(x[:, 4003:].float(), state)
    assert error(torch.cat((first, second), 1), reference) < 1e-4


@pytest.mark.parametrize("scale", [-1e4, 1e4])
def test_extreme_rates(scale: float) -> None:
    m = build().float()
    with torch.no_grad():
        m.in_proj.weight[3 * WIDTH :] = 0.0
        m.in_proj.weight[3 * WIDTH :, 0] = scale
    x = tokens(40).float()
    x[:, :, 0] = 1.0
    y = m(x)[0]
    y.square().sum().backward()
    assert y.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in m.parameters())


def test_cost_and_refusals() -> None:
    """Width 512, three levels with four times the width inside, twice in the state."""
    cost = config(512).cost(4096, torch.bfloat16)
    weights = 3 * 2 * 512 * 2048
    products = 512 * 3 * 513
    assert cost.params == weights + products + 2 * 3 * 512
    assert cost.state_bytes == 2 * weights * 4
    assert cost.flops_per_token == 2 * (products + 1.5 * weights)
    assert config(512).chunks == (8, 32, 128)
    with pytest.raises(GeneError, match="does not divide"):
        config(heads=5)
    with pytest.raises(GeneError, match="no whole number"):
        config(heads=1, expand=1.3)
