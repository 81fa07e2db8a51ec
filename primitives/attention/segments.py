"""Segment recurrence: attention over the own segment and a memory of the tokens before it.

Transformer-XL (Dai et al., arXiv 1901.02860, 3.2): a sequence is cut into segments of L tokens. A
token sees its own segment up to itself and the M tokens before the segment, whose keys and values
are W_k SG(h) and W_v SG(h): no gradient goes into the tokens of earlier segments.

The state holds keys and values, not the inputs h: with weights that stand still they say the same,
and a decoded token need not project the memory again. So gradients end at the start of a call too,
those of W_k and W_v included.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels.letters import BTD
from ..base import Carry, State
from ..position import Rotary
from .keyvalues import KeyValues, extend
from .layer import Attention, AttentionConfig
from .patterns import HeadPattern, Ranges
from .weigh import Biases, Score, weigh


@dataclass(frozen=True)
class Segments(HeadPattern):
    """A query sees its own segment of `segment` tokens up to itself, and `memory` tokens before."""

    segment: int
    memory: int

    def first(self, query: int) -> int:
        """The first position that a query sees."""
        return max(0, query - query % self.segment - self.memory)

    def visible(self, query: Tensor, key: Tensor, tokens: int = 0) -> Tensor:
        return (key >= query - query % self.segment - self.memory) & (key <= query)

    def past(self, start: int, end: int) -> Ranges:
        return (range(self.first(start), start),)

    def live(self, end: int, size: int) -> Ranges:
        return self.past(end, end + 1)

    def kept(self, context: int) -> int:
        return min(context, self.segment + self.memory)

    def slots(self, at: Tensor, size: int) -> Tensor:
        return at % size

    def room(self, size: int) -> int | None:
        return size if size < self.segment + self.memory else None

    def seen(self, context: int) -> float:
        whole, rest = divmod(context, self.segment)
        full = -(-self.memory // self.segment)
        # Segments from `full` on do not see the first n L - M tokens.
        later = max(0, whole - full)
        hidden = self.segment * (whole * (whole - 1) - full * (full - 1)) // 2 if later else 0
        hidden = self.segment * (hidden - later * self.memory)
        hidden += rest * max(0, whole * self.segment - self.memory)
        return (context + 1) / 2 - hidden / context

    def block(self) -> int | None:
        return self.segment

    def entries(self, number: int) -> range:
        """The compressed memories that segment `number` sees, counted from the sequence's start."""
        return range(0)


@dataclass(frozen=True)
class Compressed:
    """Keys and values (B, G, E, K) of consecutive compressed memories, the first being `origin`.

    They are not turned: a segment sees them at the places just before its memory, so that the same
    one stands at another place for the next segment.
    """

    keys: Tensor
    values: Tensor
    origin: int
    rotary: Rotary | None

    def part(self, entries: range, stop: int) -> tuple[Tensor, Tensor]:
        """Keys and values of some of them, which stand right before position `stop`."""
        span = slice(entries.start - self.origin, entries.stop - self.origin)
        keys, values = self.keys[:, :, span], self.values[:, :, span]
        if self.rotary is not None and len(entries):
            turned: Tensor = self.rotary(keys.transpose(1, 2), stop - len(entries))
            keys = turned.transpose(1, 2)
        return keys, values


@dataclass(frozen=True)
class SegmentConfig(AttentionConfig):
    """Final numbers of attention with segment recurrence; `pattern` is a `Segments`."""

    def build(self) -> Attention:
        return SegmentAttention(self)


class SegmentAttention(Attention):
    """See the module. It lends no keys and values: its queries need them in two forms."""

    def forward(
        self, x: BTD, state: State | None = None, carry: Carry | None = None
    ) -> tuple[BTD, State | None]:
        """Raises ContextError where the tokens do not fit in the state's cache."""
        pattern, tokens = self.config.pattern, x.shape[1]
        assert isinstance(pattern, Segments)
        start = 0 if state is None else state.length
        mixed, gate = self._project(x)
        q, own = self._heads(mixed, start)
        memory = own
        if torch.is_grad_enabled() and pattern.segment - start % pattern.segment < tokens:
            # What later segments of the call see: the same numbers, without gradients into x.
            memory = self._heads(self._project(x.detach())[0], start)[1]
        far = self.compressed(x, state)
        if state is not None:
            held = extend(state, own, pattern)
            assert isinstance(held, KeyValues)
            if tokens > 1:
                memory = _joined(held, memory, pattern.first(start), start)
            state = State(start + tokens, state.tensors)
        if self.position is not None:
            q = self.position.queries(q)
        score, q = self.scoring.begin(carry), q.transpose(1, 2)
        if tokens == 1:
            kv = own if state is None else held
            assert isinstance(kv, KeyValues)
            out = attend_one(q, kv, far, pattern, score, self.position)
        else:
            out = attend_segments(q, own, memory, far, pattern, score, self.position)
        out = self.scoring.finish(out.transpose(1, 2), x).flatten(2)
        if gate is not None:
            out = out * torch.sigmoid(gate)
        return self.exit(out), state

    def compressed(self, x: BTD, state: State | None) -> Compressed | None:
        """What is read of the time before the memory, x being the call's tokens."""
        return None


def _joined(held: KeyValues, own: KeyValues, first: int, start: int) -> KeyValues:
    """The positions `first`..start-1 of a cache and then those of the call."""
    if first == start:
        return own
    old = held.take((range(first, start),))
    keys, values = (t.detach().to(own.keys.dtype) for t in (old.keys, old.values))
    return KeyValues(torch.cat((keys, own.keys), 2), torch.cat((values, own.values), 2), own.end)


def attend_one(
    q: Tensor,
    kv: KeyValues,
    far: Compressed | None,
    pattern: Segments,
    score: Score,
    position: Biases | None,
) -> Tensor:
    """One query (B, H, 1, K) at the last position of `kv` over what it sees."""
    at = kv.end - 1
    first = pattern.first(at)
    kv = kv.take((range(first, at + 1),))
    if score.tape is not None:
        kv = kv.ordered()
    keys, values, places = kv.keys.to(q.dtype), kv.values.to(q.dtype), kv.positions()
    entries = pattern.entries(at // pattern.segment)
    if far is not None and len(entries):
        old, said = far.part(entries, first)
        keys, values = (
            torch.cat((old.to(q.dtype), keys), 2),
            torch.cat((said.to(q.dtype), values), 2),
        )
        before = torch.arange(first - len(entries), first, device=q.device)
        places = torch.cat((before, places))
    bias = None if position is None else position(at - places[None], q)
    return weigh(q, keys, values, bias, score)


def attend_segments(
    q: Tensor,
    own: KeyValues,
    memory: KeyValues,
    far: Compressed | None,
    pattern: Segments,
    score: Score,
    position: Biases | None,
) -> Tensor:
    """Each segment's queries over compressed memories, the memory before the segment and their own
    segment.

    q (B, H, T, K) are the queries at the positions of `own`. `memory` holds what is read of every
    position that ends before the query's segment or before the call: consecutive positions, the
    last ones the call's own. Returns (B, H, T, V). Segments with a whole memory are computed
    together.
    """
    end, size = own.end, pattern.segment
    start, origin = end - q.shape[2], memory.end - memory.tokens
    # Whole segments with a whole memory: from `steady` to `last`.
    steady = -(-max(start, origin + pattern.memory) // size)
    last = max(steady, end // size)
    while steady < last and len(pattern.entries(steady)) < len(pattern.entries(last - 1)):
        steady += 1
    out, at = [], start
    while at < end:
        number = at // size
        if number == steady and steady < last and at == number * size:
            stop = last * size
            out.append(_steady(q, own, memory, far, pattern, score, position, (at, stop)))
        else:
            stop = min(end, (number + 1) * size)
            near = max(start, number * size)
            first = pattern.first(at)
            parts = [_parts(memory, first, near), _parts(own, near, stop)]
            entries = pattern.entries(number)
            if far is not None and len(entries):
                parts.insert(0, far.part(entries, first))
                first -= len(entries)
            keys, values = (torch.cat([part[i].to(q.dtype) for part in parts], 2) for i in (0, 1))
            queries = q[:, :, at - start : stop - start]
            bias = _bias(queries, at, first, stop, position)
            out.append(weigh(queries, keys, values, bias, score))
        at = stop
    return out[0] if len(out) == 1 else torch.cat(out, 2)


def _parts(kv: KeyValues, first: int, stop: int) -> tuple[Tensor, Tensor]:
    """Keys and values at the consecutive positions first..stop-1."""
    origin = kv.end - kv.tokens
    span = slice(first - origin, stop - origin)
    return kv.keys[:, :, span], kv.values[:, :, span]


def _bias(q: Tensor, at: int, first: int, stop: int, position: Biases | None) -> Tensor:
    """The biases of queries from position `at` on over keys first..stop-1, later ones hidden."""
    queries = torch.arange(at, at + q.shape[2], device=q.device)
    distance = queries[:, None] - torch.arange(first, stop, device=q.device)
    if position is None:
        bias = torch.zeros((), device=q.device).expand(1, 1, *distance.shape)
    else:
        bias = position(distance, q)
    return bias.masked_fill(distance < 0, -torch.inf)


def _windows(t: Tensor, first: int, count: int, step: int, size: int) -> Tensor:
    """(B, G, S, K) to (B, count, G, size, K): runs of `size`, at first, first + step and so on."""
    if size == 0:
        return t[:, :, :0].unsqueeze(1).expand(-1, count, -1, -1, -1)
    stop = first + (count - 1) * step + size
    return t[:, :, first:stop].unfold(2, size, step).permute(0, 2, 1, 4, 3)


def _steady(
    q: Tensor,
    own: KeyValues,
    memory: KeyValues,
    far: Compressed | None,
    pattern: Segments,
    score: Score,
    position: Biases | None,
    span: tuple[int, int],
) -> Tensor:
    """The segments that fill the positions of `span`: all see the same distances."""
    size, batch = pattern.segment, q.shape[0]
    start, origin = own.end - own.tokens, memory.end - memory.tokens
    first, count = span[0] // size, (span[1] - span[0]) // size
    lead = len(pattern.entries(first))
    old: list[Tensor] = []
    if far is not None and lead:
        parts = [
            far.part(pattern.entries(n), n * size - pattern.memory)
            for n in range(first, first + count)
        ]
        old = [torch.stack([part[i] for part in parts], 1).to(q.dtype) for i in (0, 1)]

    def together(i: int, near: Tensor, before: Tensor) -> Tensor:
        held = _windows(before, span[0] - pattern.memory - origin, count, size, pattern.memory)
        inside = _windows(near, span[0] - start, count, size, size)
        return torch.cat((*old[i : i + 1], held.to(q.dtype), inside), 3).flatten(0, 1)

    queries = _windows(q, span[0] - start, count, size, size).flatten(0, 1)
    before = lead + pattern.memory
    bias = _bias(queries, before, 0, before + size, position)
    keys = together(0, own.keys, memory.keys)
    out = weigh(queries, keys, together(1, own.values, memory.values), bias, score)
    return torch.unflatten(out, 0, (batch, count)).transpose(1, 2).flatten(2, 3)
