"""The experts of a mixture: many MLPs by one grouped product, and experts that hardly compute.

An expert is an MLP as in `mlp.py`, with its own biases where `bias`. Its gated form has one more
nonlinearity, `clamped` (gpt-oss, OpenAI, arXiv 2508.10925): min(g, 7) sigmoid(1.702 g) * (u + 1)
with g and u clamped to at most 7, and u to at least -7.

A token's weight stands on what an expert gives, or on what it reads (Llama 4, Meta, 2025).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.moe_permute import dispatch, permute, unpermute
from .mlp import activate
from .router import Routing

CLAMP, SLOPE = 7.0, 1.702
"""gpt-oss' limit of the gate and the linear half, and the slope of its sigmoid."""


@dataclass(frozen=True)
class ExpertsConfig:
    """Final numbers of experts of one shape."""

    width: int
    experts: int
    inner: int
    activation: str
    gated: bool
    bias: bool
    weighs_input: bool

    @property
    def entry(self) -> int:
        """The outputs of an expert's first product: gate and up, or up alone."""
        return 2 * self.inner if self.gated else self.inner

    @property
    def products(self) -> int:
        """Multiply-adds of one expert for one token."""
        return self.width * (self.entry + self.inner)

    @property
    def params(self) -> int:
        """Of one expert."""
        return self.products + (self.entry + self.width if self.bias else 0)


class Experts(nn.Module):
    """Experts with weights entry (E, F, D) and exit (E, D, F)."""

    def __init__(self, config: ExpertsConfig) -> None:
        super().__init__()
        self.config = c = config
        self.entry = nn.Parameter(_uniform(c.experts, c.entry, c.width))
        self.exit = nn.Parameter(_uniform(c.experts, c.width, c.inner))
        self.entry_bias = nn.Parameter(torch.zeros(c.experts, c.entry)) if c.bias else None
        self.exit_bias = nn.Parameter(torch.zeros(c.experts, c.width)) if c.bias else None

    def stream_weights(self) -> dict[str, int]:
        """The axis of each weight that lies along the residual stream (see `sphere.py`)."""
        return {"entry": 2, "exit": 1}

    def forward(self, rows: Tensor, routing: Routing) -> Tensor:
        """sum_j weights_nj * expert(row_n) for rows (N, D), over the kept pairs; or with the weight
        inside, sum_j expert(weights_nj * row_n).

        Pairs of special experts add nothing here. In decoding they are computed and weighted with
        0, so that shapes do not depend on the data; in the grouped product they have no row.
        """
        rows, entry, exit_ = self._cast(rows)
        choices, weights = routing.experts, routing.weights
        form = product_form(choices.numel(), entry)
        special = self.special(routing)
        if form == "gathered":
            if special:
                choices, weights = self._masked(routing)
            return self._gathered(rows, entry, exit_, choices, weights)
        kept = routing.kept
        if special and kept is None:
            kept = torch.ones_like(choices, dtype=torch.bool)
        where = dispatch(choices, self.config.experts, kept)
        own = None
        if self.entry_bias is not None:
            own = choices.flatten()[where.order]
        read = permute(rows, where)
        if self.config.weighs_input:
            read, weights = _weighed(read, weights.flatten()[where.order]), torch.ones_like(weights)
        hidden = _product(read, entry, where.ends, form)
        if self.entry_bias is not None:
            hidden = hidden + self.entry_bias.to(hidden.dtype)[own]
        out = _product(self._activate(hidden, 1), exit_, where.ends, form)
        if self.exit_bias is not None:
            out = out + self.exit_bias.to(out.dtype)[own]
        return unpermute(out, weights, where)

    def special(self, routing: Routing) -> bool:
        """Some pairs may have no expert here."""
        return routing.kept is not None or (
            routing.logits is not None and routing.logits.shape[-1] > self.config.experts
        )

    def of_tokens(self, x: Tensor, tokens: Tensor, weights: Tensor) -> Tensor:
        """Expert choice: x (B, T, D), each expert's tokens (B, E, C) and their weights; (B, T, D).

        Experts take equally many rows, so it is one product of a batch of matrices.
        """
        rows, entry, exit_ = self._cast(x)
        batch, experts, taken = tokens.shape
        index = tokens + x.shape[1] * torch.arange(batch, device=x.device)[:, None, None]
        index = index.transpose(0, 1).reshape(experts, batch * taken)
        weights = weights.transpose(0, 1).reshape(experts, -1)
        read = rows.flatten(0, 1)[index]
        if self.config.weighs_input:
            read, weights = _weighed(read, weights), torch.ones_like(weights)
        hidden = read @ entry.mT
        if self.entry_bias is not None:
            hidden = hidden + self.entry_bias.to(hidden.dtype)[:, None]
        out = self._activate(hidden, 2) @ exit_.mT
        if self.exit_bias is not None:
            out = out + self.exit_bias.to(out.dtype)[:, None]
        out = out.to(weights.dtype) * weights.unsqueeze(-1)
        total = out.new_zeros(batch * x.shape[1], x.shape[2])
        return total.index_add(0, index.flatten(), out.flatten(0, 1)).to(rows.dtype).view(x.shape)

    def _masked(self, routing: Routing) -> tuple[Tensor, Tensor]:
        """Choices and weights with an expert for every pair, of weight 0 where it has none."""
        choices = routing.experts
        there = choices < self.config.experts
        if routing.kept is not None:
            there = there & routing.kept
        return choices.clamp_max(self.config.experts - 1), routing.weights.masked_fill(~there, 0.0)

    def _gathered(
        self, rows: Tensor, entry: Tensor, exit_: Tensor, choices: Tensor, weights: Tensor
    ) -> Tensor:
        chosen = choices.flatten()
        read = rows.repeat_interleave(choices.shape[1], 0)
        if self.config.weighs_input:
            # An expert without biases gives nothing for nothing: dropped pairs have weight 0.
            read, weights = _weighed(read, weights.flatten()), torch.ones_like(weights)
        hidden = entry[chosen] @ read.unsqueeze(-1)
        if self.entry_bias is not None:
            hidden = hidden + self.entry_bias.to(hidden.dtype)[chosen].unsqueeze(-1)
        out = (exit_[chosen] @ self._activate(hidden, 1)).squeeze(-1)
        if self.exit_bias is not None:
            out = out + self.exit_bias.to(out.dtype)[chosen]
        out = out.view(*choices.shape, -1)
        total: Tensor = (out.to(weights.dtype) * weights.unsqueeze(-1)).sum(1)
        return total.to(rows.dtype)

    def _cast(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The input and both weights in the dtype of the products."""
        device = x.device.type
        # Autocast does not know the grouped product.
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        return x.to(dtype), self.entry.to(dtype), self.exit.to(dtype)

    def _activate(self, hidden: Tensor, dim: int) -> Tensor:
        if not self.config.gated:
            return activate(self.config.activation, hidden)
        gate, up = hidden.chunk(2, dim)
        if self.config.activation == "clamped":
            gate, up = gate.clamp_max(CLAMP), up.clamp(-CLAMP, CLAMP)
            return gate * torch.sigmoid(SLOPE * gate) * (up + 1)
        return activate(self.config.activation, gate) * up


def _weighed(rows: Tensor, weights: Tensor) -> Tensor:
    """Rows (..., D) times their weights, in the rows' dtype."""
    return (rows * weights.unsqueeze(-1)).to(rows.dtype)


ProductForm = Literal["gathered", "grouped", "segments"]


def product_form(choices: int, weight: Tensor) -> ProductForm:
    """How the experts' products are computed for so many (token, expert) pairs.

    `gathered`: every pair brings its expert's weights, for the few pairs of decoding. `grouped`:
    one grouped product over the pairs sorted by expert. `segments`: one product per expert, where
    torch's grouped product does not serve: float64, and rows that are no multiple of 16 bytes.
    weight is (E, F, D).
    """
    experts, _, width = weight.shape
    if choices <= experts:
        return "gathered"
    aligned = width * weight.element_size() % 16 == 0
    if aligned and weight.dtype in (torch.float32, torch.bfloat16, torch.float16):
        return "grouped"
    return "segments"


def _product(rows: Tensor, weight: Tensor, ends: Tensor, form: ProductForm) -> Tensor:
    """Rows (M, D) sorted by expert times their expert's weight (E, F, D); `ends` (E,) of int32."""
    if form == "grouped":
        # Under torch.compile torch 2.13 knows the grouped product's shape in bf16 only.
        grouped = F.grouped_mm if weight.dtype == torch.bfloat16 else _grouped_uncompiled
        return grouped(rows, weight.mT, offs=ends)
    parts = rows.tensor_split(ends[:-1].tolist())
    return torch.cat([F.linear(part, w) for part, w in zip(parts, weight, strict=True)])


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _grouped_uncompiled(rows: Tensor, weight: Tensor, *, offs: Tensor) -> Tensor:
    return F.grouped_mm(rows, weight, offs=offs)


def _uniform(*shape: int) -> Tensor:
    """Weights (..., out, in) as nn.Linear draws them."""
    bound = shape[-1] ** -0.5
    return torch.empty(shape).uniform_(-bound, bound)
