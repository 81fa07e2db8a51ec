"""Position encodings: rotary (RoPE), linear biases (ALiBi), a learned table."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..kernels.letters import H

LEARNED_POSITIONS = 2048
"""Tokens that a learned table serves."""


class ContextError(ValueError):
    """A call goes beyond what a table of positions or a cache holds."""


_TABLES: dict[tuple[int, float, torch.dtype, torch.device], tuple[Tensor, Tensor]] = {}
_MOST_TABLES = 16


def rope_tables(
    head_dim: int, theta: float, end: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """cos and signed sin of RoPE's angles, (tokens, 1, K), for at least the tokens before `end`.

    Kept for the next call and shared by all layers: at a long context they are as large as a cache.
    """
    key = (head_dim, theta, dtype, device)
    held = _TABLES.get(key)
    if held is not None and held[0].shape[0] >= end:
        return held
    tokens = max(256, 1 << (end - 1).bit_length())
    # A table made in inference mode could not be used in training later.
    with torch.inference_mode(False), torch.no_grad():
        # float64 on the CPU: the angle of a late token loses its digits in float32.
        pairs = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
        angle = torch.outer(torch.arange(tokens, dtype=torch.float64), theta**-pairs)
        cos, sin = angle.cos(), angle.sin()
        tables = (
            torch.cat((cos, cos), -1).unsqueeze(1).to(device, dtype),
            torch.cat((-sin, sin), -1).unsqueeze(1).to(device, dtype),
        )
    if len(_TABLES) >= _MOST_TABLES:
        _TABLES.clear()
    _TABLES[key] = tables
    return tables


class Rotary(nn.Module):
    """RoPE (Su et al., arXiv 2104.09864) in the half-split layout that Llama uses.

    Channel i and channel i + K/2 of a head of width K form a pair, which token p turns by the angle
    p * theta^(-2i/K). `head_dim` must be even.
    """

    def __init__(self, head_dim: int, theta: float) -> None:
        super().__init__()
        if head_dim % 2:
            raise ValueError(f"RoPE turns pairs of channels: a head width of {head_dim} is odd")
        self.head_dim = head_dim
        self.theta = theta

    def forward(self, x: Tensor, start: int) -> Tensor:
        """x (B, T, heads, K), whose first token has position `start`, turned; same shape, dtype."""
        end = start + x.shape[1]
        dtype = torch.promote_types(x.dtype, torch.float32)
        cos, sin = rope_tables(self.head_dim, self.theta, end, dtype, x.device)
        # A roll by half a head swaps the two channels of every pair.
        swapped = torch.roll(x, self.head_dim // 2, -1)
        return torch.addcmul(x * cos[start:end], swapped, sin[start:end]).to(x.dtype)


def alibi_slopes(heads: int) -> list[float]:
    """The slopes m_h of ALiBi (Press et al., arXiv 2108.12409): score += m_h * (key - query).

    For n a power of two: 2^(-8/n), 2^(-16/n), ... Otherwise those of the power of two below, then
    every second slope of the power of two above, as the authors' code does.
    """
    if heads < 1:
        raise ValueError(f"ALiBi needs at least one head, not {heads}")
    below = 1 << (heads.bit_length() - 1)
    slopes = [2.0 ** (-8.0 * (i + 1) / below) for i in range(below)]
    above = [2.0 ** (-8.0 * (i + 1) / (2 * below)) for i in range(0, 2 * below, 2)]
    return slopes + above[: heads - below]


def alibi_bias(slopes: H, distance: Tensor) -> Tensor:
    """-m_h * distance: distance (T, S), query minus key position, to biases (H, T, S)."""
    return -slopes[:, None, None] * distance


class LearnedPosition(nn.Module):
    """A table of one learned vector per position (Gehring et al., arXiv 1705.03122; GPT-2).

    It serves positions below `length` and raises ContextError beyond.
    """

    def __init__(self, width: int, length: int = LEARNED_POSITIONS) -> None:
        super().__init__()
        self.length = length
        self.table = nn.Parameter(torch.randn(length, width) / math.sqrt(width))

    @staticmethod
    def params(width: int, length: int = LEARNED_POSITIONS) -> int:
        """The parameters of a table, counted without making it."""
        return width * length

    def forward(self, tokens: int, start: int = 0) -> Tensor:
        """The vectors, (T, D), of `tokens` positions from `start` on."""
        if start + tokens > self.length:
            raise ContextError(
                f"the learned positions end at {self.length} tokens; this call needs "
                f"{start + tokens}"
            )
        return self.table[start : start + tokens]
