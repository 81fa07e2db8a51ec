"""The reversible residual form: activations are computed again instead of kept.

RevNet (Gomez et al., arXiv 1707.04585) as Reformer has it (Kitaev et al., arXiv 2001.04451): two
streams that both begin at the embeddings, and slots that change them in turn, y1 = x1 + F(x2),
y2 = x2 + G(y1). A slot's input is its output minus what it added, so the backward pass goes from
the last slot to the first with the two streams alone: training keeps memory for one slot, whatever
the depth, and computes every slot twice. What slots lend to later ones (keys and values) is kept.

The stream that goes on to the last norm and the head is the mean of the two. Reformer takes both
side by side, which would make the head twice as wide as the embedding, so that it could not be
tied.

Rounding makes the recomputed input differ from the first one in the last digits, so the streams
are float32 at least. An expert that is chosen by less than that can be another one the second time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

Lent = dict[str, Any]
"""What slots lend to later ones, by label: tensors in dataclasses, tuples, lists, mappings."""

Step = Callable[[int, Tensor, Lent], tuple[Tensor, Tensor | None]]
"""What a slot adds to the stream, and to the loss: from its index, the stream that it reads and
what is lent, which it extends by putting new values under their labels, never by changing one."""

Streams = tuple[Tensor, Tensor, Tensor | None]
"""The two streams after the last slot, (B, T, D), and what all slots add to the loss, a scalar."""


def plain_streams(step: Step, depth: int, x: Tensor) -> Streams:
    """The streams after `depth` slots in autograd's ordinary form; x (B, T, D) is both's start."""
    pair = [x, x]
    lent: Lent = {}
    losses: list[Tensor] = []
    for slot in range(depth):
        own, other = slot % 2, 1 - slot % 2
        y, loss = step(slot, pair[other], lent)
        pair[own] = pair[own] + y
        losses += [] if loss is None else [loss]
    return pair[0], pair[1], torch.stack(losses).sum() if losses else None


def reversible_streams(step: Step, parts: Sequence[Sequence[nn.Module]], x: Tensor) -> Streams:
    """As `plain_streams`, without keeping activations; `parts` are the modules of every slot.

    `step` must give the same for the same input: nothing random happens in it.
    """
    parameters = _parameters(part for row in parts for part in row)
    one, two, loss = _Reversible.apply(step, parts, x, *parameters)  # type: ignore[no-untyped-call]
    return one, two, loss


class _Reversible(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, step: Step, parts: Sequence[Sequence[nn.Module]], x: Tensor, *parameters: Tensor
    ) -> Streams:
        pair = [x, x.clone()]
        lent: Lent = {}
        # Every value that was ever lent, and its index by label as each slot found it.
        values: list[Any] = []
        found: list[dict[str, int]] = [{}]
        losses: list[Tensor] = []
        for slot in range(len(parts)):
            own, other = slot % 2, 1 - slot % 2
            before = dict(lent)
            y, loss = step(slot, pair[other], lent)
            pair[own] = pair[own] + y
            losses += [] if loss is None else [loss]
            now = dict(found[-1])
            for label, value in lent.items():
                if label not in before or before[label] is not value:
                    now[label] = len(values)
                    values.append(_with_tensors(value, map(_compact, tensors_in(value))))
            found.append(now)
        ctx.step, ctx.parts, ctx.values, ctx.found = step, parts, values, found
        ctx.parameters = parameters
        device = x.device.type
        ctx.autocast = (
            device,
            torch.get_autocast_dtype(device),
            torch.is_autocast_enabled(device),
        )
        ctx.save_for_backward(*pair, *(t for value in values for t in tensors_in(value)))
        return pair[0], pair[1], torch.stack(losses).sum() if losses else None

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        pair, kept = list(ctx.saved_tensors[:2]), iter(ctx.saved_tensors[2:])
        grads, loss_grad = list(gradients[:2]), gradients[2]
        tensors = [[next(kept) for _ in tensors_in(value)] for value in ctx.values]
        value_grads: list[list[Tensor | None]] = [[None] * len(row) for row in tensors]
        wanted = {id(p): k for k, p in enumerate(ctx.parameters)}
        parameter_grads: list[Tensor | None] = [None] * len(ctx.parameters)
        device, dtype, enabled = ctx.autocast
        for slot in reversed(range(len(ctx.parts))):
            own, other = slot % 2, 1 - slot % 2
            x = pair[other].detach().requires_grad_()
            places: list[tuple[list[Tensor | None], int]] = []
            leaves: list[Tensor] = []
            lent: Lent = {}
            for label, number in ctx.found[slot].items():
                copies = [t.detach() for t in tensors[number]]
                for k, copy in enumerate(copies):
                    if copy.is_floating_point():
                        leaves.append(copy.requires_grad_())
                        places.append((value_grads[number], k))
                lent[label] = _with_tensors(ctx.values[number], iter(copies))
            held = _Buffers(ctx.parts[slot])
            with torch.enable_grad(), torch.autocast(device, dtype=dtype, enabled=enabled):
                y, loss = ctx.step(slot, x, lent)
            outputs, output_grads = [y], [grads[own].to(y.dtype)]
            if loss is not None and loss.requires_grad:
                outputs.append(loss)
                output_grads.append(loss_grad.to(loss.dtype))
            for label, number in ctx.found[slot + 1].items():
                if ctx.found[slot].get(label) != number:
                    for t, grad in zip(tensors_in(lent[label]), value_grads[number], strict=True):
                        if grad is not None and t.requires_grad:
                            outputs.append(t)
                            output_grads.append(grad)
            trained = _parameters(ctx.parts[slot])
            got = torch.autograd.grad(
                outputs, [x, *trained, *leaves], output_grads, allow_unused=True
            )
            held.restore()
            pair[own] = pair[own] - y.detach()
            if got[0] is not None:
                grads[other] = grads[other] + got[0]
            places = [(parameter_grads, wanted[id(p)]) for p in trained] + places
            for (row, k), grad in zip(places, got[1:], strict=True):
                if grad is not None:
                    earlier = row[k]
                    row[k] = grad if earlier is None else earlier + grad
        return (None, None, grads[0] + grads[1], *parameter_grads)


class _Buffers:
    """The buffers of modules before a call, so that a second call leaves them as the first did."""

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        buffers = [b for part in parts for b in part.buffers()]
        self.held = [(b, b._version, b.clone()) for b in buffers]

    @torch.no_grad()
    def restore(self) -> None:
        for buffer, version, value in self.held:
            if buffer._version != version:
                buffer.copy_(value)


def _parameters(parts: Iterator[nn.Module] | Sequence[nn.Module]) -> list[nn.Parameter]:
    """The trained parameters of modules, each once, in order."""
    found = {id(p): p for part in parts for p in part.parameters() if p.requires_grad}
    return list(found.values())


def _compact(tensor: Tensor) -> Tensor:
    """The tensor without the rest of the storage that it is a part of."""
    return tensor if tensor.untyped_storage().nbytes() <= tensor.nbytes else tensor.clone()


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors of nested dataclasses, tuples, lists and mappings, in order."""
    if isinstance(value, Tensor):
        return [value]
    if is_dataclass(value) and not isinstance(value, type):
        value = [getattr(value, field.name) for field in fields(value)]
    elif isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, tuple | list):
        return [t for part in value for t in tensors_in(part)]
    return []


def _with_tensors(value: Any, tensors: Iterator[Tensor]) -> Any:
    """The same value with other tensors, in the order of `tensors_in`."""
    if isinstance(value, Tensor):
        return next(tensors)
    if is_dataclass(value) and not isinstance(value, type):
        named = {f.name: _with_tensors(getattr(value, f.name), tensors) for f in fields(value)}
        return replace(value, **named)
    if isinstance(value, Mapping):
        return {key: _with_tensors(part, tensors) for key, part in value.items()}
    if isinstance(value, tuple | list):
        made = [_with_tensors(part, tensors) for part in value]
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*made)
        return type(value)(made)
    return value
