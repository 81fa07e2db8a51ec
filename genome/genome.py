"""The genome: an immutable description of a language model's backbone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ..primitives.base import Gene, Site
from ..primitives.norm import NORMS as NORMS

GRAMMAR_VERSION = 1
"""Written into every genome file; a file of a newer version is refused with a sentence."""

POSITIONS = ("rope", "alibi", "t5", "xl", "learned", "sinusoidal", "none")
PLACEMENTS = ("pre", "post", "sandwich")
RESIDUALS = ("plain", "layerscale", "rezero", "reversible", "ngpt")
JOINS = ("mean", "sum", "norm", "gate", "top1", "chain")
BYTE_VOCAB = 256


@dataclass(frozen=True)
class Op:
    """One operator: the name of a primitive or a named point, and the genes that differ from it.

    `weights` is a label: all operators of one genome with the same label use one set of weights
    (STAR's featurizer sharing, strategy "all"), but for what an operator has of its own in every
    place (`own_params` of its config). `features` is a label too: the first operator with it lends
    the keys and values that it computes, the later ones use them and make none of their own (STAR's
    feature-group sharing; cross-layer key-value sharing, arXiv 2405.12981).
    """

    name: str
    genes: tuple[tuple[str, Gene], ...] = ()
    weights: str | None = None
    features: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "genes", tuple(sorted(self.genes)))

    def with_genes(self, **genes: Gene) -> Op:
        return replace(self, genes=tuple({**dict(self.genes), **genes}.items()))


@dataclass(frozen=True)
class Slot:
    """One residual position: norm, one operator or several in parallel, the join, the addition.

    `join` says how parallel branches become one (with one branch it has no effect): their mean,
    their sum, the mean after a norm of each branch (Hymba, arXiv 2411.13676), or what a router says
    of every token: `gate` weights the branches, `top1` takes the best one. With `chain` each branch
    reads the stream plus what the branch before it made, and the last one's output is the slot's
    (Zamba, arXiv 2405.16712). `tokens` is the share of
    the tokens that go through the slot; the others pass it by (Mixture-of-Depths, arXiv
    2404.02258). `routing.py` has the routers.
    """

    branches: tuple[Op, ...]
    join: str = "mean"
    tokens: float = 1.0


@dataclass(frozen=True)
class Genome:
    """Width, slots in order, position, norm, residual form and tying.

    `residual.py` says what norm and residual form do, `rules.py` what makes a genome valid.
    """

    width: int
    slots: tuple[Slot, ...]
    position: str = "rope"
    norm: str = "rmsnorm"
    placement: str = "pre"
    residual: str = "plain"
    tied: bool = True
    vocab: int = BYTE_VOCAB
    """The alphabet that costs are counted with; a proxy with its own alphabet replaces it."""
    embedding_norm: bool = False
    """A norm of the header's kind stands between the embedding and the first slot."""

    def ops(self) -> Iterator[tuple[int, int, Op]]:
        """(slot, branch, operator) in order."""
        for i, slot in enumerate(self.slots):
            for j, op in enumerate(slot.branches):
                yield i, j, op

    def site(self, slot: int, branch: int) -> Site:
        """Where that operator stands, and whether it borrows its key-value features."""
        op = self.slots[slot].branches[branch]
        borrows = op.features is not None and any(
            other.features == op.features and (i, j) < (slot, branch) for i, j, other in self.ops()
        )
        return self.site_at(slot, len(self.slots), borrows)

    def site_at(self, slot: int, depth: int, borrows: bool = False) -> Site:
        """A site in a backbone of that depth with this genome's header."""
        return Site(self.width, self.position, slot, depth, borrows, self.residual == "ngpt")
