"""Routers of a slot: which of its parallel operators a token takes, and whether it enters at all.

With x the stream that the slot reads (after its norm) and W a linear map without a bias:

- `Gate` (`join=gate`): p = softmax(W x) over the branches, y = sum_j p_j f_j(x).
- `Best` (`join=top1`): j = argmax p, y = f_j(x), and what the slot adds to the stream is multiplied
  by p_j, as in Switch Transformers (Fedus et al., arXiv 2101.03961), whose balancing loss is added:
  0.01 J sum_j c_j m_j, c_j the share of tokens that took branch j, m_j the mean of p_j. The factor
  stands at the addition because a norm of y (sandwich norms, nGPT) would take it out again.
- `Depth` (`tokens` below 1; Mixture-of-Depths, Raposo et al., arXiv 2404.02258): r = W x, one
  number. In training the ceil(tokens * T) tokens with the largest r of every sequence go through
  the slot, which is computed over that shorter sequence, its positions included; what it adds is
  multiplied by r. The others pass the slot by and are not changed, by its norms neither. Which are
  the largest depends on later tokens, so everywhere else a token goes through where r > 0, and a
  second loss teaches that threshold: the binary cross-entropy between r as a logit and being among
  the largest. The paper routes whole blocks and does not say where the router reads nor what weight
  the loss has; here every slot has a router of its own.

All branches of a joined slot run over all tokens, because their states must hold every token: a
join chooses what is used and saves nothing. A slot that some tokens pass by saves its FLOPs for
them. Its cache has room for all: nothing bounds how many pass the threshold.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.letters import BTD
from ..primitives.base import Carry, State

BALANCE_WEIGHT = 0.01
"""Of the balancing loss of `Best` (arXiv 2101.03961, section 2.2)."""

THRESHOLD_WEIGHT = 0.1
"""Of the loss that teaches the threshold of `Depth`."""

_ONE = 1 << 20
"""A token's weight as a whole number: sums of whole numbers survive `module.to(bf16)`."""


class Router(nn.Module):
    """Linear scores of every token, and the load of the last training step."""

    counts: Tensor
    load: Tensor

    def __init__(self, width: int, rows: int) -> None:
        super().__init__()
        bound = width**-0.5
        self.weight = nn.Parameter(torch.empty(rows, width).uniform_(-bound, bound))
        # Weight per row and of all tokens: since the last `balance`, and in the step it closed.
        self.register_buffer("counts", torch.zeros(rows + 1, dtype=torch.int64))
        self.register_buffer("load", torch.zeros(rows + 1, dtype=torch.int64))
        self._loss: Tensor | None = None

    def logits(self, x: BTD) -> Tensor:
        """(B, T, rows) in float32 at least: half precision flips choices whose scores are near."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(dtype), self.weight.to(dtype))

    @torch.no_grad()
    def count(self, weights: Tensor) -> None:
        """Add the weights (B, T, rows) of a training call to the load."""
        rows = (weights.flatten(0, 1).double() * _ONE).round().long().sum(0)
        tokens = rows.new_full((1,), weights[..., 0].numel() * _ONE)
        self.counts += torch.cat((rows, tokens))

    def balance(self) -> None:
        """Close a training step."""
        self.load.copy_(self.counts)
        self.counts.zero_()
        self._loss = None

    def auxiliary_loss(self) -> Tensor | None:
        """The weighted loss of the last training call, once; None if there was none."""
        loss, self._loss = self._loss, None
        return loss

    def shares(self) -> list[float]:
        """The mean weight of every row in the last training step; zeros before the first."""
        counts = self.counts if bool(self.counts.any()) else self.load
        shares: list[float] = (counts[:-1].double() / counts[-1].clamp_min(1)).tolist()
        return shares


class Gate(Router):
    """The weights of parallel branches by the token."""

    def combine(self, x: BTD, outputs: list[Tensor]) -> tuple[Tensor, Tensor | None]:
        """Branch outputs, each (B, T, D), to one, and the factor (B, T, 1) of what is added."""
        weights = self.logits(x).softmax(-1)
        if self.training:
            self.count(weights)
        y = torch.stack(outputs, -1)
        return (y * weights.unsqueeze(-2).to(y.dtype)).sum(-1), None


class Best(Router):
    """The best of parallel branches by the token."""

    def choose(self, scores: Tensor) -> Tensor:
        """The best branch of every token; ties go to the first."""
        best: Tensor = torch.sort(scores, dim=-1, descending=True, stable=True).indices[..., :1]
        return best

    def combine(self, x: BTD, outputs: list[Tensor]) -> tuple[Tensor, Tensor | None]:
        """Branch outputs, each (B, T, D), to one, and the factor (B, T, 1) of what is added."""
        scores = self.logits(x).softmax(-1)
        best = self.choose(scores.detach())
        if self.training:
            taken = torch.zeros_like(scores).scatter(-1, best, 1.0)
            self.count(taken)
            together = taken.flatten(0, 1).mean(0) * scores.flatten(0, 1).mean(0)
            self._loss = BALANCE_WEIGHT * len(outputs) * together.sum()
        y = torch.stack(outputs, -1)
        index = best.unsqueeze(-2).expand(*y.shape[:-1], 1)
        return y.gather(-1, index).squeeze(-1), scores.gather(-1, best)


@dataclass(frozen=True)
class Chosen:
    """The tokens of every row that go through a slot, in their order."""

    index: Tensor
    """(B, K), their places; a row that has fewer ends in places of tokens that pass it by."""
    counts: list[int] | None
    """How many of K are meant in every row; None for all in all."""
    factor: Tensor
    """(B, K, 1), which multiplies what the slot adds."""

    def of(self, x: BTD) -> BTD:
        """The chosen tokens of x, (B, K, D)."""
        return x.gather(1, self._over(x))

    def put(self, x: BTD, new: BTD) -> BTD:
        """x with the chosen tokens replaced by `new` (B, K, D)."""
        if self.counts is not None:
            counts = torch.tensor(self.counts, device=x.device).unsqueeze(1)
            meant = torch.arange(self.index.shape[1], device=x.device) < counts
            new = torch.where(meant.unsqueeze(-1), new, self.of(x))
        return x.scatter(1, self._over(x), new.to(x.dtype))

    def _over(self, x: BTD) -> Tensor:
        return self.index.unsqueeze(-1).expand(-1, -1, x.shape[-1])


class Joined(NamedTuple):
    """What comes out of a slot's operators: the joined output y (B, K, D), the factor (B, K, 1) of
    what is added to the stream (None for 1), and the tokens that went through (None for all)."""

    y: Tensor
    factor: Tensor | None
    chosen: Chosen | None


class Depth(Router):
    """Which tokens go through a slot. `whole`: the sequence is there as a whole, in training."""

    def __init__(self, width: int, tokens: float) -> None:
        super().__init__(width, 1)
        self.tokens = tokens

    def choose(self, x: BTD, whole: bool, earlier: Tensor | None = None) -> Chosen:
        """The tokens that go through, from what the slot reads of the stream.

        `earlier` is the index of the same choice made before: equal tokens have equal logits, so
        that an input which is computed again, up to a rounding, could choose others.
        """
        logits = self.logits(x).squeeze(-1)
        if not whole:
            above: Chosen = self._above(logits)
            return above
        size = passing(self.tokens, x.shape[1])
        index = earlier
        if index is None:
            # A stable sort: of equal tokens the first ones go through.
            order = torch.sort(logits.detach(), dim=-1, descending=True, stable=True).indices
            index = order[:, :size].sort(-1).values
        among = torch.zeros_like(logits).scatter(1, index, 1.0)
        self._loss = THRESHOLD_WEIGHT * F.binary_cross_entropy_with_logits(logits, among)
        self.count((logits > 0).to(logits.dtype).unsqueeze(-1))
        return Chosen(index, None, logits.gather(1, index).unsqueeze(-1))

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _above(self, logits: Tensor) -> Chosen:
        above = logits > 0
        counts: list[int] = above.sum(1).tolist()
        # Those above first, each kind in its order: a stable sort of what is not above.
        order = torch.sort((~above).to(torch.uint8), dim=-1, stable=True).indices
        index = order[:, : max(counts)]
        return Chosen(index, counts, logits.gather(1, index).unsqueeze(-1))


@dataclass
class RowStates:
    """The states of an operator in a slot that some tokens pass by: one per row of the batch,
    because the rows' sequences there have lengths of their own."""

    rows: list[State]

    def bytes(self) -> int:
        return sum(state.bytes() for state in self.rows)

    def clone(self) -> RowStates:
        return RowStates([state.clone() for state in self.rows])


def passing(tokens: float, length: int) -> int:
    """How many of `length` tokens go through a slot in training: the share, rounded up."""
    # The product of a share with an exact length can lie a rounding above a whole number.
    return min(length, max(1, math.ceil(tokens * length - 1e-9)))


def keywords(carry: Carry | None, place: int | None) -> dict[str, Any]:
    """What an operator's call takes beside input and state."""
    given = {"carry": carry, "place": place}
    return {name: value for name, value in given.items() if value is not None}


def run_rows(
    operator: nn.Module,
    x: BTD,
    handed: Tensor | None,
    place: int | None,
    chosen: Chosen,
    states: RowStates | None,
) -> BTD:
    """An operator over the chosen tokens (B, K, D), each row by itself, its state updated.

    `handed` is what the model hands on of them, (B, K) or (B, K, D), for an operator that reads it.
    """
    assert chosen.counts is not None
    rows = []
    for row, count in enumerate(chosen.counts):
        y = x[row : row + 1, :0]
        if count:
            state = None if states is None else states.rows[row]
            of = (slice(row, row + 1), slice(count))
            carry = None if handed is None else Carry([handed[of]])
            y, new = operator(x[of], state, **keywords(carry, place))
            if states is not None:
                states.rows[row] = new
        rows.append(F.pad(y, (0, 0, 0, x.shape[1] - count)))
    return torch.cat(rows)
