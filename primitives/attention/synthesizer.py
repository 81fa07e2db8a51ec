"""Synthesizer: attention whose weights come from the token alone, or from no token.

Tay et al., arXiv 2005.00743. Per head, over the tokens s up to t (causal) or all of them:

    y_t = softmax_s(B_t) v_s;   dense: B_t = W_2 relu(W_1 x_t + b_1) + b_2;   random: B = R

Row s of W_2, and of R a row and a column, belongs to position s: tables for at most L tokens, of
which a shorter sequence takes the first ones. R is learned or fixed, or the product of two narrow
tables (the paper's factorised form). No key is made, and the state holds values alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.letters import BTD
from ..base import BidirectionalError, Cost, Gene, GeneError, Site, State
from ..genes import choice, flag, whole
from ..position import ContextError
from .heads import HeadsConfig, HeadsOperator, heads_config
from .linformer import require_length


@dataclass(frozen=True)
class SynthesizerConfig(HeadsConfig):
    """Final numbers of one layer."""

    form: str
    """dense or random."""
    length: int
    """L: the longest sequence."""
    learned: bool
    """The tables of the random form are learned."""
    rank: int
    """Width of two tables whose product is R; 0: one whole table."""
    causal: bool

    def cost(self, context: int, dtype: torch.dtype) -> Cost:
        params, products = self.linear(self.kv_width)
        seen = (context + 1) / 2 if self.causal else float(context)
        if self.form == "dense":
            made = self.width * self.query_width
            params += made + self.query_width + self.length * (self.query_width + self.heads)
            products += made
            read = self.query_width * seen
        else:
            sizes = 2 * self.rank if self.rank else self.length
            params += self.heads * self.length * sizes if self.learned else 0
            # A table of weights is the same for all sequences, and read from memory.
            read = self.heads * self.rank * seen
        flops = 2.0 * (products + read + self.query_width * seen)
        state = self.kv_width * min(context, self.length) * dtype.itemsize if self.causal else 0
        return Cost(params, params, flops, state)

    def build(self) -> Synthesizer:
        return Synthesizer(self)


class Synthesizer(HeadsOperator):
    """See the module. Raises ContextError beyond `length` tokens."""

    columns: Tensor
    """dense: W_2 (H, L, K); random: R (H, L, L), or one of its two tables (H, L, rank)."""
    rows: Tensor

    def __init__(self, config: SynthesizerConfig) -> None:
        super().__init__(config, [config.kv_width])
        self.config = config
        heads, length = config.heads, config.length
        self.hidden: nn.Linear | None = None
        if config.form == "dense":
            self.hidden = nn.Linear(config.width, config.query_width)
            bound = config.head_dim**-0.5
            columns = torch.empty(heads, length, config.head_dim).uniform_(-bound, bound)
            self.columns = nn.Parameter(columns)
            self.shift = nn.Parameter(torch.zeros(heads, length))
            return
        if not config.rank:
            self._add_table("columns", torch.randn(heads, length, length))
            return
        # Their product has entries of the size of one.
        for name in ("columns", "rows"):
            table = torch.randn(heads, length, config.rank) * config.rank**-0.25
            self._add_table(name, table)

    def _add_table(self, name: str, table: Tensor) -> None:
        if self.config.learned:
            self.register_parameter(name, nn.Parameter(table))
        else:
            self.register_buffer(name, table)

    def forward(self, x: BTD, state: State | None = None) -> tuple[BTD, State | None]:
        config, start = self.config, 0 if state is None else state.length
        if state is not None and not config.causal:
            raise BidirectionalError
        end = start + x.shape[1]
        require_length(end, config.length, f"synthesizer-{config.form}")
        (values,), gate = self.project(x)
        v = values.transpose(1, 2)
        if state is not None:
            held = state.tensors["values"]
            if end > held.shape[2]:
                raise ContextError(
                    f"the cache of attention holds {held.shape[2]} tokens; this call needs {end}"
                )
            held[:, :, start:end] = v
            if start:
                v = held[:, :, :end].to(v.dtype)
            state = State(end, state.tensors)
        scores = self._scores(x, start, end)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        if config.causal and x.shape[1] > 1:
            hidden = torch.ones(x.shape[1], end, dtype=torch.bool, device=x.device)
            scores = scores.masked_fill(hidden.triu(start + 1), -torch.inf)
        weights = scores.softmax(-1).to(v.dtype)
        v = v.repeat_interleave(config.heads // config.kv_heads, 1)
        return self.output(weights @ v, gate), state

    def _scores(self, x: BTD, start: int, end: int) -> Tensor:
        """B, (B or 1, H, T, S), of the tokens start..end-1 over positions 0..end-1."""
        if self.hidden is not None:
            h = torch.unflatten(F.relu(self.hidden(x)), -1, (self.config.heads, -1)).transpose(1, 2)
            scores: Tensor = h @ self.columns[:, :end].mT + self.shift[:, None, :end]
            return scores
        if self.config.rank:
            return (self.rows[:, start:end] @ self.columns[:, :end].mT)[None]
        return self.columns[None, :, start:end, :end]

    def init_state(
        self, batch: int, context: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> State:
        """`values` (B, G, S, K)."""
        c = self.config
        if not c.causal:
            raise BidirectionalError
        shape = (batch, c.kv_heads, min(context, c.length), c.head_dim)
        return State(0, {"values": torch.zeros(shape, dtype=dtype, device=device)})


def configure_synthesizer(site: Site, genes: Mapping[str, Gene]) -> SynthesizerConfig:
    """The config of pattern=synthesizer-dense or synthesizer-random. Raises GeneError."""
    name, position = choice(genes, "pattern"), choice(genes, "position")
    if position not in ("inherit", "none"):
        raise GeneError(
            f"pattern={name} makes no keys that position={position} could act on: its tables tell"
            " positions apart"
        )
    # Whatever the backbone's position is, there is nothing inside for it to act on.
    fields = heads_config(name, replace(site, position="none"), genes)
    dense = name == "synthesizer-dense"
    return SynthesizerConfig(
        **fields,
        form="dense" if dense else "random",
        length=whole(genes, "max_length"),
        learned=dense or choice(genes, "table") == "learned",
        rank=0 if dense else whole(genes, "table_rank"),
        causal=flag(genes, "causal"),
    )
