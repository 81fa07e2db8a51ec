"""Native sparse attention (Yuan et al., arXiv 2502.11089): compressed, selected and near tokens.

Three branches with keys and values of their own, summed with gates sigmoid(W_g x) per head and
branch (equation 5):

- compressed: an MLP makes one key, and another one value, of every block of l tokens, one beginning
  every d tokens, from the tokens and their places in the block (equation 7). A query sees the
  blocks that have ended; before the first one the branch gives zero.
- selected: of the blocks of l' tokens a query reads the n best, token by token, and among them
  always the first, its own and the one before. A block's importance is what the compressed branch
  gives to the compressed blocks that overlap it (equation 9), summed over the query heads of a
  key-value head, which so read the same tokens (equation 10).
- window: the latest w tokens.

RoPE turns the queries and keys of the last two branches; within a block the MLP's own positions
stand for it, as the compressed keys have no single position.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.letters import BTD
from ..base import Cost, Gene, GeneError, Site, State
from ..genes import only, whole
from ..position import ContextError
from .attend import attend
from .buckets import take
from .heads import HeadsConfig, HeadsOperator, heads_config
from .keyvalues import KeyValues, extend
from .patterns import Window
from .weigh import CAUSAL, Score, weigh

FORCED = 3
"""Blocks that are always selected: the first, the query's own, the one before."""

PIECE = 64
"""Queries whose selected tokens are gathered at a time."""


@dataclass(frozen=True)
class NativeSparseConfig(HeadsConfig):
    """Final numbers."""

    window: int
    block: int
    """l': tokens of a block that is selected."""
    selected: int
    """n: selected blocks, the forced ones included."""
    compress: int
    """l: tokens of a block that is compressed."""
    stride: int
    """d: tokens from the beginning of one such block to the next."""

    def compressed(self, context: int) -> int:
        """Blocks that have ended after so many tokens."""
        return max((context - self.compress) // self.stride + 1, 0)

    def cost(self, context: int, dtype: torch.dtype) -> Cost:
        """See base.Config."""
        params, products = self.linear(self.query_width + 6 * self.kv_width)
        mixing = 3 * self.width * self.heads
        inner = (self.compress + 1) * self.head_dim**2
        params += mixing + 2 * (inner + (self.compress + 2) * self.head_dim)
        blocks = self.compressed(context)
        # A block is seen from its last token on.
        coarse = blocks * (context - self.compress + 1) - self.stride * blocks * (blocks - 1) // 2
        whole_blocks, rest = divmod(context, self.block)
        few = min(whole_blocks, self.selected)
        fine = self.block * (few * (few + 1) // 2 + (whole_blocks - few) * self.selected)
        fine = self.block * (fine + rest * min(self.selected, whole_blocks + 1))
        seen = (coarse + fine) / context + Window(self.window).seen(context)
        made = 2 * self.kv_heads * inner * blocks / context
        flops = 2.0 * (products + mixing + made + 2 * self.query_width * seen)
        kept = context + blocks + self.compress - 1 + min(self.window, context)
        return Cost(params, params, flops, 2 * self.kv_width * kept * dtype.itemsize)

    def build(self) -> NativeSparseAttention:
        """See base.Config."""
        return NativeSparseAttention(self)


class Compress(nn.Module):
    """phi: a block (..., l, K) to one vector (..., K), by an MLP over tokens plus positions."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.randn(tokens, width) * width**-0.5)
        self.entry = nn.Linear(tokens * width, width)
        self.exit = nn.Linear(width, width)

    def forward(self, blocks: Tensor) -> Tensor:
        return self.exit(F.gelu(self.entry((blocks + self.place).flatten(-2))))  # type: ignore[no-any-return]


class NativeSparseAttention(HeadsOperator):
    """See the module. `entry` makes queries, then keys and values of the branches in their order.

    The state holds every token of the selected branch (`keys`, `values`), the compressed blocks
    (`compressed_*`), the last l - 1 tokens that later blocks may need (`pending_*`) and the window
    (`near_*`), all (B, G, S, K).
    """

    def __init__(self, config: NativeSparseConfig) -> None:
        super().__init__(config, [config.query_width, *[config.kv_width] * 6])
        self.config = config
        self.mix = nn.Linear(config.width, 3 * config.heads, bias=False)
        self.compress_keys = Compress(config.compress, config.head_dim)
        self.compress_values = Compress(config.compress, config.head_dim)

    def forward(self, x: BTD, state: State | None = None) -> tuple[BTD, State | None]:
        config, tokens = self.config, x.shape[1]
        start = 0 if state is None else state.length
        end = start + tokens
        if state is not None and end > (size := state.tensors["keys"].shape[2]):
            raise ContextError(f"the cache of attention holds {size} tokens; this call needs {end}")
        parts, gate = self.project(x)
        q, coarse_k, coarse_v, k, v, near_k, near_v = parts
        plain, turned = q.transpose(1, 2), self.turn(q, start)
        keys, values = self.turn(k, start), v.transpose(1, 2)
        near = KeyValues(self.turn(near_k, start), near_v.transpose(1, 2), end)
        coarse = (
            self._compressed("keys", self.compress_keys, coarse_k, state),
            self._compressed("values", self.compress_values, coarse_v, state),
        )
        window = Window(config.window)
        if state is not None:
            held = state.tensors
            for name, new in (("keys", keys), ("values", values)):
                held[name][:, :, start:end] = new
            if start > 0 or tokens == 1:
                keys, values = (held[name][:, :, :end].to(x.dtype) for name in ("keys", "values"))
            ring = {"keys": held["near_keys"], "values": held["near_values"]}
            seen = extend(State(start, ring), near, window)
            assert isinstance(seen, KeyValues)
            near, state = seen, State(end, held)
        far, importance = self._attend_compressed(plain, *coarse, start)
        fine = self._attend_selected(turned, keys, values, importance)
        local = attend(turned, near, window, Score(), None)
        gates = torch.sigmoid(self.mix(x)).reshape(*x.shape[:2], 3, -1, 1).transpose(1, 3)
        out = gates[:, :, 0] * far + gates[:, :, 1] * fine + gates[:, :, 2] * local
        return self.output(out, gate), state

    def _compressed(self, name: str, mlp: nn.Module, raw: Tensor, state: State | None) -> Tensor:
        """All compressed keys or values up to this call's end, from its tokens (B, T, G, K)."""
        config = self.config
        raw = raw.transpose(1, 2)
        start = 0 if state is None else state.length
        done, count = config.compressed(start), config.compressed(start + raw.shape[2])
        first = 0
        if state is not None:
            pending = state.tensors["pending_" + name]
            first = start - pending.shape[2]
            raw = torch.cat((pending.to(raw.dtype), raw), 2)
            pending.copy_(raw[:, :, raw.shape[2] - pending.shape[2] :])
        made = raw[:, :, :0]
        if count > done:
            blocks = raw[:, :, done * config.stride - first :].unfold(
                2, config.compress, config.stride
            )
            made = mlp(blocks.mT)
        if state is None:
            return made
        held = state.tensors["compressed_" + name]
        held[:, :, done:count] = made
        return made if done == 0 else held[:, :, :count].to(raw.dtype)

    def _attend_compressed(
        self, q: Tensor, keys: Tensor, values: Tensor, start: int
    ) -> tuple[Tensor, Tensor]:
        """The branch's output (B, H, T, K) and the importance of all blocks (B, G, T, blocks)."""
        config = self.config
        batch, groups, blocks, width = keys.shape
        tokens = q.shape[2]
        at = torch.arange(start, start + tokens, device=q.device)
        ends = torch.arange(blocks, device=q.device) * config.stride + config.compress - 1
        hidden = ends > at[:, None]
        grouped = (q * width**-0.5).reshape(batch, groups, q.shape[1] // groups, tokens, width)
        # One product for the heads of a group, (B, G, H/G * T, C).
        scores = grouped.flatten(2, 3) @ keys.mT
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        scores = scores.view(batch, groups, q.shape[1] // groups, tokens, blocks)
        # A row without blocks is finite and then zero.
        weights = scores.masked_fill(hidden, -1e30).softmax(-1).masked_fill(hidden, 0.0)
        out = weights.to(values.dtype).flatten(2, 3) @ values
        return out.reshape(q.shape), self._importance(weights.detach().sum(2), at)

    @torch.no_grad()
    def _importance(self, weights: Tensor, at: Tensor) -> Tensor:
        """Equation 9, from the weights of compressed blocks (B, G, T, C), for queries at `at`."""
        config = self.config
        steps, overlap = config.block // config.stride, config.compress // config.stride
        blocks = int(at[-1]) // config.block + 1
        last = blocks * steps
        # Compressed block i also reaches into the steps i + 1, ..., i + overlap - 1.
        spread = F.pad(weights, (overlap - 1, max(0, last - weights.shape[-1])))
        total = torch.zeros_like(spread[..., :last])
        for shift in range(overlap):
            total = total + spread[..., shift : shift + last]
        importance = total.reshape(*weights.shape[:-1], blocks, steps).sum(-1)
        own, index = at[:, None] // config.block, torch.arange(blocks, device=at.device)
        forced = (index == 0) | (index == own) | (index == own - 1)
        return importance.masked_fill(forced, torch.inf).masked_fill(index > own, -torch.inf)

    def choose(self, importance: Tensor) -> Tensor:
        """The selected blocks (B, G, T, n), -1 for none; of equal ones the earlier."""
        count = min(self.config.selected, importance.shape[-1])
        best = torch.sort(importance, dim=-1, descending=True, stable=True)
        chosen = best.indices[..., :count]
        return chosen.masked_fill(best.values[..., :count] == -torch.inf, -1)

    def _attend_selected(
        self, q: Tensor, keys: Tensor, values: Tensor, importance: Tensor
    ) -> Tensor:
        """Queries (B, H, T, K), the last T tokens, over the tokens of their blocks."""
        config, tokens, end = self.config, q.shape[2], keys.shape[2]
        if tokens == end > 1 and importance.shape[-1] <= config.selected:
            return weigh(q, keys, values, CAUSAL, Score())
        chosen, groups = self.choose(importance).flatten(0, 1), keys.shape[1]
        k, v = keys.flatten(0, 1), values.flatten(0, 1)
        grouped = (q * config.head_dim**-0.5).reshape(len(k), -1, tokens, config.head_dim)
        inside = torch.arange(config.block, device=q.device)
        out = []
        for index in range(0, tokens, PIECE):
            own = chosen[:, index : index + PIECE]
            at = torch.arange(index, index + own.shape[1], device=q.device) + (end - tokens)
            place = (own[..., None] * config.block + inside).flatten(2)
            hidden = (place < 0) | (place > at[:, None])
            shape = (*place.shape, config.head_dim)
            place = place.clamp(0, end - 1).flatten(1)
            queries = grouped[:, :, index : index + PIECE].transpose(1, 2)
            scores = queries @ take(k, place).view(shape).mT
            scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
            weights = scores.masked_fill(hidden[:, :, None], -torch.inf).softmax(-1)
            out.append(weights.to(v.dtype) @ take(v, place).view(shape))
        joined = torch.cat(out, 1).transpose(1, 2)
        return joined.reshape(-1, groups * joined.shape[1], tokens, config.head_dim)

    def init_state(
        self, batch: int, context: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> State:
        """See the class; S is the context, its compressed blocks, l - 1, and the window."""
        config = self.config
        sizes = {
            "": context,
            "compressed_": config.compressed(context),
            "pending_": config.compress - 1,
            "near_": min(config.window, context),
        }
        tensors = {}
        for prefix, size in sizes.items():
            for name in ("keys", "values"):
                shape = (batch, config.kv_heads, size, config.head_dim)
                tensors[prefix + name] = torch.zeros(shape, dtype=dtype, device=device)
        return State(0, tensors)


def configure_native_sparse(site: Site, genes: Mapping[str, Gene]) -> NativeSparseConfig:
    """The config of pattern=native-sparse. Raises GeneError."""
    only(genes, "pattern", {"causal": True})
    block, compress = whole(genes, "block"), whole(genes, "compress")
    stride, selected = whole(genes, "compress_stride"), whole(genes, "selected")
    for name, size in (("block", block), ("compress", compress)):
        if size % stride:
            raise GeneError(f"compress_stride={stride} does not divide {name}={size}")
    if selected < FORCED:
        raise GeneError(
            f"pattern=native-sparse always selects {FORCED} blocks: the first, a query's own and "
            f"the one before; selected={selected} is less"
        )
    return NativeSparseConfig(
        **heads_config("native-sparse", site, genes),
        window=whole(genes, "window"),
        block=block,
        selected=selected,
        compress=compress,
        stride=stride,
    )
