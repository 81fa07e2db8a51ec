"""MLP-Mixer's token mixing: one MLP over the tokens, the same for every channel.

y = W_2 act(W_1 x + b_1) + b_2, where x is (T, D) and W_1 and W_2 are learned tables over positions
(arXiv 2105.01601, equation 1). Shorter sequences take the tables' first rows; longer ones have
none.

The causal form changes one thing: every position has hidden units of its own, and both tables are
triangular. The units of position j see the tokens up to j, and token t sees the units up to t.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...kernels.letters import BTD
from ..base import (
    Axis,
    BidirectionalError,
    Cost,
    Gene,
    Liv,
    Operator,
    Point,
    Primitive,
    Site,
    State,
    View,
)
from ..channel.mlp import ACTIVATION, activate
from ..genes import choice, flag, whole
from ..position import ContextError


@dataclass(frozen=True)
class TokenMlpConfig:
    """Final numbers of one layer."""

    width: int
    length: int
    """The tokens that the tables serve."""
    units: int
    """Hidden units per position."""
    activation: str
    causal: bool

    @property
    def hidden(self) -> int:
        return self.units * self.length

    @property
    def pairs(self) -> int:
        """Pairs of a token and one that it sees."""
        return self.length * (self.length + 1) // 2 if self.causal else self.length**2

    def cost(self, context: int, dtype: torch.dtype) -> Cost:
        """Beyond the tables nothing can be computed: a longer context costs what the longest
        does."""
        params = 2 * self.units * self.pairs + self.hidden + self.length
        if not self.causal:
            return Cost(params, params, 4.0 * self.hidden * self.width)
        tokens = min(context, self.length)
        flops = 4 * self.units * self.width * (tokens + 1) / 2
        kept = (1 + self.units) * tokens * self.width * dtype.itemsize
        return Cost(params, params, flops, kept)

    def build(self) -> TokenMlp | CausalTokenMlp:
        return CausalTokenMlp(self) if self.causal else TokenMlp(self)


def _check(config: TokenMlpConfig, end: int) -> None:
    if end > config.length:
        raise ContextError(
            f"the token-mixing MLP serves {config.length} tokens; this call needs {end}"
        )


class TokenMlp(Operator):
    """The published layer, over the whole sequence."""

    def __init__(self, config: TokenMlpConfig) -> None:
        super().__init__()
        c = self.config = config
        self.entry = nn.Linear(c.length, c.hidden)
        self.exit = nn.Linear(c.hidden, c.length)

    def forward(self, x: BTD, state: State | None = None) -> tuple[BTD, State | None]:
        """Raises ContextError where the sequence is longer than the tables."""
        c, tokens = self.config, x.shape[1]
        if state is not None:
            raise BidirectionalError
        _check(c, tokens)
        hidden = torch.matmul(self.entry.weight[:, :tokens], x) + self.entry.bias[:, None]
        hidden = activate(c.activation, hidden)
        y = torch.matmul(self.exit.weight[:tokens], hidden) + self.exit.bias[:tokens, None]
        return y, None

    def init_state(
        self, batch: int, context: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> State:
        raise BidirectionalError


class CausalTokenMlp(Operator):
    """The triangular form. Its tables hold the pairs (t, s <= t) only, row after row.

    The state is a cache of the inputs and of the hidden units. Decoding writes into it in place, so
    run it without gradients, or without a backward pass through more than one call.
    """

    def __init__(self, config: TokenMlpConfig) -> None:
        super().__init__()
        c = self.config = config
        seen = torch.arange(1, c.length + 1)
        bound = seen.repeat_interleave(seen)[:, None] ** -0.5
        self.entry = nn.Parameter(torch.empty(c.pairs, c.units).uniform_(-1, 1) * bound)
        self.exit = nn.Parameter(
            torch.empty(c.pairs, c.units).uniform_(-1, 1) * bound * c.units**-0.5
        )
        self.entry_bias = nn.Parameter(torch.zeros(c.length, c.units))
        self.exit_bias = nn.Parameter(torch.zeros(c.length))

    def forward(self, x: BTD, state: State | None = None) -> tuple[BTD, State | None]:
        """Raises ContextError beyond the tables, and where a token does not fit in the state."""
        c, tokens = self.config, x.shape[1]
        start = 0 if state is None else state.length
        end = start + tokens
        _check(c, end)
        if state is not None and end > state.tensors["x"].shape[1]:
            size = state.tensors["x"].shape[1]
            raise ContextError(
                f"the cache of the token-mixing MLP holds {size} tokens; this call needs {end}"
            )
        entry = _rows(self.entry, start, end).permute(0, 2, 1).flatten(0, 1)
        exit_ = _rows(self.exit, start, end).flatten(1)
        seen = x if state is None else _extend(state.tensors["x"], x, start)
        hidden = torch.matmul(entry, seen) + self.entry_bias[start:end].reshape(-1, 1)
        hidden = activate(c.activation, hidden)
        if state is not None:
            hidden = _extend(state.tensors["hidden"], hidden, start * c.units)
        y = torch.matmul(exit_, hidden) + self.exit_bias[start:end, None]
        return y, None if state is None else State(end, state.tensors)

    def init_state(
        self, batch: int, context: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> State:
        """A cache for `context` tokens, at most as many as the tables serve."""
        c = self.config
        size = min(context, c.length)
        sizes = {"x": size, "hidden": size * c.units}
        shapes = {name: (batch, rows, c.width) for name, rows in sizes.items()}
        return State(0, {k: torch.zeros(s, dtype=dtype, device=device) for k, s in shapes.items()})


def _rows(table: Tensor, start: int, end: int) -> Tensor:
    """The rows start..end-1 of a triangular table, (rows, end, units), 0 above the diagonal."""
    packed = table[start * (start + 1) // 2 : end * (end + 1) // 2]
    if end - start == 1:
        return packed[None]
    row, column = torch.tril_indices(end - start, end, start, device=table.device)
    return table.new_zeros(end - start, end, table.shape[1]).index_put((row, column), packed)


def _extend(cache: Tensor, new: Tensor, start: int) -> Tensor:
    """All that is cached with the new rows (B, rows, D), which are written from `start` on."""
    end = start + new.shape[1]
    cache[:, start:end] = new
    return new if start == 0 else cache[:, :end].to(new.dtype)


def configure(site: Site, genes: Mapping[str, Gene]) -> TokenMlpConfig:
    return TokenMlpConfig(
        width=site.width,
        length=whole(genes, "length"),
        units=whole(genes, "units"),
        activation=choice(genes, "activation"),
        causal=flag(genes, "causal"),
    )


TOKEN_MLP = Primitive(
    name="token-mlp",
    kind="mixer",
    summary="an MLP over the tokens, with tables over positions (MLP-Mixer)",
    source="MLP-Mixer (arXiv 2105.01601)",
    liv=Liv("none", "low-rank", "none", "swish", "diagonal"),
    axes=(
        Axis(
            "length",
            512,
            "tokens that the tables serve; no sequence may be longer",
            low=1.0,
            high=8192.0,
        ),
        Axis("units", 1, "hidden units per position", low=1.0, high=64.0, search=(1, 2)),
        ACTIVATION,
        Axis(
            "causal",
            True,
            "triangular tables; false is the published MLP over the whole sequence",
            options=(True, False),
        ),
    ),
    configure=configure,
    points=(
        Point(
            "mlp-mixer",
            {"causal": False, "units": 2, "activation": "gelu"},
            "MLP-Mixer (arXiv 2105.01601)",
            "two hidden units per token; the B/16 model has 384 for 196 tokens",
            view=View(
                "y_t = sum_u W2[t, u] act(sum_j W1[u, j] x_j), all tokens at once",
                "the whole sequence as it is; no state goes from token to token",
                "never",
                "none: there is no state to fit",
            ),
        ),
        Point(
            "causal-mixer",
            {"causal": True, "units": 2, "activation": "gelu"},
            "after MLP-Mixer (arXiv 2105.01601)",
            "every position has hidden units of its own, and both tables are triangular",
            view=View(
                "h_u += W1[u, t] x_t for units u >= t; y_t = sum_{u <= t} W2[t, u] act(h_u)",
                "sums of the tokens so far, one per channel and hidden unit",
                "never: a sum keeps all of its terms",
                "-W1[:, t] . h x_t, linear: linear attention whose keys are fixed by position",
            ),
        ),
    ),
)
