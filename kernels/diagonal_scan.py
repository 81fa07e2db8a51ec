"""The diagonal recurrence: h_t = exp(log_a_t) * h_{t-1} + b_t, element by element.

The core of HGRN (arXiv 2311.04823), RG-LRU (2402.19427) and minGRU (2410.01201).
"""

from __future__ import annotations

from . import definitions
from .backend import choose
from .letters import BD, BTD


def diagonal_scan(log_a: BTD, b: BTD, state: BD | None = None) -> tuple[BTD, BD]:
    """The states of all tokens (b's dtype) and the last one (float32 at least).

    `log_a` is the natural logarithm of the decay, at most 0; `state` continues a sequence (None:
    zeros). Raises `Unsupported` where a pinned backend does not serve the case.
    """
    choose("diagonal_scan", b.device)
    return definitions.diagonal_scan(log_a, b, state)
