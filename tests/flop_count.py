"""torch's counter of FLOPs with the attention kernel of the CPU, which it does not know."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode


def _cpu_attention(q: list[int], k: list[int], v: list[int], *_: object, **__: object) -> int:
    """Two products: q (B, H, T, K) with k (B, G, S, K), the weights with v (B, G, S, V)."""
    batch, heads, tokens, width = q
    return 2 * batch * heads * tokens * k[2] * (width + v[3])


def counter() -> FlopCounterMode:
    """A counter that prints nothing."""
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return FlopCounterMode(display=False, custom_mapping={kernel: _cpu_attention})
