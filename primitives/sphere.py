"""The unit sphere of nGPT (Loshchilov et al., arXiv 2410.01131): vectors, scalings, weights.

In a backbone with `residual=ngpt` every vector along the embedding dimension has length 1: hidden
states, rows of the tables, and the rows or columns of the linear maps that read from or write to
the residual stream. Which maps those are is found by looking at one call of the operator, so that
an operator need not know of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


def unit(x: Tensor, dim: int = -1) -> Tensor:
    """x at length 1 along an axis; a vector of zeros stays."""
    return F.normalize(x, dim=dim)


class Scale(nn.Module):
    """Learned scalings s of some shape that begin at `init`.

    They are kept as a vector that begins at `scale`, and s is that times init / scale: with Adam,
    whose steps do not depend on the size of what they change, `scale` sets how fast s learns
    (arXiv 2410.01131, section 2.5).
    """

    def __init__(self, shape: int | tuple[int, ...], init: float, scale: float) -> None:
        super().__init__()
        self.shape = (shape,) if isinstance(shape, int) else shape
        self.factor = init / scale
        # One axis whatever the shape: it is a vector to the optimiser, which decays matrices.
        self.value = nn.Parameter(torch.full((math.prod(self.shape),), scale))

    def forward(self) -> Tensor:
        return (self.value * self.factor).view(self.shape)


class _Linears(TorchFunctionMode):
    """Every product with a weight of a module, as (weight, its input's node, its output's node)."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Tensor, Any, Any]] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        y = func(*args, **(kwargs or {}))
        if func is F.linear and len(args) > 1 and y.grad_fn is not None:
            x, weight = args[:2]
            # Part of the rows of a weight stands for the whole of it.
            base = weight if weight._base is None else weight._base
            whole_rows = weight.ndim == base.ndim == 2 and base.shape[1] == weight.shape[1]
            if isinstance(base, nn.Parameter) and whole_rows:
                self.calls.append((base, x.grad_fn, y.grad_fn))
        return y


def stream_maps(module: nn.Module, call: Callable[[Tensor], Tensor], width: int) -> dict[str, int]:
    """The weights of a module that read from or write to the residual stream.

    By name, with the axis that lies along the stream: of a weight (out, in) axis 1 where its input
    comes from the stream through no other linear map (and is `width` wide), axis 0 where its output
    reaches the module's output through none. `call` runs the module on x (1, 4, D) in eval mode.
    Only `F.linear` and `nn.Linear` are seen; a module with weights of another shape names them in a
    method `stream_weights()` of the same result.
    """
    names = {parameter: name for name, parameter in module.named_parameters()}
    found: dict[str, int] = {}
    for prefix, part in module.named_modules():
        own = getattr(part, "stream_weights", None)
        if own is not None:
            found |= {f"{prefix}.{k}" if prefix else k: dim for k, dim in own().items()}
    # The look at a call must not depend on the caller's mode, nor on its random numbers.
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode(False), torch.enable_grad():
        x = torch.randn(1, 4, width, generator=generator).requires_grad_().clone()
        with _Linears() as seen:
            y = call(x)
    blocked = {node for *_, node in seen.calls}
    written = _reached(y.grad_fn, blocked)
    for weight, source, _ in seen.calls:
        if weight.shape[1] == width and x.grad_fn in _reached(source, blocked):
            found.setdefault(names[weight], 1)
    for weight, _, node in seen.calls:
        if weight.shape[0] == width and node in written:
            found.setdefault(names[weight], 0)
    return found


def _reached(start: Any, blocked: set[Any]) -> set[Any]:
    """The nodes that lead to `start`, itself included, without going through a blocked one."""
    seen: set[Any] = set()
    left = [start]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node not in blocked:
            left += [before for before, _ in node.next_functions]
    return seen


@torch.no_grad()
def to_sphere(weights: Mapping[Tensor, int]) -> None:
    """Set vectors along an axis of each weight to length 1, in place."""
    for weight, dim in weights.items():
        weight.copy_(unit(weight, dim))
