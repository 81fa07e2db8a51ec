"""Small mixtures of experts for tests, in float64, and what goes in."""

from __future__ import annotations

import torch
from torch import Tensor

from mendel.primitives.base import Gene, Site
from mendel.primitives.catalogue import resolve
from mendel.primitives.channel.moe import Moe

WIDTH = 32


def made(name: str = "moe", **genes: Gene) -> Moe:
    torch.manual_seed(0)
    primitive, full = resolve(name, genes)
    module = primitive.configure(Site(WIDTH), full).build().double()
    assert isinstance(module, Moe)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module


def inputs(tokens: int = 29, batch: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, tokens, WIDTH, generator=generator, dtype=torch.float64)


def error(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()


def weight(module: Moe) -> Tensor:
    assert module.router.weight is not None
    return module.router.weight
