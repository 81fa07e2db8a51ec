"""Attention over persistent tokens and the tokens near by, and the cache of those.

Every query sees all persistent tokens, whose keys have no position: with RoPE they meet the query
before it is turned. All take part in one softmax.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..position import ContextError


def attend(
    q: Tensor, plain: Tensor, keys: Tensor, values: Tensor, prefix: Tensor, hidden: Tensor | None
) -> Tensor:
    """softmax over [persistent || keys], (..., H, T, K).

    q (..., H, T, K) meets `keys` (..., H, S, K), `plain` the persistent tokens, `prefix` (2, H, P,
    K), their keys and values. `hidden`, broadcast to (..., H, T, S), is true where a query does not
    see a key.
    """
    scale = q.shape[-1] ** -0.5
    wide = torch.promote_types(q.dtype, torch.float32)
    near = ((q * scale) @ keys.mT).to(wide)
    if hidden is not None:
        near = near.masked_fill(hidden, -torch.inf)
    before = prefix.shape[2]
    if not before:
        weights: Tensor = near.softmax(-1).to(q.dtype)
        return weights @ values
    always = ((plain * scale) @ prefix[0].mT).to(wide)
    weights = torch.cat((always, near), -1).softmax(-1).to(q.dtype)
    return weights[..., :before] @ prefix[1] + weights[..., before:] @ values


def attend_window(
    q: Tensor, plain: Tensor, keys: Tensor, values: Tensor, prefix: Tensor, window: int
) -> Tensor:
    """`attend` where each of the last T of S tokens sees itself and the window - 1 before it.

    q and plain (B, H, T, K), keys and values (B, H, S, K), T <= S < T + window, in O(T window).
    """
    tokens, past = q.shape[2], keys.shape[2] - q.shape[2]
    if tokens == 1:
        return attend(q, plain, keys, values, prefix, None)
    if tokens <= 2 * window:
        at = torch.arange(keys.shape[2], device=q.device)
        distance = at[past:, None] - at
        return attend(q, plain, keys, values, prefix, (distance < 0) | (distance >= window))
    blocks = -(-tokens // window)
    end = blocks * window - tokens

    def split(t: Tensor, parts: int) -> Tensor:
        """(B, H, parts * window, K) to (B, parts, H, window, K)."""
        return t.reshape(*t.shape[:2], parts, window, t.shape[-1]).transpose(1, 2)

    def cut(t: Tensor) -> Tensor:
        """The queries of every block."""
        return split(F.pad(t, (0, 0, 0, end)), blocks)

    def with_previous(t: Tensor) -> Tensor:
        """Every block's keys: those of the block before it and its own."""
        t = split(F.pad(t, (0, 0, window - past, end)), blocks + 1)
        return torch.cat((t[:, :-1], t[:, 1:]), 3)

    at = torch.arange(2 * window, device=q.device)
    distance = at[window:, None] - at
    hidden = ((distance < 0) | (distance >= window)).repeat(blocks, 1, 1)
    hidden[0, :, : window - past] = True  # what fills the place of tokens before the first
    o = attend(
        cut(q), cut(plain), with_previous(keys), with_previous(values), prefix, hidden[:, None]
    )
    return o.transpose(1, 2).flatten(2, 3)[:, :, :tokens]


def extend(
    keys: Tensor, values: Tensor, new: tuple[Tensor, Tensor], length: int, window: int
) -> tuple[Tensor, Tensor]:
    """Write a call's keys and values into a ring and return all that the call may see, in order.

    The ring, (B, H, S, K) twice, holds position p in slot p mod S; `length` tokens came before.
    Raises ContextError where a token that is still to be seen would be lost.
    """
    size, tokens = keys.shape[2], new[0].shape[2]
    end = length + tokens
    if end > size and size < window:
        raise ContextError(f"the cache of attention holds {size} tokens; this call needs {end}")
    device = keys.device
    past = torch.arange(max(0, length - window + 1), length, device=device) % size
    seen = (
        torch.cat((keys[:, :, past], new[0].to(keys.dtype)), 2),
        torch.cat((values[:, :, past], new[1].to(values.dtype)), 2),
    )
    slots = torch.arange(max(length, end - size), end, device=device)
    keys[:, :, slots % size] = new[0][:, :, slots - length].to(keys.dtype)
    values[:, :, slots % size] = new[1][:, :, slots - length].to(values.dtype)
    return seen
