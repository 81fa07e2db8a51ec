"""Position encodings: rotary (RoPE), linear biases (ALiBi), sinusoids, a learned table."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..kernels.letters import H
from .rope import PLAIN, RopeForm

LEARNED_POSITIONS = 2048
"""Tokens that a learned table serves."""

ADDED = ("learned", "sinusoidal")
"""Positions that are added to the embeddings: nothing is left to do inside an operator."""


class ContextError(ValueError):
    """A call goes beyond what a table of positions or a cache holds."""


_TABLES: dict[tuple[int, float, RopeForm, torch.dtype, torch.device], tuple[Tensor, Tensor]] = {}
_MOST_TABLES = 16


def rope_tables(
    channels: int,
    theta: float,
    end: int,
    dtype: torch.dtype,
    device: torch.device,
    form: RopeForm = PLAIN,
) -> tuple[Tensor, Tensor]:
    """cos and signed sin of RoPE's angles, (tokens, 1, K), for at least the tokens before `end`.

    Kept for the next call and shared by all layers: at a long context they are as large as a cache.
    """
    key = (channels, theta, form, dtype, device)
    held = _TABLES.get(key)
    if held is not None and held[0].shape[0] >= end:
        return held
    tokens = max(256, 1 << (end - 1).bit_length())
    # A table made in inference mode could not be used in training later.
    with torch.inference_mode(False), torch.no_grad():
        # float64 on the CPU: the angle of a late token loses its digits in float32.
        angle = form.angles(channels, theta, tokens)
        cos, sin = angle.cos() * form.temperature, angle.sin() * form.temperature
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

    Channel i and channel i + K/2 of a head's first K channels form a pair, which token p turns by
    the angle p * theta^(-2i/K), or as `form` says; channels beyond K pass. K must be even.
    """

    def __init__(self, channels: int, theta: float, form: RopeForm = PLAIN) -> None:
        super().__init__()
        if channels % 2:
            raise ValueError(f"RoPE turns pairs of channels: a head width of {channels} is odd")
        self.channels = channels
        self.theta = theta
        self.form = form

    def forward(self, x: Tensor, start: int) -> Tensor:
        """x (B, T, heads, K), whose first token has position `start`, turned; same shape, dtype."""
        if x.shape[-1] > self.channels:
            turned = self.forward(x[..., : self.channels], start)
            return torch.cat((turned, x[..., self.channels :]), -1)
        end = start + x.shape[1]
        dtype = torch.promote_types(x.dtype, torch.float32)
        cos, sin = rope_tables(self.channels, self.theta, end, dtype, x.device, self.form)
        # A roll by half a head swaps the two channels of every pair.
        swapped = torch.roll(x, self.channels // 2, -1)
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


_SINUSOIDS: dict[tuple[int, torch.dtype, torch.device], Tensor] = {}


def sinusoids(tokens: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(tokens, D) of sin(p w_i), i < D/2, and then cos(p w_i), with w_i = 10000^(-2i/D).

    The functions of Vaswani et al. (arXiv 1706.03762, 3.5) in the order of Transformer-XL's code;
    with an odd width there is one sine more. Kept for the next call.
    """
    key = (width, dtype, device)
    held = _SINUSOIDS.get(key)
    if held is None or held.shape[0] < tokens:
        length = max(256, 1 << (tokens - 1).bit_length())
        with torch.inference_mode(False), torch.no_grad():
            rate = 10000.0 ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
            angle = torch.outer(torch.arange(length, dtype=torch.float64), rate)
            held = torch.cat((angle.sin(), angle.cos()), -1)[:, :width].to(device, dtype)
        if len(_SINUSOIDS) >= _MOST_TABLES:
            _SINUSOIDS.clear()
        _SINUSOIDS[key] = held
    return held[:tokens]


class SinusoidalPosition(nn.Module):
    """Fixed sinusoids, added to the embeddings (Vaswani et al., arXiv 1706.03762, 3.5).

    The paper multiplies the embeddings by sqrt(D); here the sinusoids are divided by it, which is
    the same up to the scale of the stream.
    """

    kind: Tensor
    """Holds nothing: its dtype and device are those of the module."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.register_buffer("kind", torch.empty(0), persistent=False)

    def forward(self, tokens: int, start: int = 0) -> Tensor:
        """The vectors, (T, D), of `tokens` positions from `start` on."""
        table = sinusoids(start + tokens, self.width, self.kind.dtype, self.kind.device)
        vectors: Tensor = table[start:] * self.width**-0.5
        return vectors


def added_position(kind: str, width: int) -> LearnedPosition | SinusoidalPosition | None:
    """What a backbone adds to its embeddings, with fresh weights; None where nothing."""
    if kind == "learned":
        return LearnedPosition(width)
    return SinusoidalPosition(width) if kind == "sinusoidal" else None
