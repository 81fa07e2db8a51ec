"""From a genome to a language model: the only place where genes become modules."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..primitives.base import State
from ..primitives.norm import make_norm
from ..primitives.position import LearnedPosition
from .genome import Genome, Op, Slot
from .resolve import configs


@dataclass
class ModelState:
    """What a model carries from one call to the next: one state per operator, in slot order."""

    length: int = 0
    operators: list[list[State]] = field(default_factory=list)

    def bytes(self) -> int:
        return sum(state.bytes() for row in self.operators for state in row)

    def clone(self) -> ModelState:
        return ModelState(self.length, [[s.clone() for s in row] for row in self.operators])


class SlotBlock(nn.Module):
    """The norms of one slot and the join of its branches; the operators stand in the model.

    pre (2002.04745): x + f(norm(x)). post (1706.03762): norm(x + f(x)).
    sandwich (2105.13290): x + norm(f(norm(x))).
    """

    def __init__(self, slot: Slot, width: int, norm: str, placement: str) -> None:
        super().__init__()
        self.placement = placement
        self.join = slot.join if len(slot.branches) > 1 else "mean"
        self.before = make_norm(norm, width) if placement != "post" else nn.Identity()
        self.after = make_norm(norm, width) if placement != "pre" else nn.Identity()
        norms = len(slot.branches) if self.join == "norm" else 0
        self.branch_norms = nn.ModuleList(make_norm(norm, width) for _ in range(norms))

    def combine(self, outputs: list[Tensor]) -> Tensor:
        """Branch outputs, each (B, T, D), to one."""
        if len(outputs) == 1:
            return outputs[0]
        if self.join == "norm":
            outputs = [norm(y) for norm, y in zip(self.branch_norms, outputs, strict=True)]
        total = torch.stack(outputs).sum(0)
        return total if self.join == "sum" else total / len(outputs)

    def residual(self, x: Tensor, y: Tensor) -> Tensor:
        if self.placement == "post":
            return self.after(x + y)  # type: ignore[no-any-return]
        return x + self.after(y)  # type: ignore[no-any-return]


class LanguageModel(nn.Module):
    """A causal language model over an alphabet of `vocab` tokens.

    `forward(tokens, state)`: tokens (B, T) of int64 to logits (B, T, vocab). With `state=None` it
    is the training form. With a state from `init_state` the call continues the sequences.
    """

    def __init__(self, genome: Genome, vocab: int | None = None) -> None:
        super().__init__()
        self.genome = genome
        self.vocab = genome.vocab if vocab is None else vocab
        width = genome.width
        self.embedding = nn.Embedding(self.vocab, width)
        self.position = LearnedPosition(width) if genome.position == "learned" else None
        # Operators that share weights are one module that stands once in the list.
        self.operators = nn.ModuleList()
        self.plan: list[list[int]] = []
        shared: dict[str, int] = {}
        for slot, row in zip(genome.slots, configs(genome), strict=True):
            indices = []
            for op, config in zip(slot.branches, row, strict=True):
                index = shared.get(op.weights) if op.weights is not None else None
                if index is None:
                    index = len(self.operators)
                    self.operators.append(config.build())
                    if op.weights is not None:
                        shared[op.weights] = index
                indices.append(index)
            self.plan.append(indices)
        self.blocks = nn.ModuleList(
            SlotBlock(slot, width, genome.norm, genome.placement) for slot in genome.slots
        )
        # With norms after the addition the stream is normed already.
        self.final_norm = (
            nn.Identity() if genome.placement == "post" else make_norm(genome.norm, width)
        )
        self.head = None if genome.tied else nn.Linear(width, self.vocab, bias=False)
        # Logits of order 1 from a normed stream, whether the two tables are one or not.
        nn.init.normal_(self.embedding.weight, std=width**-0.5)
        if self.head is not None:
            nn.init.normal_(self.head.weight, std=width**-0.5)
        self._borrowers = _borrowers(genome)

    def forward(
        self, tokens: Tensor, state: ModelState | None = None
    ) -> tuple[Tensor, ModelState | None]:
        x = self.embedding(tokens)
        if self.position is not None:
            x = x + self.position(tokens.shape[1], 0 if state is None else state.length)
        lent: dict[str, Any] = {}
        for i, (slot, block) in enumerate(zip(self.genome.slots, self.blocks, strict=True)):
            assert isinstance(block, SlotBlock)
            normed = block.before(x)
            outputs = []
            for j, op in enumerate(slot.branches):
                operator = self.operators[self.plan[i][j]]
                held = None if state is None else state.operators[i][j]
                y, new = self._call(operator, op, (i, j), normed, held, lent)
                outputs.append(y)
                if state is not None:
                    state.operators[i][j] = new
            x = block.residual(x, block.combine(outputs))
        x = self.final_norm(x)
        table = self.embedding.weight if self.head is None else self.head.weight
        logits = F.linear(x, table)
        if state is not None:
            state.length += tokens.shape[1]
        return logits, state

    def _call(
        self,
        operator: nn.Module,
        op: Op,
        at: tuple[int, int],
        x: Tensor,
        state: State | None,
        lent: dict[str, Any],
    ) -> tuple[Tensor, Any]:
        if at in self._borrowers:
            y = operator.forward_borrowing(x, lent[self._borrowers[at]])  # type: ignore[operator]
            if state is not None:
                state.length += x.shape[1]
            return y, state
        if op.features is not None:
            y, new, lent[op.features] = operator.forward_lending(x, state)  # type: ignore[operator]
            return y, new
        y, new = operator(x, state)
        return y, new

    def init_state(
        self,
        batch: int,
        context: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> ModelState:
        """Empty states with room for `context` tokens; dtype and device default to the weights'."""
        weight = self.embedding.weight
        dtype = weight.dtype if dtype is None else dtype
        device = weight.device if device is None else device
        rows = []
        for i, indices in enumerate(self.plan):
            row = []
            for j, index in enumerate(indices):
                if (i, j) in self._borrowers:
                    row.append(State())
                else:
                    operator = self.operators[index]
                    row.append(operator.init_state(batch, context, dtype, device))  # type: ignore[operator]
            rows.append(row)
        return ModelState(0, rows)

    def balance(self) -> None:
        """Let every operator that keeps a balance (experts) adjust it; call after each step."""
        for operator in self.operators:
            adjust = getattr(operator, "balance", None)
            if adjust is not None:
                adjust()

    def statistics(self) -> dict[str, Any]:
        """What operators report of themselves, such as the load of experts, by place."""
        return {
            f"slot{i}.{j}": report()
            for i, indices in enumerate(self.plan)
            for j, index in enumerate(indices)
            if (report := getattr(self.operators[index], "statistics", None)) is not None
        }


def _borrowers(genome: Genome) -> dict[tuple[int, int], str]:
    """The label for every operator that takes the features of an earlier one."""
    found: dict[tuple[int, int], str] = {}
    for i, j, op in genome.ops():
        if op.features is not None and genome.site(i, j).borrows:
            found[i, j] = op.features
    return found


def build(genome: Genome, vocab: int | None = None) -> LanguageModel:
    """The genome's model with fresh weights from torch's global generator.

    Raises GeneError with a sentence where the genome is invalid.
    """
    return LanguageModel(genome, vocab)
