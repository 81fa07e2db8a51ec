"""Width over layers, as published models of a size have it.

A layer is two slots: attention and its channel mixer, or two blocks of Mamba, which its paper puts
in their place (arXiv 2312.00752, section 3.4). So counted, models of different kinds agree: Mamba's
and Mamba-2's have the widths of GPT-3's and twice as many blocks as those have layers. Kaplan et
al. (arXiv 2001.08361, section 3.1) find that the loss depends little on the aspect.
"""

from __future__ import annotations

import bisect
import math

from .genome import Genome

ASPECTS = (
    (124e6, 768 / 12),
    (350e6, 1024 / 24),
    (760e6, 1536 / 24),
    (1.3e9, 2048 / 24),
    (2.7e9, 2560 / 32),
    (6.7e9, 4096 / 32),
)
"""Parameters and width over layers, from Brown et al., arXiv 2005.14165, table 2.1; beyond the last
it stays, as in their 13B, 175B, Llama 2 7B (128) and Llama 3.1 405B (130)."""


def aspect_of(genome: Genome) -> float:
    """Width over layers, a layer being two slots."""
    return 2 * genome.width / len(genome.slots)


def usual_aspect(params: float) -> float:
    """The aspect of published models with so many active parameters, between those of `ASPECTS` by
    the logarithm of the parameters."""
    sizes = [size for size, _ in ASPECTS]
    i = bisect.bisect(sizes, params)
    if i in (0, len(sizes)):
        return ASPECTS[min(i, len(sizes) - 1)][1]
    (low, least), (high, most) = ASPECTS[i - 1], ASPECTS[i]
    share = math.log(params / low) / math.log(high / low)
    return float(least * (most / least) ** share)
