"""Linformer: keys and values projected along the sequence to a few landmarks.

Wang et al., arXiv 2006.04768, equation 7, with one E and one F for all heads (the paper's headwise
sharing): y = softmax(Q (E K)^T / sqrt(K)) (F V), E and F learned, (r, L) for sequences of at most L
tokens. A shorter sequence takes their first columns. This reads the whole sequence.

The causal form changes one thing: the sequence is cut into blocks, a token sees its own block up to
itself exactly, and E and F project the blocks before it. Both stand in one softmax, so that a token
reads r landmarks and at most a block of tokens. The state is the landmarks and the block.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.letters import BTD
from ..base import BidirectionalError, Cost, Gene, Site, State, state_dtype
from ..genes import flag, whole
from ..position import ContextError
from .heads import HeadsConfig, HeadsOperator, heads_config
from .weigh import CAUSAL, Score, weigh


def require_length(end: int, length: int, name: str) -> None:
    """Raises ContextError where a sequence is longer than its tables."""
    if end > length:
        raise ContextError(f"the tables of {name} end at {length} tokens; this call needs {end}")


@dataclass(frozen=True)
class LinformerConfig(HeadsConfig):
    """Final numbers of one layer."""

    landmarks: int
    """r."""
    length: int
    """L: the longest sequence."""
    block: int
    """Tokens of a block of the causal form; 0 without."""
    causal: bool

    def cost(self, context: int, dtype: torch.dtype) -> Cost:
        params, products = self.linear(self.query_width + 2 * self.kv_width)
        params += 2 * self.landmarks * self.length
        each = 2 * self.landmarks * self.kv_width
        if not self.causal:
            whole_pass = products + each + 2 * self.query_width * self.landmarks
            return Cost(params, params, 2.0 * whole_pass, 0)
        whole, rest = divmod(context, self.block)
        near = whole * self.block * (self.block + 1) // 2 + rest * (rest + 1) // 2
        far = self.landmarks * max(0, context - self.block)
        # The last block is projected too where the sequence ends with it.
        ended = context // self.block * self.block if self.remembers(context) else 0
        flops = products + (each * ended + 2 * self.query_width * (near + far)) / context
        state = 2 * self.kv_width * min(context, self.block) * dtype.itemsize
        if ended:
            state += 2 * self.kv_width * self.landmarks * state_dtype(dtype).itemsize
        return Cost(params, params, 2.0 * flops, state)

    def remembers(self, context: int) -> bool:
        """Some token of a sequence has a block before its own."""
        return context > self.block

    def build(self) -> Linformer:
        return Linformer(self)


class Linformer(HeadsOperator):
    """See the module. Raises ContextError beyond `length` tokens."""

    def __init__(self, config: LinformerConfig) -> None:
        super().__init__(config, [config.query_width, config.kv_width, config.kv_width])
        self.config = config
        shape = (config.landmarks, config.length)
        self.key_map = nn.Parameter(torch.randn(shape) * config.length**-0.5)
        self.value_map = nn.Parameter(torch.randn(shape) * config.length**-0.5)

    def forward(self, x: BTD, state: State | None = None) -> tuple[BTD, State | None]:
        config, start = self.config, 0 if state is None else state.length
        if state is not None and not config.causal:
            raise BidirectionalError
        end = start + x.shape[1]
        require_length(end, config.length, "linformer")
        (queries, keys, values), gate = self.project(x)
        q, k, v = self.turn(queries, start), self.turn(keys, start), values.transpose(1, 2)
        if not config.causal:
            maps = (self.key_map[:, :end], self.value_map[:, :end])
            k, v = (m @ t for m, t in zip(maps, (k, v), strict=True))
            return self.output(weigh(q, k, v, None, Score()), gate), None
        if state is None:
            return self.output(self._blocks(q, k, v, 0, None)[0], gate), None
        return self.output(self._continued(q, k, v, state), gate), State(end, state.tensors)

    def _continued(self, q: Tensor, k: Tensor, v: Tensor, state: State) -> Tensor:
        """The outputs of a call with a state, which it brings up to date."""
        block, tensors = self.config.block, state.tensors
        start, tokens = state.length, q.shape[2]
        end, size = start + tokens, tensors["keys"].shape[2]
        if end > size and not tensors["far_keys"].shape[2]:
            raise ContextError(f"the cache of attention holds {size} tokens; this call needs {end}")
        lead = start % block
        held = [tensors[name] for name in ("keys", "values")]
        far = None
        if tensors["far_keys"].shape[2]:
            far = (tensors["far_keys"], tensors["far_values"])
        if tokens == 1:
            for buffer, new in zip(held, (k, v), strict=True):
                buffer[:, :, lead : lead + 1] = new
            k, v = (buffer[:, :, : lead + 1].to(q.dtype) for buffer in held)
            near = (k, v)
            if far is not None and start >= block:
                k, v = (torch.cat((f.to(q.dtype), t), 2) for f, t in zip(far, near, strict=True))
            out = weigh(q, k, v, None, Score())
            if far is not None and lead == block - 1:
                ended = self._projected(*near, start - lead)
                for buffer, new in zip(far, ended, strict=True):
                    buffer += new[:, :, 0]
            return out
        if lead:
            # Tokens of earlier calls have keys and no query.
            q = F.pad(q, (0, 0, lead, 0))
            k, v = (
                torch.cat((buffer[:, :, :lead].to(t.dtype), t), 2)
                for buffer, t in zip(held, (k, v), strict=True)
            )
        out, sums = self._blocks(q, k, v, start - lead, far)
        if far is not None:
            for name, new in zip(("far_keys", "far_values"), sums, strict=True):
                tensors[name] = new.to(tensors[name].dtype)
        left = end % block or min(block, k.shape[2])
        for buffer, t in zip(held, (k, v), strict=True):
            buffer[:, :, :left] = t[:, :, k.shape[2] - left :]
        return out[:, :, lead:]

    def _projected(self, k: Tensor, v: Tensor, start: int) -> list[Tensor]:
        """What whole blocks from position `start` on add to the landmarks, (B, G, N, r, K) each."""
        block = self.config.block
        span = slice(start, start + k.shape[2])
        return [
            torch.unflatten(table[:, span], 1, (-1, block)).transpose(0, 1)
            @ torch.unflatten(t, 2, (-1, block))
            for table, t in ((self.key_map, k), (self.value_map, v))
        ]

    def _blocks(
        self, q: Tensor, k: Tensor, v: Tensor, start: int, far: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The outputs (B, H, T, K) of tokens from the start of a block at position `start` on, and
        the landmarks (B, G, r, K) after their last whole block; `far` are those before."""
        config, tokens = self.config, q.shape[2]
        block, r = config.block, config.landmarks
        whole = tokens // block
        dtype = state_dtype(k.dtype)
        if far is None:
            empty = k.new_zeros(*k.shape[:2], r, k.shape[3], dtype=dtype)
            far = (empty, empty)
        added = self._projected(k[:, :, : whole * block], v[:, :, : whole * block], start)
        # Before every block, and after the last whole one.
        sums = [
            torch.cat((f[:, :, None].to(dtype), new.to(dtype)), 2).cumsum(2)
            for f, new in zip(far, added, strict=True)
        ]
        last = (sums[0][:, :, -1], sums[1][:, :, -1])
        out, first = [], 0
        if start == 0:
            # Nothing stands before the first block.
            out.append(weigh(q[:, :, :block], k[:, :, :block], v[:, :, :block], CAUSAL, Score()))
            first = 1
        count = -(-tokens // block) - first
        if count > 0:
            pad = (first + count) * block - tokens

            def by_block(t: Tensor) -> Tensor:
                t = F.pad(t[:, :, first * block :], (0, 0, 0, pad))
                return torch.unflatten(t, 2, (count, block)).transpose(1, 2)

            both = [
                torch.cat(
                    (s[:, :, first : first + count].transpose(1, 2).to(t.dtype), by_block(t)), 3
                )
                for s, t in zip(sums, (k, v), strict=True)
            ]
            hidden = torch.ones(block, r + block, dtype=torch.bool, device=q.device).triu(r + 1)
            bias = torch.zeros(hidden.shape, dtype=q.dtype, device=q.device)
            bias = bias.masked_fill(hidden, -torch.inf)[None, None]
            queries = by_block(q).flatten(0, 1)
            rest = weigh(queries, both[0].flatten(0, 1), both[1].flatten(0, 1), bias, Score())
            rest = torch.unflatten(rest, 0, (q.shape[0], count)).transpose(1, 2).flatten(2, 3)
            out.append(rest[:, :, : tokens - first * block])
        return torch.cat(out, 2), last

    def init_state(
        self, batch: int, context: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> State:
        """`keys` and `values` of the block (B, G, S, K); `far_keys` and `far_values` (B, G, r, K)
        in float32 at least, of no row where no block can end."""
        c = self.config
        if not c.causal:
            raise BidirectionalError
        heads = (batch, c.kv_heads)
        rows = c.landmarks if c.remembers(context) else 0
        near, far = min(context, c.block), state_dtype(dtype)
        tensors = {
            name: torch.zeros(*heads, near, c.head_dim, dtype=dtype, device=device)
            for name in ("keys", "values")
        } | {
            name: torch.zeros(*heads, rows, c.head_dim, dtype=far, device=device)
            for name in ("far_keys", "far_values")
        }
        return State(0, tensors)


def configure_linformer(site: Site, genes: Mapping[str, Gene]) -> LinformerConfig:
    """The config of pattern=linformer. Raises GeneError."""
    causal = flag(genes, "causal")
    return LinformerConfig(
        **heads_config("linformer", site, genes),
        landmarks=whole(genes, "landmarks"),
        length=whole(genes, "max_length"),
        block=whole(genes, "segment") if causal else 0,
        causal=causal,
    )
