"""The angles of RoPE: scaled to longer contexts, and over frames, rows and columns of patches."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

FAST_TURNS, SLOW_TURNS = 32.0, 1.0
"""YaRN's beta and alpha for Llama (arXiv 2309.00071, 3.2): pairs that turn more often than the
first within the original length stay as they are, pairs that turn less often than the second are
interpolated."""


@dataclass(frozen=True)
class RopeForm:
    """How RoPE departs from p * theta^(-2i/K)."""

    scaling: str = "none"
    """linear: positions divided by the factor (Chen et al., arXiv 2306.15595). ntk: theta times
    factor^(K/(K-2)), so that the slowest pair is interpolated and the fastest is not (NTK-aware,
    arXiv 2309.00071, 3.1). yarn: pairs interpolated by how often they turn within the original
    length, and queries and keys warmed (the same, 3.2 to 3.4). All are fixed, so keys that are
    cached stay right."""
    factor: float = 1.0
    original: int = 0
    """YaRN: the length, in tokens, of the training that the scaling starts from."""
    grid: tuple[int, int] = (0, 0)
    """Rows and columns of a frame of patches in row-major order; zeros: a line of tokens."""
    rounded: bool = True
    """YaRN: the ramp from kept to interpolated pairs ends at whole pairs."""

    @property
    def temperature(self) -> float:
        """YaRN's factor on queries and keys each: 0.1 ln(factor) + 1; 1 for the others."""
        return 0.1 * math.log(self.factor) + 1.0 if self.scaling == "yarn" else 1.0

    def frequencies(self, channels: int, theta: float) -> Tensor:
        """The angle of every pair per position, (K/2,) of float64."""
        pairs = torch.arange(0, channels, 2, dtype=torch.float64) / channels
        if self.scaling == "ntk" and channels > 2:
            theta *= self.factor ** (channels / (channels - 2))
        plain = theta**-pairs
        if self.scaling == "linear":
            return plain / self.factor
        if self.scaling == "yarn":
            kept = 1.0 - self._interpolated(channels, theta)
            return plain * kept + plain / self.factor * (1.0 - kept)
        return plain

    def _interpolated(self, channels: int, theta: float) -> Tensor:
        """YaRN's share of interpolation per pair: a ramp over the pairs' indices.

        As in the authors' code: the ramp is linear in the index and ends at whole indices, where
        the paper's is linear in the number of turns. gpt-oss does not round the ends.
        """

        def index(turns: float) -> float:
            """The pair, as a real number, that turns so often within the original length."""
            wavelengths = math.log(self.original / (turns * 2 * math.pi))
            return channels * wavelengths / (2 * math.log(theta))

        fast, slow = index(FAST_TURNS), index(SLOW_TURNS)
        low = max(math.floor(fast) if self.rounded else fast, 0)
        high = min(math.ceil(slow) if self.rounded else slow, channels - 1)
        ramp = torch.arange(channels // 2, dtype=torch.float64) - low
        return (ramp / max(high - low, 0.001)).clamp(0.0, 1.0)

    def angles(self, channels: int, theta: float, tokens: int) -> Tensor:
        """The angle of every token's pairs, (tokens, K/2) of float64."""
        index = torch.arange(tokens)
        rate = self.frequencies(channels, theta)
        rows, columns = self.grid
        if not rows:
            return torch.outer(index.double(), rate)
        places = (index // (rows * columns), index // columns % rows, index % columns)
        parts = zip(places, torch.split(rate, sections(channels)), strict=True)
        return torch.cat([torch.outer(place.double(), part) for place, part in parts], -1)


PLAIN = RopeForm()


def sections(channels: int) -> list[int]:
    """The pairs that turn with the frame, the row and the column: a quarter, three eighths each.

    The split of Qwen2-VL's M-RoPE (arXiv 2409.12191, 2.1): 16, 24 and 24 of 64 pairs.
    """
    pairs = channels // 2
    frames = pairs // 4
    rows = (pairs - frames + 1) // 2
    return [frames, rows, pairs - frames - rows]
