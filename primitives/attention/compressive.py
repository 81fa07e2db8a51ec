"""Compressive Transformer: tokens that leave the memory of segment recurrence are compressed.

Rae et al., arXiv 1911.05507, algorithm 1. At the end of a segment the oldest n_s tokens of the
memory leave it; f_c makes one vector of every c of them, and the last n_cm such vectors stand
before the memory. Attention reads [compressed memory, memory, segment] in one softmax, the
positions counted over these side by side, as in the paper's concatenation.

f_c is a convolution with kernel and stride c, or pooling. It learns from the attention-
reconstruction loss alone (algorithm 2), and that loss teaches nothing else: gradients of the task
end at the compressed memories, those of the loss at f_c. Published memories begin as zeros, which
take a share of the softmax; here they begin empty.

A vector is compressed when its last token arrives, though it is read only once they have left the
memory: so keys and values of compressed vectors are kept, not tokens in wait of compression.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from ...kernels.letters import BTD
from ..base import Cost, State
from ..position import ContextError
from .segments import Compressed, SegmentAttention, SegmentConfig, Segments


@dataclass(frozen=True)
class CompressedSegments(Segments):
    """What is seen: as `Segments`, and the last `slots` compressed memories.

    One stands for `rate` tokens. `memory` is a multiple of `segment`, that of `rate`.
    """

    compressed: int
    rate: int

    def entries(self, number: int) -> range:
        stop = max(0, number * self.segment - self.memory) // self.rate
        return range(max(0, stop - self.compressed), stop)

    def seen(self, context: int) -> float:
        last = (context - 1) // self.segment
        # Segments up to `full` see all compressed memories that there are.
        full = (self.memory + self.compressed * self.rate) // self.segment
        total = sum(len(self.entries(n)) for n in range(min(full + 1, last)))
        total += self.compressed * max(0, last - full - 1)
        rest = context - last * self.segment
        total = total * self.segment + len(self.entries(last)) * rest
        return super().seen(context) + total / context

    def stored(self, context: int) -> int:
        """Compressed memories in the state: those that are read and those that will be."""
        last = self.entries((context - 1) // self.segment).stop
        return min(self.most_stored, last)

    @property
    def most_stored(self) -> int:
        return self.compressed + (self.memory + self.segment) // self.rate


@dataclass(frozen=True)
class CompressiveConfig(SegmentConfig):
    """Final numbers; `pattern` is a `CompressedSegments`."""

    compression: str = "conv"
    """conv, mean or max."""

    def cost(self, context: int, dtype: torch.dtype) -> Cost:
        pattern = self.pattern
        assert isinstance(pattern, CompressedSegments)
        params = pattern.rate * self.width**2 if self.compression == "conv" else 0
        each = 2.0 * (params + self.width * self.kv_width)
        cells = self.kv_width * pattern.stored(context) + (pattern.rate - 1) * self.width
        made = (context // pattern.rate) * each / context
        extra = Cost(params, params, made, cells * dtype.itemsize)
        return super().cost(context, dtype) + extra

    def build(self) -> CompressiveAttention:
        return CompressiveAttention(self)


class CompressiveAttention(SegmentAttention):
    """See the module. The state holds keys and values of tokens and of compressed memories, and the
    inputs of the group of tokens that is not whole yet."""

    config: CompressiveConfig

    def __init__(self, config: CompressiveConfig) -> None:
        super().__init__(config)
        pattern = config.pattern
        assert isinstance(pattern, CompressedSegments)
        self.pattern = pattern
        self.compress: nn.Linear | None = None
        if config.compression == "conv":
            # A convolution whose stride is its kernel, over the kernel's tokens side by side.
            self.compress = nn.Linear(pattern.rate * config.width, config.width, bias=False)
        self._loss: Tensor | None = None

    def auxiliary_loss(self) -> Tensor | None:
        """What training adds to the loss: attention reconstruction in the last training call, once,
        and what other parts add; None where there is nothing."""
        loss, self._loss = self._loss, None
        other = super().auxiliary_loss()
        if loss is None or other is None:
            return other if loss is None else loss
        return loss + other

    def reduced(self, x: Tensor) -> Tensor:
        """f_c: (B, N c, D) to (B, N, D)."""
        groups = torch.unflatten(x, 1, (-1, self.pattern.rate))
        if self.compress is not None:
            out: Tensor = self.compress(groups.flatten(2))
            return out
        return groups.mean(2) if self.config.compression == "mean" else groups.amax(2)

    def compressed(self, x: BTD, state: State | None) -> Compressed:
        """The compressed memories that the call's segments see."""
        pattern, start = self.pattern, 0 if state is None else state.length
        end = start + x.shape[1]
        made, tokens = start // pattern.rate, x.detach()
        needed = pattern.entries((end - 1) // pattern.segment).stop
        held: list[tuple[Tensor, Tensor]] = []
        if state is not None:
            self._require_room(state, end)
            size = state.tensors["far_keys"].shape[2]
            tokens = self._with_recent(state, tokens)
            first = pattern.entries(start // pattern.segment).start
            at = torch.arange(first, min(made, max(needed, first)), device=x.device)
            if len(at):
                index = at % size
                held.append(
                    (
                        state.tensors["far_keys"].index_select(2, index).detach(),
                        state.tensors["far_values"].index_select(2, index).detach(),
                    )
                )
        else:
            first = 0
        whole = (end // pattern.rate - made) * pattern.rate
        if whole:
            with torch.no_grad():
                small = self.reduced(tokens[:, :whole])
            new = self._small_heads(small)
            if state is not None:
                self._write(state, made, *new)
            held.append(new)
        if self.training and self.compress is not None and torch.is_grad_enabled():
            self._loss = self._reconstruction(x.detach(), start)
        shape = (x.shape[0], self.config.kv_heads, 0, self.config.head_dim)
        keys, values = (
            torch.cat([part[i].to(x.dtype) for part in held], 2) if held else x.new_zeros(shape)
            for i in (0, 1)
        )
        return Compressed(keys, values, first, self.rotary)

    def _require_room(self, state: State, end: int) -> None:
        """Raises ContextError where the state was made for fewer tokens."""
        pattern, size = self.pattern, state.tensors["far_keys"].shape[2]
        rooms = [pattern.room(state.tensors["keys"].shape[2])]
        if size < pattern.most_stored:
            last = (size * pattern.rate + pattern.memory) // pattern.segment
            rooms.append((last + 1) * pattern.segment)
        room = min((r for r in rooms if r is not None), default=end)
        if end > room:
            raise ContextError(f"the cache of attention holds {room} tokens; this call needs {end}")

    def _with_recent(self, state: State, tokens: Tensor) -> Tensor:
        """The tokens that are not compressed yet, up to the call's last; the state keeps those that
        the call leaves over."""
        rate, recent = self.pattern.rate, state.tensors["recent"]
        waiting = state.length % rate
        tokens = torch.cat((recent[:, :waiting].to(tokens.dtype), tokens), 1)
        left = tokens.shape[1] % rate
        if left:
            recent[:, :left] = tokens[:, -left:]
        return tokens

    def _small_heads(self, small: Tensor) -> tuple[Tensor, Tensor]:
        """Keys, not turned, and values (B, G, E, K) of compressed memories."""
        c = self.config
        span = slice(c.query_width, c.mixed_width)
        bias = None if self.entry.bias is None else self.entry.bias[span]
        mixed = torch.unflatten(
            F.linear(small, self.entry.weight[span], bias), -1, (-1, c.head_dim)
        )
        keys, values = mixed.chunk(2, 2)
        if self.k_norm is not None:
            keys = self.k_norm(keys)
        return keys.transpose(1, 2), values.transpose(1, 2)

    def _write(self, state: State, first: int, keys: Tensor, values: Tensor) -> None:
        """New compressed memories into the state, from number `first` on."""
        size, count = state.tensors["far_keys"].shape[2], keys.shape[2]
        # A state for a shorter context keeps the first ones, any other the last ones.
        kept = range(first, min(first + count, size))
        if size == self.pattern.most_stored:
            kept = range(max(first, first + count - size), first + count)
        if not len(kept):
            return
        at = torch.arange(kept.start, kept.stop, device=keys.device)
        for name, new in (("far_keys", keys), ("far_values", values)):
            buffer = state.tensors[name]
            chosen = new[:, :, kept.start - first : kept.stop - first].detach()
            buffer.index_copy_(2, at % size, chosen.to(buffer.dtype))

    def _reconstruction(self, x: BTD, start: int) -> Tensor | None:
        """Algorithm 2: the mean over tokens of |attn(h, old memory) - attn(h, f_c(old memory))|.

        h are the tokens of a whole segment, the old memory is the segment that leaves the memory at
        its end, no position is told apart, and gradients reach f_c alone. None where no pair of
        such segments lies in the call.
        """
        pattern = self.pattern
        size, back = pattern.segment, pattern.memory // pattern.segment
        skip = -start % size
        count = max(0, (x.shape[1] - skip) // size)
        if count <= back:
            return None
        segments = torch.unflatten(x[:, skip : skip + count * size], 1, (count, size))
        old = segments[:, : count - back].flatten(0, 1)
        with torch.no_grad():
            q = self._content(segments[:, back:].flatten(0, 1))[0]
            wanted = F.scaled_dot_product_attention(q, *self._content(old)[1:])
        got = F.scaled_dot_product_attention(q, *self._content(self.reduced(old))[1:])
        distance: Tensor = torch.linalg.vector_norm(got - wanted, dim=(1, 3))
        return distance.mean()

    def _content(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (B, H, T, K) by weights that get no gradient."""
        c = self.config
        weight = self.entry.weight[: c.mixed_width].detach()
        bias = None if self.entry.bias is None else self.entry.bias[: c.mixed_width].detach()
        heads = torch.unflatten(F.linear(x, weight, bias), -1, (-1, c.head_dim))
        q, k, v = torch.split(heads, [c.heads, c.kv_heads, c.kv_heads], 2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = (
                functional_call(norm, {n: p.detach() for n, p in norm.named_parameters()}, (t,))
                for norm, t in ((self.q_norm, q), (self.k_norm, k))
            )
        repeat = c.heads // c.kv_heads
        k, v = (t.repeat_interleave(repeat, 2) for t in (k, v))
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def init_state(
        self, batch: int, context: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> State:
        """As that of segment recurrence; `far_keys` and `far_values` (B, G, E, K), `recent` (B, c -
        1, D)."""
        c, state = self.config, super().init_state(batch, context, dtype, device)
        far = (batch, c.kv_heads, self.pattern.stored(context), c.head_dim)
        for name in ("far_keys", "far_values"):
            state.tensors[name] = torch.zeros(far, dtype=dtype, device=device)
        recent = (batch, self.pattern.rate - 1, c.width)
        state.tensors["recent"] = torch.zeros(recent, dtype=dtype, device=device)
        return state
