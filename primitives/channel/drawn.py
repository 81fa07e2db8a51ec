"""Numbers that look random and are a function of what they are asked for: no generator, no state.

A layer that needs chance in training takes it from here, so that a step computed again (a resume, a
reversible backbone) draws the same bits, on every device and without waiting for it.
"""

from __future__ import annotations

import torch
from torch import Tensor

_ODD = -7046029254386353131
"""The odd number next to 2^64 over the golden ratio, as int64: the step of splitmix64."""
_FIRST, _SECOND = -4658895280553007687, -7723592293110705685
"""The multipliers of splitmix64's finaliser."""


def _shifted(x: Tensor, bits: int) -> Tensor:
    """x >> bits with zeros coming in, where torch copies the sign of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def scrambled(x: Tensor) -> Tensor:
    """The finaliser of splitmix64 (Steele, Lea and Flood, OOPSLA 2014) over int64, elementwise.

    A bijection in which every bit of x moves about half of the result's; products wrap.
    """
    x = x * _ODD
    x = (x ^ _shifted(x, 30)) * _FIRST
    x = (x ^ _shifted(x, 27)) * _SECOND
    return x ^ _shifted(x, 31)


def uniform(shape: tuple[int, ...], seed: Tensor, step: Tensor, stream: int = 0) -> Tensor:
    """Numbers in (0, 1) of float32, a function of seed, step (int64 scalars), stream and index."""
    count = 1
    for size in shape:
        count *= size
    start = scrambled(scrambled(seed + stream) + step)
    bits = _shifted(scrambled(torch.arange(count, device=seed.device) + start), 41)
    # 23 bits and a half: the middle of each step, so that neither 0 nor 1 comes up.
    return ((bits.to(torch.float32) + 0.5) * 2.0**-23).view(shape)


def normal(shape: tuple[int, ...], seed: Tensor, step: Tensor, stream: int = 0) -> Tensor:
    """As `uniform`, with the standard normal distribution."""
    drawn: Tensor = torch.special.ndtri(uniform(shape, seed, step, stream))
    return drawn
