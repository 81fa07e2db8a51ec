"""The language model: the only place where configs become modules."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.linear_cross_entropy import linear_cross_entropy
from ..primitives.base import EMBEDDING, TOKENS, Carry, State, carries, is_causal, own_params
from ..primitives.norm import dyt_alpha, make_norm
from ..primitives.position import added_position
from ..primitives.sphere import Scale, stream_maps, to_sphere
from .blueprint import Blueprint
from .genome import Genome
from .residual import Entry, SlotBlock, final_norm
from .reversible import plain_streams, reversible_streams
from .routing import Chosen, Joined, Router, RowStates, keywords, run_rows


@dataclass
class ModelState:
    """What a model carries from one call to the next: one state per operator, in slot order."""

    length: int = 0
    operators: list[list[State | RowStates]] = field(default_factory=list)

    def bytes(self) -> int:
        return sum(state.bytes() for row in self.operators for state in row)

    def clone(self) -> ModelState:
        return ModelState(self.length, [[s.clone() for s in row] for row in self.operators])


class LanguageModel(nn.Module):
    """A language model over an alphabet of `vocab` tokens, causal where its genome is.

    `forward(tokens, state)`: tokens (B, T) of int64 to logits (B, T, vocab). With `state=None` it
    is the training form. With a state from `init_state` the call continues the sequences. In
    training mode and without a state, slots that take a share of the tokens choose them over the
    whole sequence (`routing.py`); in all other calls the logits are those of decoding. Call
    `after_step` after every step of an optimiser.
    """

    def __init__(self, blueprint: Blueprint, vocab: int | None = None) -> None:
        super().__init__()
        self.blueprint = blueprint
        self.genome = genome = blueprint.genome
        self.vocab = genome.vocab if vocab is None else vocab
        width = genome.width
        self.embedding = nn.Embedding(self.vocab, width)
        self.position = added_position(genome.position, width)
        self.operators, self.plan, self._place = _operators(blueprint)
        self._carries = [[carries(part.config) for part in row] for row in blueprint.parts]
        self._ahead = [[not is_causal(part.config) for part in row] for row in blueprint.parts]
        self.entry = Entry(genome)
        self.blocks = nn.ModuleList(
            SlotBlock(genome, slot, row)
            for slot, row in zip(genome.slots, blueprint.parts, strict=True)
        )
        self.final_norm = make_norm(final_norm(genome), width, dyt_alpha(width, False))
        self.head = None if genome.tied else nn.Linear(width, self.vocab, bias=False)
        # Logits of order 1 from a normed stream, whether the two tables are one or not.
        nn.init.normal_(self.embedding.weight, std=width**-0.5)
        if self.head is not None:
            nn.init.normal_(self.head.weight, std=width**-0.5)
        self._borrowers = _borrowers(genome)
        self._loss: Tensor | None = None
        sphere = genome.residual == "ngpt"
        self.logit_scale = Scale(self.vocab, 1.0, width**-0.5) if sphere else None
        self.on_sphere: dict[str, int] = self._find_stream_maps() if sphere else {}
        """With `residual=ngpt` the weights whose vectors have length 1, with the vectors' axis."""
        self._to_sphere()

    def hidden(self, tokens: Tensor, state: ModelState | None = None) -> Tensor:
        """What the logits are made of, (B, T, D): the normed stream after the last slot."""
        x = self.embedding(tokens)
        if self.position is not None:
            x = x + self.position(tokens.shape[1], 0 if state is None else state.length)
        x = self.entry(x)
        if self.genome.residual == "reversible":
            x = self._reversible(x, state, tokens)
        else:
            lent: dict[str, Any] = {TOKENS: [tokens], EMBEDDING: [x]}
            losses = []
            for i, block in enumerate(self.blocks):
                assert isinstance(block, SlotBlock)
                y, factor, chosen = self._slot(i, block, x, state, lent)
                if chosen is None:
                    x = block.residual(x, y, factor)
                else:
                    x = chosen.put(x, block.residual(chosen.of(x), y, factor))
                losses.append(self._slot_loss(i))
            self._loss = _sum(losses)
        normed: Tensor = self.final_norm(x)
        if state is not None:
            state.length += tokens.shape[1]
        return normed

    def forward(
        self, tokens: Tensor, state: ModelState | None = None
    ) -> tuple[Tensor, ModelState | None]:
        logits = F.linear(self.hidden(tokens, state), self._table())
        if self.logit_scale is not None:
            logits = logits * self.logit_scale()
        return logits, state

    def loss(self, hidden: Tensor, targets: Tensor, ignore: int) -> Tensor:
        """The mean cross-entropy (nats) of `hidden` and targets (B, T), without stored logits."""
        scale = None if self.logit_scale is None else self.logit_scale()
        return linear_cross_entropy(hidden, self._table(), targets, scale=scale, ignore=ignore)

    def _table(self) -> Tensor:
        return self.embedding.weight if self.head is None else self.head.weight

    def _slot(
        self,
        i: int,
        block: SlotBlock,
        x: Tensor,
        state: ModelState | None,
        lent: dict[str, Any],
        earlier: Tensor | None = None,
    ) -> Joined:
        """A slot's operators over the stream x (B, T, D).

        `earlier` is the index of the tokens that the same call chose before, if it is made again.
        """
        read = block.read(x)
        if block.depth is not None:
            chosen = block.depth.choose(read, self.training and state is None, earlier)
            return self._part(i, block, x, read, chosen, state, lent)
        outputs: list[Tensor] = []
        handed: dict[str, list[list[Tensor]]] = {}
        for j in range(len(self.plan[i])):
            held = None if state is None else state.operators[i][j]
            assert not isinstance(held, RowStates)
            label = self._carries[i][j]
            carry = None if label is None else Carry(lent.get(label))
            y, new = self._call((i, j), block.enter(j, x, read, outputs), held, lent, carry)
            outputs.append(y)
            if state is not None:
                state.operators[i][j] = new
            if label is not None and carry is not None and carry.later:
                if block.join == "chain":
                    lent[label] = carry.later
                else:
                    handed.setdefault(label, []).append(carry.later)
        for label, branches in handed.items():
            # Of parallel operators the mean, because their order means nothing.
            lent[label] = [
                torch.stack(parts).mean(0) if len(parts) > 1 else parts[0]
                for parts in zip(*branches, strict=True)
            ]
        return Joined(*block.combine(read, outputs), None)

    def _part(
        self,
        i: int,
        block: SlotBlock,
        x: Tensor,
        read: Tensor,
        chosen: Chosen,
        state: ModelState | None,
        lent: dict[str, Any],
    ) -> Joined:
        """A slot's operators over those tokens of the stream x (B, T, D) that go through it; `read`
        is what the slot reads of x.

        Such a slot lends nothing and stands outside the chains of `carries`: no other slot has its
        tokens. What the model hands on it has.
        """
        x, read = chosen.of(x), chosen.of(read)
        if x.shape[1] == 0:
            return Joined(x, chosen.factor, chosen)
        outputs: list[Tensor] = []
        for j, index in enumerate(self.plan[i]):
            operator = self.operators[index]
            held = None if state is None else state.operators[i][j]
            assert held is None or isinstance(held, RowStates)
            label = self._carries[i][j]
            handed = None
            if label == TOKENS:
                handed = lent[TOKENS][0].gather(1, chosen.index)
            elif label == EMBEDDING:
                handed = chosen.of(lent[EMBEDDING][0])
            place = self._place[i][j]
            entering = block.enter(j, x, read, outputs)
            # Rows that end early are filled up, which only a look ahead could see.
            alone = chosen.counts is not None and self._ahead[i][j]
            if held is not None or alone:
                outputs.append(run_rows(operator, entering, handed, place, chosen, held))
            else:
                more = keywords(None if handed is None else Carry([handed]), place)
                outputs.append(operator(entering, None, **more)[0])
        y, factor = block.combine(read, outputs)
        both = chosen.factor if factor is None else chosen.factor * factor
        return Joined(y, both, chosen)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _reversible(self, x: Tensor, state: ModelState | None, tokens: Tensor) -> Tensor:
        """The mean of the two streams after the last slot."""
        dtype = x.dtype
        entered: dict[int, Tensor] = {}

        def step(i: int, stream: Tensor, lent: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
            block = self.blocks[i]
            assert isinstance(block, SlotBlock)
            stream = stream.to(dtype)
            lent.setdefault(TOKENS, [tokens])
            # Both streams begin at the embedding, so the first slot reads it and lends it.
            lent.setdefault(EMBEDDING, [stream])
            y, factor, chosen = self._slot(i, block, stream, state, lent, entered.get(i))
            y = block.added(y, factor)
            if chosen is not None:
                entered[i] = chosen.index
                y = chosen.put(torch.zeros_like(stream, dtype=y.dtype), y)
            return y, self._slot_loss(i) if state is None else None

        start = x.to(torch.promote_types(dtype, torch.float32))
        if state is None and torch.is_grad_enabled():
            parts = [
                [block, *(self.operators[index] for index in indices)]
                for block, indices in zip(self.blocks, self.plan, strict=True)
            ]
            one, two, self._loss = reversible_streams(step, parts, start)
        else:
            one, two, self._loss = plain_streams(step, len(self.plan), start)
        mean: Tensor = (one + two) / 2
        return mean.to(dtype)

    def _call(
        self,
        at: tuple[int, int],
        x: Tensor,
        state: State | None,
        lent: dict[str, Any],
        carry: Carry | None = None,
    ) -> tuple[Tensor, Any]:
        i, j = at
        operator, label = self.operators[self.plan[i][j]], self.blueprint.parts[i][j].op.features
        if at in self._borrowers:
            y = operator.forward_borrowing(x, lent[self._borrowers[at]])  # type: ignore[operator]
            if state is not None:
                state.length += x.shape[1]
            return y, state
        more = keywords(carry, self._place[i][j])
        if label is not None:
            y, new, lent[label] = operator.forward_lending(x, state, **more)  # type: ignore[operator]
            return y, new
        y, new = operator(x, state, **more)
        return y, new

    def init_state(
        self,
        batch: int,
        context: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> ModelState:
        """Empty states with room for `context` tokens; dtype and device default to the weights'.

        Raises BidirectionalError where an operator reads later tokens."""
        self.blueprint.require_causal()
        weight = self.embedding.weight
        dtype = weight.dtype if dtype is None else dtype
        device = weight.device if device is None else device
        rows = []
        for i, indices in enumerate(self.plan):
            row: list[State | RowStates] = []
            for j, index in enumerate(indices):
                if (i, j) in self._borrowers:
                    row.append(State())
                    continue
                new = self.operators[index].init_state
                if self.genome.slots[i].tokens == 1:
                    row.append(new(batch, context, dtype, device))  # type: ignore[operator]
                else:
                    alone = [new(1, context, dtype, device) for _ in range(batch)]  # type: ignore[operator]
                    row.append(RowStates(alone))
            rows.append(row)
        return ModelState(0, rows)

    def after_step(self) -> None:
        """To be called after every step of an optimiser: operators that keep a balance (experts)
        and routers close it, and nGPT's weights return to the sphere."""
        for part in (*self.operators, *self.blocks):
            adjust = getattr(part, "balance", None)
            if adjust is not None:
                adjust()
        self._loss = None
        self._to_sphere()

    def _to_sphere(self) -> None:
        to_sphere({self.get_parameter(name): dim for name, dim in self.on_sphere.items()})

    def _find_stream_maps(self) -> dict[str, int]:
        """The weights on the sphere: tables, and what operators read and write the stream by."""
        found = {"embedding.weight": 1}
        if self.position is not None:
            found |= {f"position.{name}": 1 for name, _ in self.position.named_parameters()}
        if self.head is not None:
            found["head.weight"] = 1
        for name, part in self.blocks.named_modules():
            if isinstance(part, Router):
                found[f"blocks.{name}.weight"] = 1
        lent: dict[str, Any] = {}
        for i, j, _ in self.genome.ops():
            index = self.plan[i][j]
            operator = self.operators[index]

            def call(x: Tensor, i: int = i, j: int = j) -> Tensor:
                return self._call((i, j), x, None, lent)[0]

            operator.eval()
            maps = stream_maps(operator, call, self.genome.width)
            operator.train()
            found |= {f"operators.{index}.{name}": dim for name, dim in maps.items()}
        return found

    def auxiliary_loss(self) -> Tensor | None:
        """What operators and routers add to the loss of the last training call, once; None for
        nothing."""
        loss, self._loss = self._loss, None
        return loss

    def _slot_loss(self, i: int) -> Tensor | None:
        """What a slot adds to the loss, after its call: a module that stands in several slots is
        asked after each."""
        if not self.training:
            return None
        own = [self.operators[index] for index in dict.fromkeys(self.plan[i])]
        asked = [getattr(part, "auxiliary_loss", None) for part in (*own, self.blocks[i])]
        return _sum([ask() for ask in asked if ask is not None])

    def statistics(self) -> dict[str, Any]:
        """What routers and operators report of themselves, such as the load of experts, by slot or
        place. An operator that stands in several places reports at the first, for all of them."""
        reports: dict[str, Any] = {}
        asked: set[int] = set()
        for i, (block, indices) in enumerate(zip(self.blocks, self.plan, strict=True)):
            assert isinstance(block, SlotBlock)
            reports[f"slot{i}"] = block.statistics()
            for j, index in enumerate(indices):
                report = getattr(self.operators[index], "statistics", None)
                if report is not None and index not in asked:
                    reports[f"slot{i}.{j}"] = report()
                asked.add(index)
        return {place: report for place, report in reports.items() if report}


def _operators(
    blueprint: Blueprint,
) -> tuple[nn.ModuleList, list[list[int]], list[list[int | None]]]:
    """The modules, and per slot and branch which one stands there and as which of its places.

    Operators that share weights are one module that stands once in the list. The place is None
    where a module has nothing of its own in each.
    """
    labels = Counter(part.op.weights for row in blueprint.parts for part in row)
    modules = nn.ModuleList()
    shared: dict[str, int] = {}
    taken: Counter[int] = Counter()
    plan, places = [], []
    for row in blueprint.parts:
        indices: list[int] = []
        own: list[int | None] = []
        for part in row:
            config, label = part.config, part.op.weights
            index = len(modules) if label is None else shared.setdefault(label, len(modules))
            several = own_params(config) > 0
            if index == len(modules):
                count = 1 if label is None else labels[label]
                modules.append(config.build(count) if several else config.build())  # type: ignore[call-arg]
            indices.append(index)
            own.append(taken[index] if several else None)
            taken[index] += 1
        plan.append(indices)
        places.append(own)
    return modules, plan, places


def _sum(losses: Iterable[Tensor | None]) -> Tensor | None:
    there = [loss for loss in losses if loss is not None]
    return torch.stack(there).sum() if there else None


def _borrowers(genome: Genome) -> dict[tuple[int, int], str]:
    """The label for every operator that takes the features of an earlier one."""
    found: dict[tuple[int, int], str] = {}
    for i, j, op in genome.ops():
        if op.features is not None and genome.site(i, j).borrows:
            found[i, j] = op.features
    return found
