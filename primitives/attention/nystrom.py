"""Nystromformer: softmax attention through a few landmarks, the means of segments.

Xiong et al., arXiv 2102.03902, equation 13: with Q~ and K~ the means of queries and keys over m
segments of the sequence,

    y = softmax(Q K~^T) pinv(softmax(Q~ K~^T)) softmax(Q~ K^T) V   (scores over sqrt(K)),

and beside it a depthwise convolution of the values. Where m does not divide the sequence the last
segment is shorter; a sequence of at most m tokens is plain attention. This reads the whole
sequence.

The causal form: the product of the last three factors is one value per landmark. A token weighs
those of the whole segments before its own and its own segment's tokens exactly, in one softmax, in
which a landmark counts as the tokens that it stands for. Landmarks and their values are those of
the published form over the tokens before the segment. A segment is L / m tokens, L being the
longest sequence, so the cost stays linear; the state keeps all keys and values, because a new
landmark reads them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.letters import BTD
from ...kernels.short_conv import short_conv
from ..base import BidirectionalError, Cost, Gene, GeneError, Site, State, state_dtype
from ..genes import flag, whole
from ..position import ContextError
from .heads import HeadsConfig, HeadsOperator, heads_config
from .landmarks import STEPS, Landmarks, advance, prefixes, pseudo_inverse, scores_of
from .linformer import require_length
from .weigh import CAUSAL, Score, weigh


@dataclass(frozen=True)
class NystromConfig(HeadsConfig):
    """Final numbers of one layer."""

    landmarks: int
    """m: the most segments."""
    length: int
    """L: the longest sequence of the causal form; 0 where there is no limit."""
    taps: int
    """Of the convolution of the values; 0 for none."""
    causal: bool

    @property
    def segment(self) -> int:
        """Tokens of a segment of the causal form."""
        return -(-self.length // self.landmarks)

    def cost(self, context: int, dtype: torch.dtype) -> Cost:
        params, products = self.linear(self.query_width + 2 * self.kv_width)
        params += self.taps * self.kv_width
        products += self.taps * self.kv_width
        inner, square = self.query_width, 4 * STEPS * self.heads
        if not self.causal:
            if context <= self.landmarks:
                return Cost(params, params, 2.0 * (products + 2 * inner * context), 0)
            n = -(-context // -(-context // self.landmarks))
            made = 4 * context * n * inner + 2 * n**2 * inner + square * n**3
            return Cost(params, params, 2.0 * (products + made / context), 0)
        size, ended = self.segment, self.rows(context)
        rest = context - ended * size
        near = ended * size * (size + 1) // 2 + rest * (rest + 1) // 2
        far = size * ended * (ended - 1) // 2 + rest * ended
        made = 2 * inner * (near + far)
        for n in range(1, ended + 1):
            # The new tokens for old landmarks, all tokens for the new one, the values of all.
            made += 2 * inner * size * (2 * n - 1) + 2 * n**2 * inner + square * n**3
        itemsize = dtype.itemsize
        state = 2 * self.kv_width * min(context, self.length) * itemsize
        state += max(self.taps - 1, 0) * self.kv_width * itemsize
        if ended:
            held = inner + ended * (4 * inner + self.heads)
            state += held * state_dtype(dtype).itemsize
        return Cost(params, params, 2.0 * (products + made / context), state)

    def rows(self, context: int) -> int:
        """The landmarks of a sequence: segments that some token of it has before its own."""
        return (min(context, self.length) - 1) // self.segment

    def build(self) -> Nystrom:
        return Nystrom(self)


class Nystrom(HeadsOperator):
    """See the module. The causal form raises ContextError beyond `length` tokens."""

    def __init__(self, config: NystromConfig) -> None:
        super().__init__(config, [config.query_width, config.kv_width, config.kv_width])
        self.config = config
        self.taps: nn.Parameter | None = None
        if config.taps:
            bound = config.taps**-0.5
            self.taps = nn.Parameter(torch.empty(config.kv_width, config.taps))
            nn.init.uniform_(self.taps, -bound, bound)

    def forward(self, x: BTD, state: State | None = None) -> tuple[BTD, State | None]:
        config, start = self.config, 0 if state is None else state.length
        if state is not None and not config.causal:
            raise BidirectionalError
        end = start + x.shape[1]
        (queries, keys, values), gate = self.project(x)
        q, k = self.turn(queries, start), self.turn(keys, start)
        v = values.transpose(1, 2)
        if not config.causal:
            out = self._both_ways(q, self._repeated(k), self._repeated(v))
        else:
            require_length(end, config.length, "nystrom")
            if state is None:
                means = self._means(q[:, :, : config.rows(end) * config.segment])
                out = self._causal(q, self._repeated(k), self._repeated(v), means, 0)[0]
            else:
                out = self._continued(q, k, v, state)
        beside = self._beside(values, state)
        out = out if beside is None else out + beside
        return self.output(out, gate), None if state is None else State(end, state.tensors)

    def _repeated(self, t: Tensor) -> Tensor:
        """(B, G, S, K) to (B, H, S, K)."""
        return t.repeat_interleave(self.config.heads // self.config.kv_heads, 1)

    def _beside(self, values: Tensor, state: State | None) -> Tensor | None:
        """The convolution of the values (B, T, G, K), (B, H, T, K); None for none."""
        if self.taps is None:
            return None
        config, flat = self.config, values.flatten(2)
        if config.causal:
            past = None if state is None else state.tensors["conv"]
            mixed, past = short_conv(flat, self.taps, None, past)
            if state is not None:
                state.tensors["conv"] = past
        else:
            taps = self.taps.unsqueeze(1)
            mixed = F.conv1d(flat.mT, taps, padding=config.taps // 2, groups=taps.shape[0]).mT
        return self._repeated(torch.unflatten(mixed, -1, (config.kv_heads, -1)).transpose(1, 2))

    def _both_ways(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        tokens, m = q.shape[2], self.config.landmarks
        if tokens <= m:
            return scores_of(q, k).softmax(-1).to(v.dtype) @ v
        size = -(-tokens // m)
        count = -(-tokens // size)
        pad = count * size - tokens
        lengths = torch.full((count, 1), size, device=q.device)
        lengths[-1] -= pad
        dtype = state_dtype(q.dtype)
        q_mean, k_mean = (
            torch.unflatten(F.pad(t.to(dtype), (0, 0, 0, pad)), 2, (count, size)).sum(3) / lengths
            for t in (q, k)
        )
        inverse = pseudo_inverse(scores_of(q_mean, k_mean).softmax(-1))
        rows = scores_of(q_mean, k.to(dtype)).softmax(-1) @ v.to(dtype)
        return (scores_of(q.to(dtype), k_mean).softmax(-1) @ (inverse @ rows)).to(v.dtype)

    def _means(self, t: Tensor) -> Tensor:
        """The means of whole segments, (B, heads, n s, K) to (B, heads, n, K)."""
        segments = torch.unflatten(t, 2, (t.shape[2] // self.config.segment, self.config.segment))
        return segments.to(state_dtype(t.dtype)).mean(3)

    def _causal(
        self, q: Tensor, k: Tensor, v: Tensor, means: Tensor, start: int
    ) -> tuple[Tensor, Landmarks | None]:
        """The outputs (B, H, T, K) of the queries q from position `start`, a segment's first, on,
        and the landmarks of the segments whose queries' means (B, H, n, K) are given: all that have
        a later token, perhaps one more. k and v hold all tokens from position 0 on.
        """
        size, end, count = self.config.segment, k.shape[2], means.shape[2]
        out, held, first = [], None, start // size
        if first == 0:
            out.append(weigh(q[:, :, :size], k[:, :, :size], v[:, :, :size], CAUSAL, Score()))
            first = 1
        if count:
            whole = k[:, :, : count * size]
            held, u = prefixes(means, self._means(whole), whole, v[:, :, : count * size])
        segments = -(-end // size) - first
        if segments > 0:
            assert held is not None
            pad = (first + segments) * size - end

            def by_segment(t: Tensor, origin: int) -> Tensor:
                t = F.pad(t[:, :, first * size - origin :], (0, 0, 0, pad))
                return torch.unflatten(t, 2, (segments, size)).transpose(1, 2)

            far_keys = held.keys[:, None].expand(-1, segments, -1, -1, -1).to(k.dtype)
            far_values = u[:, :, first - 1 : first - 1 + segments].transpose(1, 2).to(v.dtype)
            number = torch.arange(first, first + segments, device=q.device)
            seen = torch.arange(count, device=q.device) < number[:, None]
            far = torch.full(seen.shape, math.log(size), dtype=q.dtype, device=q.device)
            far = far.masked_fill(~seen, -torch.inf)[:, None].expand(-1, size, -1)
            later = torch.ones(size, size, dtype=torch.bool, device=q.device).triu(1)
            near = torch.zeros_like(later, dtype=q.dtype).masked_fill(later, -torch.inf)
            bias = torch.cat((far, near.expand(segments, -1, -1)), 2).unsqueeze(1)
            rest = weigh(
                by_segment(q, start).flatten(0, 1),
                torch.cat((far_keys, by_segment(k, 0)), 3).flatten(0, 1),
                torch.cat((far_values, by_segment(v, 0)), 3).flatten(0, 1),
                bias.repeat(q.shape[0], 1, 1, 1),
                Score(),
            )
            rest = torch.unflatten(rest, 0, (q.shape[0], segments)).transpose(1, 2).flatten(2, 3)
            out.append(rest[:, :, : end - first * size])
        return torch.cat(out, 2), held

    def _continued(self, q: Tensor, k: Tensor, v: Tensor, state: State) -> Tensor:
        """The outputs of a call with a state, which it brings up to date."""
        tensors, size = state.tensors, self.config.segment
        start, tokens = state.length, q.shape[2]
        end, room, most = start + tokens, tensors["keys"].shape[2], tensors["far_keys"].shape[2]
        if end > room:
            raise ContextError(f"the cache of attention holds {room} tokens; this call needs {end}")
        for name, new in (("keys", k), ("values", v)):
            tensors[name][:, :, start:end] = new
        if start:
            k, v = (tensors[name][:, :, :end].to(q.dtype) for name in ("keys", "values"))
        k, v = self._repeated(k), self._repeated(v)
        whole, lead = start // size, start % size
        done = min(end // size, most)
        means = self._open(q, tensors, lead, done - min(whole, most))
        held = _stored(tensors, min(whole, most))
        if tokens == 1:
            near = (k[:, :, whole * size :], v[:, :, whole * size :])
            keys, values, bias = *near, None
            if whole:
                keys = torch.cat((held.keys.to(q.dtype), near[0]), 2)
                values = torch.cat((held.values.to(q.dtype), near[1]), 2)
                bias = torch.zeros(keys.shape[2], dtype=q.dtype, device=q.device)
                bias[:whole] = math.log(size)
                bias = bias[None, None, None]
            out = weigh(q, keys, values, bias, Score())
            if means.shape[2]:
                _store(tensors, advance(held, means, k, v, size))
            return out
        # Tokens of earlier calls in the call's first segment have keys and no query.
        q = F.pad(q, (0, 0, lead, 0))
        means = torch.cat((held.queries.to(means.dtype), means), 2)
        out, made = self._causal(q, k, v, means, start - lead)
        if made is not None:
            _store(tensors, made)
        return out[:, :, lead:]

    def _open(self, q: Tensor, tensors: dict[str, Tensor], lead: int, count: int) -> Tensor:
        """The means (B, H, count, K) of the queries of segments that the call makes whole.

        The state holds the sum of those of the segment that is not whole, `lead` of them.
        """
        size, dtype = self.config.segment, state_dtype(q.dtype)
        queries = q.to(dtype)
        if not tensors["sum"].shape[2]:
            return queries[:, :, :0]
        queries = torch.cat((tensors["sum"].to(dtype), queries), 2)
        # The sum stands for the first tokens of the first segment.
        first = size - lead + 1
        if q.shape[2] < first - 1:
            tensors["sum"] = queries.sum(2, keepdim=True).to(tensors["sum"].dtype)
            return queries[:, :, :0]
        opened, rest = queries[:, :, :first], queries[:, :, first:]
        left = rest.shape[2] % size
        cut = rest.shape[2] - left
        tensors["sum"] = rest[:, :, cut:].sum(2, keepdim=True).to(tensors["sum"].dtype)
        means = (opened.sum(2, keepdim=True) / size, self._means(rest[:, :, :cut]))
        return torch.cat(means, 2)[:, :, :count]

    def init_state(
        self, batch: int, context: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> State:
        """`keys` and `values` (B, G, S, K) of all tokens, `conv` of the convolution; where a
        segment can end the `Landmarks` by their names and the `sum` (B, H, 1, K) of a segment's
        queries, in float32 at least."""
        c = self.config
        if not c.causal:
            raise BidirectionalError
        rows, wide = c.rows(context), state_dtype(dtype)

        def zeros(*shape: int, of: torch.dtype) -> Tensor:
            return torch.zeros(batch, *shape, dtype=of, device=device)

        size = min(context, c.length)
        tensors = {n: zeros(c.kv_heads, size, c.head_dim, of=dtype) for n in ("keys", "values")}
        if c.taps:
            tensors["conv"] = zeros(c.kv_width, c.taps - 1, of=dtype)
        tensors |= {name: zeros(c.heads, rows, c.head_dim, of=wide) for name in FAR}
        tensors["far_logs"] = zeros(c.heads, rows, of=wide)
        tensors["sum"] = zeros(c.heads, min(rows, 1), c.head_dim, of=wide)
        return State(0, tensors)


FAR = ("far_queries", "far_keys", "far_rows", "far_values")


def _stored(tensors: dict[str, Tensor], count: int) -> Landmarks:
    """The first `count` landmarks of a state."""
    part = {name: tensors[name][:, :, :count] for name in (*FAR, "far_logs")}
    return Landmarks(**{name.removeprefix("far_"): t for name, t in part.items()})


def _store(tensors: dict[str, Tensor], held: Landmarks) -> None:
    """Write landmarks into a state."""
    for name in (*FAR, "far_logs"):
        new: Tensor = getattr(held, name.removeprefix("far_"))
        tensors[name][:, :, : new.shape[2]] = new


def configure_nystrom(site: Site, genes: Mapping[str, Gene]) -> NystromConfig:
    """The config of pattern=nystrom. Raises GeneError."""
    causal, taps = flag(genes, "causal"), whole(genes, "value_taps")
    length, landmarks = whole(genes, "max_length"), whole(genes, "landmarks")
    if not causal and taps and taps % 2 == 0:
        raise GeneError(f"value_taps={taps} is even, and with causal=false its middle is the token")
    return NystromConfig(
        **heads_config("nystrom", site, genes),
        landmarks=landmarks,
        length=length if causal else 0,
        taps=taps,
        causal=causal,
    )
