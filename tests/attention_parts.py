"""Small attention layers for tests: built, fed, decoded in pieces, compared.

Float32 tolerance 1e-5 of the output's scale: the same products summed in another order agree to
about sqrt(terms) * 2^-24, a tenth of that at these sizes.
"""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mendel.primitives.attention.axes import configure_plain
from mendel.primitives.attention.layer import Attention, AttentionConfig
from mendel.primitives.base import Gene, Site, State
from mendel.primitives.catalogue import resolve

WIDTH = 48
TOKENS = 37
HEADS = 6
PIECES = ([1] * TOKENS, [TOKENS], [8, 1, 20, 1, 7], [30, 7])


def config(genes: dict[str, Gene], position: str = "rope", layer: int = 0) -> AttentionConfig:
    _, full = resolve("attention", {"heads": HEADS, **genes})
    return configure_plain(Site(WIDTH, position, layer, 8), full)


def build(genes: dict[str, Gene], layer: int = 0, dtype: torch.dtype = torch.float32) -> Attention:
    """The layer with weights of no special value: nothing is zero, one or the identity."""
    torch.manual_seed(0)
    module = config(genes, layer=layer).build()
    assert isinstance(module, Attention)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if not name.startswith(("entry.weight", "exit.weight")):
                parameter += 0.2 * torch.randn_like(parameter)
    return module.to(dtype)


def inputs(tokens: int = TOKENS, dtype: torch.dtype = torch.float32, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, tokens, WIDTH, generator=generator, dtype=torch.float64).to(dtype)


def error(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()


def decode(module: Attention, x: Tensor, pieces: Sequence[int]) -> tuple[Tensor, State]:
    state: State | None = module.init_state(x.shape[0], x.shape[1], x.dtype)
    out = []
    for part in x.split(list(pieces), 1):
        y, state = module(part, state)
        out.append(y)
    assert state is not None
    return torch.cat(out, 1), state


def copy_projections(to: Attention, q: Tensor, k: Tensor, v: Tensor, o: Tensor) -> None:
    with torch.no_grad():
        to.entry.weight.copy_(torch.cat((q, k, v)))
        to.exit.weight.copy_(o)


def causal_mask(tokens: int = TOKENS, window: int | None = None) -> Tensor:
    """(1, 1, T, T), what transformers' eager attention adds to its scores."""
    distance = torch.arange(tokens)[:, None] - torch.arange(tokens)
    hidden = (distance < 0) | (distance >= (tokens if window is None else window))
    low = torch.finfo(torch.float32).min
    return torch.zeros(tokens, tokens).masked_fill(hidden, low)[None, None]


def check_gradients(ours: Attention, theirs: nn.Module, pairs: dict[str, Tensor]) -> None:
    """Gradients of ours by name against tensors of theirs, to 1e-5 of each one's scale."""
    named = dict(ours.named_parameters())
    for name, expected in pairs.items():
        got = named[name].grad
        assert got is not None, name
        assert error(got, expected) < 1e-5, name


def check_forms_and_cost(genes: dict[str, Gene]) -> None:
    """Any split equals the whole; counted parameters, FLOPs and bytes are the real ones."""
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        module, x = build(genes, dtype=dtype), inputs(dtype=dtype)
        with torch.no_grad():
            whole = module(x)[0]
            for pieces in PIECES:
                assert error(decode(module, x, pieces)[0], whole) < tolerance, pieces
    counted = config(genes).cost(TOKENS, torch.float32)
    module = build(genes).requires_grad_(False)
    with FlopCounterMode(display=False) as counter:
        _, state = decode(module, inputs(batch=1), [1] * TOKENS)
    assert counted.params == sum(p.numel() for p in module.parameters())
    assert counter.get_total_flops() == pytest.approx(counted.flops_per_token * TOKENS, rel=1e-12)
    assert state.bytes() == counted.state_bytes
