"""Memformer: memory slots that tokens read and the ends of segments write.

Wu et al., arXiv 2010.06891. A token attends to its own segment up to itself and then, with what
that gave it, to k slots; at the end of a segment every slot attends to itself and to the segment's
tokens, and is pulled towards a vector of its own, which is how it forgets:

    u = SelfAttn(x),  y = u + softmax((x + u) W_q (M W_k)^T) (M W_v) W_o           (reading)
    m' = softmax(m W_q [m W_k; z W_k]^T / tau) [m; z W_v],  z = x + y              (writing)
    m <- (m' + v) / |m' + v|,  at the start v / |v|                                (forgetting)

The paper writes one memory after the last layer of an encoder, whose segments are read in both
directions; here every layer has its own memory, and a segment is causal. Gradients go through the
memory from the first segment of a call to its last, which is what the paper's memory replay back-
propagation computes over its horizon (its saving of memory is left out); they end at a call's
start.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.letters import BTD
from ..base import Carry, Cost, State, state_dtype
from .keyvalues import HeadedKeyValues, KeyValues
from .layer import Attention, AttentionConfig
from .patterns import Chunk


@dataclass(frozen=True)
class MemformerConfig(AttentionConfig):
    """Final numbers; `pattern` is the `Chunk` of a segment."""

    slots: int = 8
    temperature: float = 0.5
    """tau: below 1 a slot chooses more sharply what it keeps."""

    @property
    def segment(self) -> int:
        assert isinstance(self.pattern, Chunk)
        return self.pattern.chunk

    def cost(self, context: int, dtype: torch.dtype) -> Cost:
        width, inner, slots, segment = self.width, self.query_width, self.slots, self.segment
        params = 4 * width * inner + 3 * width**2 + slots * width
        begun, ended = -(-context // segment), context // segment
        products = context * (2 * width * inner + 2 * slots * inner)
        products += begun * 2 * slots * width * inner
        products += ended * (2 * (segment + slots) * width**2 + 2 * slots * segment * width)
        held = 2 * slots * inner
        if ended:
            held += (segment - 1) * width
        state = held * dtype.itemsize + slots * width * state_dtype(dtype).itemsize
        extra = Cost(params, params, 2.0 * products / context, state)
        return super().cost(context, dtype) + extra

    def build(self) -> Memformer:
        return Memformer(self)


class Memformer(Attention):
    """See the module. The state holds the cache of the segment, the slots, their keys and values
    for reading, and the segment's tokens as they will be written."""

    config: MemformerConfig

    def __init__(self, config: MemformerConfig) -> None:
        super().__init__(config)
        width, inner = config.width, config.query_width
        self.ask = nn.Linear(width, inner, bias=False)
        # Keys and values, in this order.
        self.recall = nn.Linear(width, 2 * inner, bias=False)
        self.told = nn.Linear(inner, width, bias=False)
        self.choose = nn.Linear(width, width, bias=False)
        # Keys of slots and tokens alike, then values of tokens.
        self.note = nn.Linear(width, 2 * width, bias=False)
        self.rest = nn.Parameter(torch.randn(config.slots, width) * width**-0.5)

    def forward_lending(
        self, x: BTD, state: State | None = None, carry: Carry | None = None
    ) -> tuple[BTD, State | None, KeyValues | HeadedKeyValues]:
        """As that of attention, whose keys and values are those of the segments."""
        start = 0 if state is None else state.length
        u, new, kv = super().forward_lending(x, state, carry)
        size, tensors = self.config.segment, {} if new is None else new.tensors
        at, end = start, start + x.shape[1]
        memory = self._first(x) if at == 0 else tensors["slots"]
        keys: Tensor | None = None
        out = []
        while at < end:
            stop = min(end, at - at % size + size)
            span = slice(at - start, stop - start)
            if at % size == 0:
                keys, values = self._recalled(memory, x.dtype)
            elif keys is None:
                keys, values = (tensors[n].to(x.dtype) for n in ("recall_keys", "recall_values"))
            h = x[:, span] + u[:, span]
            y = self._read(h, keys, values)
            out.append(u[:, span] + y)
            z = h + y
            first, kept = at % size, at - at % size
            if stop - kept == size:
                if first:
                    z = torch.cat((tensors["tokens"][:, :first].to(z.dtype), z), 1)
                memory = self._written(memory, z)
            elif new is not None and tensors["tokens"].shape[1]:
                tensors["tokens"][:, first : stop - kept] = z
            at = stop
        if new is not None:
            assert keys is not None
            tensors["slots"], tensors["recall_keys"], tensors["recall_values"] = (
                tensor.to(tensors[name].dtype)
                for name, tensor in (
                    ("slots", memory),
                    ("recall_keys", keys),
                    ("recall_values", values),
                )
            )
        return torch.cat(out, 1), new, kv

    def _first(self, x: BTD) -> Tensor:
        """The slots (B, k, D) of a sequence's start."""
        dtype = state_dtype(x.dtype)
        return F.normalize(self.rest.to(dtype), dim=-1).expand(x.shape[0], -1, -1)

    def _recalled(self, memory: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The slots' keys and values, (B, H, k, K)."""
        heads = self.recall(memory.to(dtype)).unflatten(-1, (2 * self.config.heads, -1))
        keys, values = heads.transpose(1, 2).chunk(2, 1)
        return keys, values

    def _read(self, h: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """What tokens h (B, L, D) read, (B, L, D)."""
        q = self.ask(h).unflatten(-1, (self.config.heads, -1)).transpose(1, 2)
        scores = (q * self.config.head_dim**-0.5) @ keys.mT
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        read = scores.softmax(-1).to(q.dtype) @ values
        out: Tensor = self.told(read.transpose(1, 2).flatten(2))
        return out

    def _written(self, memory: Tensor, z: Tensor) -> Tensor:
        """The slots after a segment z (B, L, D)."""
        heads, dtype = self.config.heads, memory.dtype

        def split(t: Tensor) -> Tensor:
            return torch.unflatten(t, -1, (heads, -1)).transpose(1, 2)

        width = self.config.width
        m = memory.to(z.dtype)
        q = split(self.choose(m)) * (width // heads) ** -0.5
        own = split(F.linear(m, self.note.weight[:width]))
        keys, values = (split(t) for t in self.note(z).chunk(2, -1))
        scores = torch.cat(((q * own).sum(-1, keepdim=True), q @ keys.mT), -1)
        weights = (scores.to(dtype) / self.config.temperature).softmax(-1)
        new = weights[..., :1] * split(memory)
        new = new + (weights[..., 1:].to(z.dtype) @ values).to(dtype)
        new = new.transpose(1, 2).flatten(2) + self.rest.to(dtype)
        return F.normalize(new, dim=-1)

    def init_state(
        self, batch: int, context: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> State:
        """As that of attention, and `slots` (B, k, D) in float32 at least, `recall_keys` and
        `recall_values` (B, H, k, K), `tokens` (B, L - 1, D) where a segment can end."""
        c, state = self.config, super().init_state(batch, context, dtype, device)
        read = (batch, c.heads, c.slots, c.head_dim)
        waiting = c.segment - 1 if context >= c.segment else 0
        state.tensors |= {
            "slots": torch.zeros(batch, c.slots, c.width, dtype=state_dtype(dtype), device=device),
            "recall_keys": torch.zeros(read, dtype=dtype, device=device),
            "recall_values": torch.zeros(read, dtype=dtype, device=device),
            "tokens": torch.zeros(batch, waiting, c.width, dtype=dtype, device=device),
        }
        return state
