"""Keys and values: what a call's queries may see, and the cache that carries them over calls."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..base import State
from ..position import ContextError
from .patterns import Pattern


@dataclass(frozen=True)
class KeyValues:
    """The keys and values that a call's queries may see; the call's own tokens are the last ones.

    Both are (B, G, S, K), for S consecutive positions from `first` on: position `first + i` stands
    at index (i + turn) mod S. They may be views of a cache, which the next call overwrites.
    """

    keys: Tensor
    values: Tensor
    first: int = 0
    turn: int = 0

    @property
    def tokens(self) -> int:
        return self.keys.shape[2]

    @property
    def end(self) -> int:
        """The position after the last one."""
        return self.first + self.tokens

    def last(self, tokens: int) -> KeyValues:
        """The last `tokens` positions (at least 1, at most all), in order."""
        skip = self.tokens - tokens
        if self.turn == 0:
            keys, values = self.keys[:, :, skip:], self.values[:, :, skip:]
        else:
            index = torch.arange(skip, self.tokens, device=self.keys.device) + self.turn
            index %= self.tokens
            keys, values = self.keys.index_select(2, index), self.values.index_select(2, index)
        return KeyValues(keys, values, self.first + skip)

    def positions(self) -> Tensor:
        """The position at every index, (S,) of int64."""
        index = torch.arange(self.tokens, device=self.keys.device)
        return self.first + (index - self.turn) % self.tokens


def init_cache(
    batch: int,
    kv_heads: int,
    head_dim: int,
    tokens: int,
    dtype: torch.dtype,
    device: torch.device | str,
) -> dict[str, Tensor]:
    """Empty buffers `keys` and `values`, (B, G, S, K)."""
    shape = (batch, kv_heads, tokens, head_dim)
    return {name: torch.zeros(shape, dtype=dtype, device=device) for name in ("keys", "values")}


def extend(state: State, new: KeyValues, pattern: Pattern) -> KeyValues:
    """Write a call's keys and values into the state's cache and return all that the call may see.

    `new` holds T tokens, the first of which is the token `state.length` of the sequence. With a
    window the cache is a ring: position p stands in slot p mod S. Raises ContextError, before
    anything is written, where a token that is still to be seen would be lost.
    """
    size = state.tensors["keys"].shape[2]
    length, end = state.length, state.length + new.tokens
    if end > size and (pattern.window is None or size < pattern.window):
        raise ContextError(f"the cache of attention holds {size} tokens; this call needs {end}")
    seen = new
    if end > size and new.tokens > 1:
        # New tokens take the slots of tokens that the first of them still sees: copy those before.
        past = min(length, size - 1)
        if past > 0:
            seen = _join(_held(state, length).last(past), new)
    _write(state, new, size)
    if length > 0 and (end <= size or new.tokens == 1):
        seen = _held(state, end)
    return seen


def _held(state: State, end: int) -> KeyValues:
    """The tokens before `end` that the cache holds."""
    keys, values = state.tensors["keys"], state.tensors["values"]
    size = keys.shape[2]
    if end <= size:
        return KeyValues(keys[:, :, :end], values[:, :, :end])
    return KeyValues(keys, values, end - size, end % size)


def _join(old: KeyValues, new: KeyValues) -> KeyValues:
    return KeyValues(
        torch.cat((old.keys.to(new.keys.dtype), new.keys), 2),
        torch.cat((old.values.to(new.values.dtype), new.values), 2),
        old.first,
    )


def _write(state: State, new: KeyValues, size: int) -> None:
    """The last min(T, S) tokens to their slots: two pieces where they pass the ring's end."""
    kept = min(new.tokens, size)
    skip = new.tokens - kept
    slot = (state.length + skip) % size
    head = min(kept, size - slot)
    for name, source in (("keys", new.keys), ("values", new.values)):
        buffer = state.tensors[name]
        buffer[:, :, slot : slot + head] = source[:, :, skip : skip + head]
        if head < kept:
            buffer[:, :, : kept - head] = source[:, :, skip + head :]
