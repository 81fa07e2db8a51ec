"""How a slot reads the residual stream and how its output joins it: norms, scalings, nGPT.

`embedding_norm` (BLOOM, arXiv 2211.05100, 3.1; RWKV, 2305.13048) puts one more norm after the
embedding; without norms, and in nGPT, it has no effect.

`norm` and `placement` with x the stream and f the slot's operators: pre (2002.04745) x +
f(norm(x)), post (1706.03762) norm(x + f(x)), sandwich (2105.13290) x + norm(f(norm(x))). With
`norm=none` the placement has no effect.

In a chain (`join=chain`) f's later branches read norm(x + y_before), with y_before the output of
the branch before, neither normed nor scaled; in nGPT unit(x + unit(y_before)).

`residual`, where y is what the forms above add:

- plain: x + y.
- layerscale (Touvron et al., CaiT, arXiv 2103.17239): x + diag(l) y. l begins at 0.1 up to 18
  blocks, 1e-5 up to 24, 1e-6 beyond; a block is a pair of slots, attention and MLP there.
- rezero (Bachlechner et al., arXiv 2003.04887): x + a y with a scalar a that begins at 0. So in the
  first step only a and the tables have a gradient that is not 0, and the operators begin to learn
  in the second. The paper has no norm (`norm=none`) and one scalar for attention and MLP of a
  block; here every slot has its own, because slots need not come in pairs.
- reversible: two streams, see `reversible.py`.
- ngpt (Loshchilov et al., arXiv 2410.01131): h <- unit(h + |alpha| (unit(f(h)) - h)), everything
  along the embedding dimension of length 1, neither norm nor placement. alpha is a vector that
  begins at 0.05 with scale 1/sqrt(D). Logits are multiplied by s_z per token (1, 1/sqrt(D)). The
  model sets tables and stream maps (`primitives/sphere.py`) back to the sphere after every step.
  Operators read sqrt(D) h, so that a unit row gives values of order 1 as after an RMSNorm: the
  paper's factor sqrt(D) for the gate of its MLP, and without effect in attention and in the MLP's
  linear half, whose sizes the norms of queries, keys and outputs remove. Attention and MLP have the
  paper's s_qk, s_u and s_v; other operators, for which nothing is published, have their stream maps
  on the sphere and are otherwise as they are. The paper trains without weight decay and warm-up;
  here both are the recipe's (decay does nothing to vectors that are set back to length 1, but for
  the direction of a step).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from ..primitives.base import Config, reads_stream
from ..primitives.norm import dyt_alpha, make_norm, norm_params
from ..primitives.position import ADDED
from ..primitives.sphere import Scale, unit
from .blueprint import Part
from .genome import Genome, Slot
from .routing import Best, Depth, Gate, Router

EIGEN_RATE = 0.05
"""alpha's initial value in nGPT."""


def norms_of(genome: Genome) -> tuple[str, str]:
    """Norm and placement as far as they have an effect: `none` always with `pre`."""
    if genome.norm == "none" or genome.residual == "ngpt":
        return "none", "pre"
    return genome.norm, genome.placement


def final_norm(genome: Genome) -> str:
    """The norm before the head: none where norms stand after the addition."""
    norm, placement = norms_of(genome)
    return "none" if placement == "post" else norm


def join_of(genome: Genome, slot: Slot) -> str:
    """The join as far as it has an effect: a mean for one branch, and where there is no norm."""
    # nGPT sets the branches to length 1 whatever the norm of the header.
    bare = genome.norm == "none" and genome.residual != "ngpt"
    without = len(slot.branches) == 1 or (slot.join == "norm" and bare)
    return "mean" if without else slot.join


def router_rows(genome: Genome, slot: Slot) -> tuple[int, int]:
    """The outputs of a slot's routers: between its branches, and of the tokens that enter."""
    routed = join_of(genome, slot) in ("gate", "top1")
    return len(slot.branches) if routed else 0, int(slot.tokens != 1)


def layer_scale(slots: int) -> float:
    """LayerScale's initial value in a backbone of so many slots."""
    blocks = (slots + 1) // 2
    return 0.1 if blocks <= 18 else 1e-5 if blocks <= 24 else 1e-6


def norms_before(genome: Genome, configs: Iterable[Config]) -> bool:
    """A norm stands before a slot's operators: where an operator reads the stream through one."""
    norm, placement = norms_of(genome)
    return norm != "none" and placement != "post" and not all(map(reads_stream, configs))


def block_params(genome: Genome, slot: Slot, configs: Iterable[Config]) -> int:
    """The parameters of a slot beside its operators', counted without making them."""
    width = genome.width
    norm, placement = norms_of(genome)
    norms = int(norms_before(genome, configs)) + int(placement != "pre")
    if join_of(genome, slot) == "norm":
        norms += len(slot.branches)
    scale = {"layerscale": width, "rezero": 1, "ngpt": width}.get(genome.residual, 0)
    return norms * norm_params(norm, width) + scale + sum(router_rows(genome, slot)) * width


def head_params(genome: Genome, vocab: int) -> int:
    """The parameters before and after the head's table."""
    scale = vocab if genome.residual == "ngpt" else 0
    return norm_params(final_norm(genome), genome.width) + scale


def entry_norm(genome: Genome) -> str:
    """The norm after the embedding."""
    return norms_of(genome)[0] if genome.embedding_norm else "none"


def embedding_params(genome: Genome) -> int:
    """The parameters of the embedding beside its tables."""
    scale = 1 if norms_of(genome)[0] == "dyt" else 0
    return scale + norm_params(entry_norm(genome), genome.width)


class Entry(nn.Module):
    """From embeddings of size 1/sqrt(D) per channel to the stream.

    A norm makes their size irrelevant. Without one they are multiplied by sqrt(D), as in
    1706.03762; DyT has a learned scalar that begins there (2503.10622). nGPT's vectors have length
    1 already, if no positions were added. The norm of `embedding_norm` comes last.
    """

    def __init__(self, genome: Genome) -> None:
        super().__init__()
        sphere = genome.residual == "ngpt"
        self.position = sphere and genome.position in ADDED
        norm = norms_of(genome)[0]
        bare = norm in ("dyt", "none") and not sphere
        self.factor = genome.width**0.5 if bare else None
        self.scale = nn.Parameter(torch.ones(1) * genome.width**0.5) if norm == "dyt" else None
        self.norm = make_norm(entry_norm(genome), genome.width, dyt_alpha(genome.width, False))

    def forward(self, x: Tensor) -> Tensor:
        if self.position:
            return unit(x)
        if self.scale is not None:
            x = x * self.scale
        elif self.factor is not None:
            x = x * self.factor
        return self.norm(x)  # type: ignore[no-any-return]


class SlotBlock(nn.Module):
    """The norms of one slot, the join of its branches, its scaling and routers; not the
    operators."""

    def __init__(self, genome: Genome, slot: Slot, parts: Sequence[Part]) -> None:
        super().__init__()
        width = genome.width
        norm, self.placement = norms_of(genome)
        self.join = join_of(genome, slot)
        # DyT begins otherwise before attention; here that is before any mixer over tokens.
        mixes = any(part.mixes for part in parts)
        alpha, other = dyt_alpha(width, mixes), dyt_alpha(width, False)
        configs = [part.config for part in parts]
        before, after = norms_before(genome, configs), self.placement != "pre"
        self.bare = [reads_stream(config) for config in configs]
        self.before = make_norm(norm, width, alpha) if before else nn.Identity()
        self.after = make_norm(norm, width, other) if after else nn.Identity()
        norms = len(slot.branches) if self.join == "norm" else 0
        self.branch_norms = nn.ModuleList(make_norm(norm, width, other) for _ in range(norms))
        self.scale: nn.Parameter | None = None
        if genome.residual == "layerscale":
            self.scale = nn.Parameter(torch.full((width,), layer_scale(len(genome.slots))))
        elif genome.residual == "rezero":
            self.scale = nn.Parameter(torch.zeros(1))
        sphere = genome.residual == "ngpt"
        self.rate = Scale(width, EIGEN_RATE, width**-0.5) if sphere else None
        branches, depth = router_rows(genome, slot)
        kind = Gate if self.join == "gate" else Best
        self.gate = kind(width, branches) if branches else None
        self.depth = Depth(width, slot.tokens) if depth else None

    def read(self, x: Tensor) -> Tensor:
        """What operators without a norm of their own get of the stream."""
        read: Tensor = self.before(x) if self.rate is None else x * x.shape[-1] ** 0.5
        return read

    def enter(self, branch: int, x: Tensor, read: Tensor, made: list[Tensor]) -> Tensor:
        """What a branch gets, from the stream x, what the slot reads of it, and the outputs of the
        branches before it."""
        if self.join == "chain" and made:
            x = x + made[-1] if self.rate is None else unit(x + unit(made[-1]))
            read = x if self.bare[branch] else self.read(x)
        return x if self.bare[branch] else read

    def combine(self, x: Tensor, outputs: list[Tensor]) -> tuple[Tensor, Tensor | None]:
        """Branch outputs, each (B, T, D), to one, from what the slot read; and the factor (B, T, 1)
        of what is added to the stream, None for 1."""
        if self.gate is not None:
            return self.gate.combine(x, outputs)
        return self._fixed(outputs), None

    def _fixed(self, outputs: list[Tensor]) -> Tensor:
        if len(outputs) == 1 or self.join == "chain":
            return outputs[-1]
        if self.join == "norm" and self.rate is not None:
            outputs = [unit(y) for y in outputs]
        elif self.join == "norm":
            outputs = [norm(y) for norm, y in zip(self.branch_norms, outputs, strict=True)]
        total = torch.stack(outputs).sum(0)
        return total if self.join == "sum" else total / len(outputs)

    def added(self, y: Tensor, factor: Tensor | None = None) -> Tensor:
        """What is added to the stream, where no norm stands after the addition."""
        return self._scaled(self.after(y), factor)

    def residual(self, x: Tensor, y: Tensor, factor: Tensor | None = None) -> Tensor:
        """The stream after the slot, from the stream before it and the joined output."""
        if self.rate is not None:
            step = self.rate().abs() * (unit(y) - x)
            return unit(x + (step if factor is None else step * factor.to(step.dtype)))
        if self.placement == "post":
            return self.after(x + self._scaled(y, factor))  # type: ignore[no-any-return]
        return x + self.added(y, factor)

    def _scaled(self, y: Tensor, factor: Tensor | None) -> Tensor:
        y = y if self.scale is None else y * self.scale
        return y if factor is None else y * factor.to(y.dtype)

    def routers(self) -> dict[str, Router]:
        """The slot's routers: `depth`, and the `gate` between its branches."""
        found = {"depth": self.depth, "gate": self.gate}
        return {name: router for name, router in found.items() if router is not None}

    def balance(self) -> None:
        """Close a training step."""
        for router in self.routers().values():
            router.balance()

    def auxiliary_loss(self) -> Tensor | None:
        """What the routers add to the loss of the last training call; None for nothing."""
        asked = [router.auxiliary_loss() for router in self.routers().values()]
        losses = [loss for loss in asked if loss is not None]
        return torch.stack(losses).sum() if losses else None

    def statistics(self) -> dict[str, list[float] | float]:
        """Of the last training step: `load`, the mean weight of each branch; `passed`, the share of
        tokens whose logit is above 0, as evaluation would let through."""
        found: dict[str, list[float] | float] = {}
        if self.depth is not None:
            found["passed"] = self.depth.shares()[0]
        if self.gate is not None:
            found["load"] = self.gate.shares()
        return found
