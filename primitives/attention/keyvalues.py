"""Keys and values: what a call's queries may see, and the cache that carries them over calls."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..base import State
from ..position import ContextError
from .patterns import HeadPattern, Pattern, Ranges, count, positions


@dataclass(frozen=True)
class KeyValues:
    """The keys and values that a call's queries may see; the call's own tokens are among them.

    Both are (B, G, S, K). They stand at S consecutive positions that end before `stop` (S if None),
    or at the ascending positions `at`, or as `layout` puts the first S slots of its cache. They may
    be views of a cache, which the next call overwrites.
    """

    keys: Tensor
    values: Tensor
    stop: int | None = None
    at: Tensor | None = None
    layout: tuple[HeadPattern, int] | None = None
    """The pattern and the size of the cache."""

    @property
    def tokens(self) -> int:
        return self.keys.shape[2]

    @property
    def end(self) -> int:
        """The position after the last one."""
        return self.tokens if self.stop is None else self.stop

    def heads(self, first: int, last: int) -> KeyValues:
        """Those of the key-value heads first..last-1."""
        keys, values = self.keys[:, first:last], self.values[:, first:last]
        return KeyValues(keys, values, self.stop, self.at, self.layout)

    def positions(self) -> Tensor:
        """The position at every index, (S,) of int64."""
        device = self.keys.device
        if self.at is not None:
            return self.at
        if self.layout is None:
            return torch.arange(self.end - self.tokens, self.end, device=device)
        pattern, size = self.layout
        held = positions((*pattern.past(self.end - 1, self.end), range(self.end - 1, self.end)))
        order = torch.empty_like(held)
        order[pattern.slots(held, size)] = held
        return order.to(device)

    def ordered(self) -> KeyValues:
        """The same in ascending order of positions."""
        if self.at is not None or self.layout is None:
            return self
        at = self.positions()
        order = at.argsort()
        keys, values = self.keys.index_select(2, order), self.values.index_select(2, order)
        return KeyValues(keys, values, self.stop, at[order])

    def take(self, wanted: Ranges) -> KeyValues:
        """Those at the wanted positions, which are among them; all of them as they are."""
        if count(wanted) == self.tokens:
            return self
        ranges = [r for r in wanted if len(r)]
        if self.at is None and self.layout is None and len(ranges) == 1:
            first = self.end - self.tokens
            span = slice(ranges[0].start - first, ranges[0].stop - first, ranges[0].step)
            keys, values = self.keys[:, :, span], self.values[:, :, span]
            return KeyValues(keys, values, self.end, positions(ranges, self.keys.device))
        at = positions(ranges, self.keys.device)
        if self.at is not None:
            index = torch.searchsorted(self.at, at)
        elif self.layout is not None:
            index = self.layout[0].slots(at, self.layout[1])
        else:
            index = at - (self.end - self.tokens)
        keys, values = self.keys.index_select(2, index), self.values.index_select(2, index)
        return KeyValues(keys, values, self.end, at)


@dataclass(frozen=True)
class HeadedKeyValues:
    """Those of runs of heads that keep other positions."""

    parts: tuple[KeyValues, ...]

    @property
    def end(self) -> int:
        """The position after the last one."""
        return self.parts[0].end


def init_cache(
    pattern: Pattern,
    batch: int,
    kv_heads: int,
    head_dim: int,
    context: int,
    dtype: torch.dtype,
    device: torch.device | str,
) -> dict[str, Tensor]:
    """Empty buffers for `context` tokens: `keys` and `values` (B, G, S, K).

    Where heads keep different positions every run of heads has its own pair, the second one
    `keys1` and `values1`.
    """
    tensors = {}
    for index, (heads, part) in enumerate(pattern.parts(kv_heads)):
        shape = (batch, heads, part.kept(context), head_dim)
        for name in _names(index):
            tensors[name] = torch.zeros(shape, dtype=dtype, device=device)
    return tensors


def _names(index: int) -> tuple[str, str]:
    suffix = str(index) if index else ""
    return "keys" + suffix, "values" + suffix


def extend(state: State, new: KeyValues, pattern: Pattern) -> KeyValues | HeadedKeyValues:
    """Write a call's keys and values into the state's cache and return all that the call may see.

    `new` holds T tokens, the first of which is the token `state.length` of the sequence. Raises
    ContextError, before anything is written, where a token that is still to be seen would be lost.
    """
    parts = pattern.parts(new.keys.shape[1])
    end = state.length + new.tokens
    for index, (_, part) in enumerate(parts):
        size = state.tensors[_names(index)[0]].shape[2]
        room = part.room(size)
        if room is not None and end > room:
            raise ContextError(f"the cache of attention holds {room} tokens; this call needs {end}")
    seen, first = [], 0
    for index, (heads, part) in enumerate(parts):
        keys, values = (state.tensors[name] for name in _names(index))
        own = new.heads(first, first + heads)
        seen.append(_extend(keys, values, state.length, own, part))
        first += heads
    return seen[0] if len(seen) == 1 else HeadedKeyValues(tuple(seen))


def _extend(
    keys: Tensor, values: Tensor, length: int, new: KeyValues, pattern: HeadPattern
) -> KeyValues:
    size, end, device = keys.shape[2], length + new.tokens, keys.device
    if new.tokens == 1:
        slot = pattern.slot(length, size)
        keys[:, :, slot : slot + 1] = new.keys
        values[:, :, slot : slot + 1] = new.values
        held = pattern.held(end, size)
        layout = None if pattern.linear(end, size) else (pattern, size)
        return KeyValues(keys[:, :, :held], values[:, :, :held], end, None, layout)
    if pattern.linear(end, size):
        keys[:, :, length:end] = new.keys
        values[:, :, length:end] = new.values
        return KeyValues(keys[:, :, :end], values[:, :, :end], end) if length else new
    seen = new
    past = pattern.live(length, size)
    if count(past):
        # Before they are overwritten.
        at = positions(past, device)
        index = pattern.slots(at, size)
        seen = KeyValues(
            torch.cat((keys.index_select(2, index).to(new.keys.dtype), new.keys), 2),
            torch.cat((values.index_select(2, index).to(new.values.dtype), new.values), 2),
            end,
            torch.cat((at, torch.arange(length, end, device=device))),
        )
    later = [range(max(r.start, length), r.stop) for r in pattern.live(end, size)]
    at = positions(later, device)
    index = pattern.slots(at, size)
    keys.index_copy_(2, index, new.keys.index_select(2, at - length).to(keys.dtype))
    values.index_copy_(2, index, new.values.index_select(2, at - length).to(values.dtype))
    return seen
