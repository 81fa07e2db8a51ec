"""A pattern's whole sequences by torch's FlexAttention, which skips the blocks it does not see.

`kernels/backend.py` chooses it on CUDA devices. On a CPU it can be pinned: there torch computes the
whole mask, forward only.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from typing import Any, cast

import torch
from torch import Tensor

from ...kernels.backend import TRITON_DTYPES
from .patterns import HeadPattern, Window
from .weigh import Score

MOST = 1 << 16
"""Kernels that one process may compile."""

NARROWEST = 16
"""The narrowest head of FlexAttention's kernels."""


def form(pattern: HeadPattern, score: Score, biased: bool, q: Tensor, values: Tensor) -> str:
    """The case of attention that `backend.choose` decides on: `pattern` is what FlexAttention does.

    The others: `full`, which torch's own kernels do; `biased` by position; `scores` that are no
    plain softmax; `narrow` heads; `double` precision.
    """
    if isinstance(pattern, Window) and pattern.full:
        return "full"
    if biased:
        return "biased"
    if not score.fused or score.difference is not None:
        return "scores"
    if q.dtype not in TRITON_DTYPES:
        return "double"
    return "pattern" if min(q.shape[-1], values.shape[-1]) >= NARROWEST else "narrow"


def attend_flex(q: Tensor, keys: Tensor, values: Tensor, pattern: HeadPattern) -> Tensor:
    """`attend` over a whole sequence, without biases, by softmax."""
    mask = block_mask(pattern, q.shape[2], q.device)
    grouped = keys.shape[1] != q.shape[1]
    if q.device.type != "cuda":
        whole = _torchs().flex_attention(q, keys, values, block_mask=mask, enable_gqa=grouped)
        return cast(Tensor, whole)
    # Every pattern and length is a kernel of its own; torch's limit of 8 per function would end
    # a search in an error.
    with torch._dynamo.config.patch(recompile_limit=MOST, accumulated_recompile_limit=MOST):
        return _compiled()(q, keys, values, block_mask=mask, enable_gqa=grouped)


@lru_cache(32)
def block_mask(pattern: HeadPattern, tokens: int, device: torch.device) -> Any:
    """FlexAttention's BlockMask of a pattern for sequences of `tokens` tokens."""
    visible = pattern.mask(tokens, device)
    # A mask made in inference mode could not be used in training later. FlexAttention counts the
    # arguments of what it is given, so the function is bare.
    with torch.inference_mode(False):
        return _torchs().create_block_mask(
            lambda batch, head, query, key: visible(query, key), None, None, tokens, tokens, device
        )


def _torchs() -> Any:
    """Torch's module; importing it takes a second, which only those who use it should wait."""
    return import_module("torch.nn.attention.flex_attention")


@lru_cache(1)
def _compiled() -> Callable[..., Tensor]:
    """Only compiled it is a kernel that skips blocks."""
    compiled = torch.compile(_torchs().flex_attention, fullgraph=True, dynamic=False)
    return cast(Callable[..., Tensor], compiled)
