"""Which tokens a query sees, as far as positions alone decide it, and what a cache must keep.

A pattern defines `visible`; everything else about it follows from that and is only written down
in closed form: the positions that a call reads (`past`), those that later calls still read
(`live`), where a cache puts them (`slots`), and how many a query sees on average (`seen`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

Ranges = tuple[range, ...]
"""Positions in ascending order."""

Mask = Callable[[Tensor, Tensor], Tensor]
"""From the positions of a query and a key to whether it sees it, elementwise."""


def count(ranges: Ranges) -> int:
    return sum(len(r) for r in ranges)


def positions(ranges: Iterable[range], device: torch.device | str = "cpu") -> Tensor:
    """The positions as a tensor of int64."""
    pieces = [torch.arange(r.start, r.stop, r.step, device=device) for r in ranges if len(r)]
    return torch.cat(pieces) if pieces else torch.zeros(0, dtype=torch.int64, device=device)


class Pattern(ABC):
    """What all heads of an operator see."""

    causal: bool = True
    """False: a query may see later tokens too, and there is no cache."""

    @abstractmethod
    def parts(self, kv_heads: int) -> tuple[tuple[int, HeadPattern], ...]:
        """Runs of key-value heads, each with the pattern of its queries."""

    @abstractmethod
    def seen(self, context: int) -> float:
        """The tokens that a query sees, on average over the positions 1..context and the heads."""

    def cached(self, kv_heads: int, context: int) -> int:
        """The keys that the caches of all heads together hold, for at most `context` tokens."""
        if not self.causal:
            return 0
        return sum(heads * part.kept(context) for heads, part in self.parts(kv_heads))


class HeadPattern(Pattern):
    """One pattern for all the heads that have it."""

    def parts(self, kv_heads: int) -> tuple[tuple[int, HeadPattern], ...]:
        return ((kv_heads, self),)

    @abstractmethod
    def visible(self, query: Tensor, key: Tensor, tokens: int = 0) -> Tensor:
        """The definition, elementwise: does the query at one position see the key at another?

        `tokens`, the sequence's length, matters only to what is not causal.
        """

    def mask(self, tokens: int, device: torch.device) -> Mask:
        """`visible` for one sequence's length and device, with nothing left to look up."""
        return lambda query, key: self.visible(query, key, tokens)

    def sees(self, queries: Tensor, keys: Tensor, tokens: int = 0) -> Tensor:
        """The mask (..., T, S) for positions (..., T) and (..., S)."""
        return self.visible(queries[..., :, None], keys[..., None, :], tokens)

    @abstractmethod
    def past(self, start: int, end: int) -> Ranges:
        """The positions before `start` that the queries start..end-1 see; with one query exactly
        those, with several perhaps more."""

    @abstractmethod
    def live(self, end: int, size: int) -> Ranges:
        """The positions before `end` that a cache of `size` slots must still hold then."""

    @abstractmethod
    def kept(self, context: int) -> int:
        """S: the slots of a cache for sequences of at most `context` tokens."""

    @abstractmethod
    def slots(self, at: Tensor, size: int) -> Tensor:
        """The slot of each position (S,) in a cache of `size` slots."""

    def slot(self, at: int, size: int) -> int:
        """The slot of one position."""
        return int(self.slots(torch.tensor([at]), size))

    def held(self, end: int, size: int) -> int:
        """The first so many slots hold tokens when the sequence has `end` tokens."""
        return min(end, size)

    def linear(self, end: int, size: int) -> bool:
        """Position p stands in slot p for all p below `end`, and none was overwritten."""
        return end <= size

    @abstractmethod
    def room(self, size: int) -> int | None:
        """The longest sequence that a cache of `size` slots serves; None for any length."""

    @abstractmethod
    def block(self) -> int | None:
        """Queries that share most of their keys, where computing them together saves something."""


@dataclass(frozen=True)
class Span:
    """A span that is learned per head (Sukhbaatar et al., arXiv 1905.07799)."""

    ramp: int
    """R: over so many tokens the mask falls from 1 to 0."""
    penalty: float
    """lambda: the weight of the mean span, in tokens, in the loss."""


@dataclass(frozen=True)
class Window(HeadPattern):
    """A query sees the tokens at distances 0, d, 2d, ... (w - 1)d and the first `sinks` tokens.

    `window` w = None has no end, so `Window()` is full attention. Not causal: it sees as far ahead
    as back, and the first `sinks` tokens see every token. A window with sinks has no dilation.
    """

    window: int | None = None
    sinks: int = 0
    dilation: int = 1
    causal: bool = True
    span: Span | None = None
    """A learned span within the window; its soft mask is a bias, see `span.py`."""

    @property
    def full(self) -> bool:
        return self.window is None and self.dilation == 1

    @property
    def reach(self) -> int | None:
        """The tokens from a query to the last one that its window shows it, both included."""
        return None if self.window is None else (self.window - 1) * self.dilation + 1

    def visible(self, query: Tensor, key: Tensor, tokens: int = 0) -> Tensor:
        distance = query - key
        if not self.causal:
            distance = distance.abs()
        seen = distance >= 0
        if self.reach is not None:
            seen = seen & (distance < self.reach)
        if self.dilation > 1:
            seen = seen & (distance % self.dilation == 0)
        if self.sinks:
            first = key < self.sinks
            seen = seen | (
                (first & (key <= query)) if self.causal else (first | (query < self.sinks))
            )
        return seen

    def past(self, start: int, end: int) -> Ranges:
        low = 0 if self.reach is None else max(0, start - self.reach + 1)
        if self.dilation > 1 and end - start == 1:
            return (range(low + (start - low) % self.dilation, start, self.dilation),)
        return (
            (range(min(self.sinks, low)), range(low, start)) if self.sinks else (range(low, start),)
        )

    def live(self, end: int, size: int) -> Ranges:
        return self.past(end, end + max(2, self.dilation))

    def kept(self, context: int) -> int:
        return context if self.reach is None else min(context, self.sinks + self.reach)

    def slots(self, at: Tensor, size: int) -> Tensor:
        if self.reach is None or size < self.sinks + self.reach:
            return at
        ring = self.sinks + (at - self.sinks) % (size - self.sinks)
        return torch.where(at < self.sinks, at, ring)

    def slot(self, at: int, size: int) -> int:
        # A step of decoding waits for this in every layer: no tensors.
        if self.reach is None or size < self.sinks + self.reach or at < self.sinks:
            return at
        return self.sinks + (at - self.sinks) % (size - self.sinks)

    def room(self, size: int) -> int | None:
        return size if self.reach is None or size < self.sinks + self.reach else None

    def seen(self, context: int) -> float:
        if self.window is None:
            near = context
        else:
            near = min(context, (self.window - 1 + self.sinks) * self.dilation)
        # `near` queries whose window begins before the sequence, in runs of `dilation` of equal
        # count; the rest see a whole window.
        runs, rest = divmod(near, self.dilation)
        total = self.dilation * runs * (runs + 1) // 2 + rest * (runs + 1)
        if self.window is not None:
            total += (context - near) * (self.window + self.sinks)
        return total / context

    def block(self) -> int | None:
        return self.reach


@dataclass(frozen=True)
class Chunk(HeadPattern):
    """A query sees the tokens of its own chunk of `chunk` tokens, up to itself (Llama 4)."""

    chunk: int

    def visible(self, query: Tensor, key: Tensor, tokens: int = 0) -> Tensor:
        return (query // self.chunk == key // self.chunk) & (key <= query)

    def past(self, start: int, end: int) -> Ranges:
        return (range(start - start % self.chunk, start),)

    def live(self, end: int, size: int) -> Ranges:
        return self.past(end, end + 1)

    def kept(self, context: int) -> int:
        return min(context, self.chunk)

    def slots(self, at: Tensor, size: int) -> Tensor:
        return at % self.chunk

    def held(self, end: int, size: int) -> int:
        return (end - 1) % self.chunk + 1

    def linear(self, end: int, size: int) -> bool:
        return end <= min(size, self.chunk)

    def room(self, size: int) -> int | None:
        return size if size < self.chunk else None

    def seen(self, context: int) -> float:
        whole, rest = divmod(context, self.chunk)
        total = whole * self.chunk * (self.chunk + 1) + rest * (rest + 1)
        return total / (2 * context)

    def block(self) -> int | None:
        return self.chunk


@dataclass(frozen=True)
class Summaries(HeadPattern):
    """A query sees the last `width` tokens of every block of `stride` before it, and itself.

    The second factor of fixed attention (Child et al., arXiv 1904.10509, 4.2). The paper's set does
    not hold the query itself, so the first tokens would see nothing.
    """

    stride: int
    width: int

    def visible(self, query: Tensor, key: Tensor, tokens: int = 0) -> Tensor:
        summary = key % self.stride >= self.stride - self.width
        return (summary & (key < query)) | (key == query)

    def rank(self, at: int) -> int:
        """The summaries before a position."""
        blocks, rest = divmod(at, self.stride)
        return blocks * self.width + max(0, rest - (self.stride - self.width))

    def past(self, start: int, end: int) -> Ranges:
        firsts = range(self.stride - self.width, start, self.stride)
        return tuple(range(first, min(start, first + self.width)) for first in firsts)

    def live(self, end: int, size: int) -> Ranges:
        return self.past(end, end + 1)

    def kept(self, context: int) -> int:
        # The token of the call stands behind the summaries, in the slot of the next one.
        return self.rank(context - 1) + 1

    def slots(self, at: Tensor, size: int) -> Tensor:
        blocks, rest = at // self.stride, at % self.stride
        return blocks * self.width + (rest - (self.stride - self.width)).clamp_min(0)

    def held(self, end: int, size: int) -> int:
        return self.rank(end - 1) + 1

    def linear(self, end: int, size: int) -> bool:
        return self.width == self.stride

    def room(self, size: int) -> int | None:
        # The last token that still finds the slot `size - 1`.
        blocks, rest = divmod(size - 1, self.width)
        return blocks * self.stride + self.stride - self.width + rest + 1

    def seen(self, context: int) -> float:
        blocks, rest = divmod(context, self.stride)
        width = self.width
        # Ranks at the start of each block, then within the blocks.
        total = self.stride * width * blocks * (blocks - 1) // 2 + blocks * width * (width - 1) // 2
        late = max(0, rest - (self.stride - width))
        total += rest * blocks * width + late * (late - 1) // 2
        return total / context + 1

    def block(self) -> int | None:
        return self.stride


@dataclass(frozen=True)
class PerHead(Pattern):
    """Another pattern for each key-value head and the queries that read it."""

    each: tuple[HeadPattern, ...]
    causal: bool = True

    def parts(self, kv_heads: int) -> tuple[tuple[int, HeadPattern], ...]:
        return tuple((len(list(run)), pattern) for pattern, run in groupby(self.each))

    def seen(self, context: int) -> float:
        return sum(part.seen(context) for part in self.each) / len(self.each)


def per_head(each: Iterable[HeadPattern]) -> Pattern:
    """`PerHead`, or the one pattern that all heads have."""
    patterns = tuple(each)
    if len(set(patterns)) == 1:
        return patterns[0]
    return PerHead(patterns, all(pattern.causal for pattern in patterns))


def pattern_problem(lender: Pattern, borrower: Pattern) -> str | None:
    """Why a cache for the first does not serve the second, in a sentence; None if it does."""
    if lender.causal != borrower.causal:
        return "of lender and borrower one reads later tokens and one does not"
    if lender == borrower or (isinstance(lender, Window) and lender.window is None):
        return None
    if isinstance(lender, Window) and lender.dilation == 1 and lender.causal:
        kept = lender.reach
        assert kept is not None
        if isinstance(borrower, Window):
            if (
                borrower.reach is not None
                and borrower.reach <= kept
                and (borrower.sinks <= lender.sinks)
            ):
                return None
            sees = "every token" if borrower.reach is None else f"{borrower.reach} tokens"
            if borrower.sinks > lender.sinks:
                sees = f"the first {borrower.sinks} tokens"
            return f"the borrower sees {sees} and the lender keeps {kept}"
        if isinstance(borrower, Chunk) and borrower.chunk <= kept:
            return None
    return "the lender's cache does not keep every token that the borrower's pattern shows"
