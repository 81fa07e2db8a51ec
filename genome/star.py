"""STAR's integers: five per LIV, LIVs joined by `-`, as in `21211-31112` (arXiv 2411.17800).

The five are the class, the group and the strategy of featurizer sharing (1 none, 2 all weights),
and the group and the strategy of feature-group sharing (1 none, 2 keys and values). A group with
strategy 1 means nothing; it is written as 1. STAR's classes 10 to 17 and larger groups need more
than one digit, which the published form cannot tell apart: such a LIV is written with dots,
`10.1.1.1.1`, and both forms are read.

What the paper leaves open, and what is taken here:
- SA-3 and SA-4 are grouped-query and multi-query attention. The paper's text reads as if SA-3 were
  the grouped one; notes on it say the opposite. Here SA-3 is grouped, SA-4 multi-query.
- The taps of SA-2's convolution are not given. Here 3, as in GConv-1.
- The numbers of heads are not in the integers: they are those of the named points.
- STAR's recurrences are input-varying with a state of 16 and 2. Here Mamba-2 with such key widths.
- Width, norm and residuals are fixed in STAR: the width is the reader's, the rest the defaults.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..primitives.base import show_gene
from .genome import Genome, Op, Slot
from .header import DEFAULT_WIDTH, HEADER, MAX_SLOTS, TOKENS, header_of
from .notation import show_op
from .resolve import genes_of, groups, letters, primitive_of, relabel

NONE, ALL = 1, 2
"""The sharing strategies that this version has."""


class StarError(ValueError):
    """Integers that are no genome, or a genome outside STAR's alphabet: one line."""


@dataclass(frozen=True)
class StarClass:
    """A class of STAR's alphabet; `op` is None where this version has no such operator."""

    name: str
    op: Op | None
    missing: str = ""


_BASE: dict[int, StarClass] = {
    1: StarClass("SA-1", Op("mha")),
    2: StarClass("SA-2", Op("mha", (("conv", 3),))),
    3: StarClass("SA-3", Op("gqa")),
    4: StarClass("SA-4", Op("mqa")),
    5: StarClass("Rec-1", Op("mamba2", (("key_dim", 16),))),
    6: StarClass("Rec-2", Op("mamba2", (("key_dim", 2),))),
    7: StarClass("GConv-1", Op("lfm2-conv")),
    8: StarClass("GConv-2", None, "a gated long convolution with an implicit filter"),
    9: StarClass("GMemless", Op("swiglu")),
}
_DIFFERENCE = "the difference of two parallel copies"
CLASSES: Mapping[int, StarClass] = _BASE | {
    number + 9: StarClass(f"{_BASE[number].name}-Diff", None, _DIFFERENCE) for number in range(1, 9)
}
"""The 17 classes by their number."""


def read(text: str, *, width: int = DEFAULT_WIDTH) -> Genome:
    """The genome that STAR's integers describe, at a width.

    Raises StarError. Whether what is shared can be shared, `rules.violations` says.
    """
    livs = [part.strip() for part in text.strip().split("-")]
    if len(livs) > MAX_SLOTS:
        raise StarError(f"{len(livs)} LIVs; a genome has at most {MAX_SLOTS} slots")
    slots = [Slot((_read_liv(liv, i),)) for i, liv in enumerate(livs)]
    return relabel(Genome(width, tuple(slots)))


def write(genome: Genome) -> str:
    """STAR's integers of a genome in STAR's alphabet; `read` gives the genome again.

    The width and the alphabet's size are not in them; points may come back under other names.
    Raises StarError, which names what STAR cannot say.
    """
    for axis, value in zip(HEADER, header_of(genome).values(), strict=True):
        if axis.name not in ("width", "vocab") and value != axis.default:
            raise StarError(f"STAR's integers cannot say {axis.name}={value}")
    numbers = {
        (kind, label): number
        for kind in ("weights", "features")
        for number, label in enumerate(groups(genome, kind), start=1)
    }
    livs = []
    for i, slot in enumerate(genome.slots):
        if len(slot.branches) != 1:
            raise StarError(f"slot {i}: STAR's integers cannot say parallel operators")
        if slot.tokens != TOKENS.default:
            raise StarError(f"slot {i}: STAR's integers cannot say tokens={show_gene(slot.tokens)}")
        op = slot.branches[0]
        five = [_class_of(op, i)]
        for kind, label in (("weights", op.weights), ("features", op.features)):
            five += [1, NONE] if label is None else [numbers[kind, label], ALL]
        livs.append(("" if max(five) < 10 else ".").join(map(str, five)))
    return "-".join(livs)


def _class_of(op: Op, slot: int) -> int:
    for number, known in CLASSES.items():
        if (
            known.op is not None
            and primitive_of(known.op) is primitive_of(op)
            and genes_of(known.op) == genes_of(op)
        ):
            return number
    alphabet = ", ".join(show_op(known.op) for known in CLASSES.values() if known.op is not None)
    raise StarError(
        f"slot {slot}: {show_op(Op(op.name, op.genes))} is not in STAR's alphabet, which has "
        f"{alphabet}"
    )


def _read_liv(text: str, index: int) -> Op:
    parts = text.split(".") if "." in text else list(text)
    if len(parts) != 5 or not all(part.isascii() and part.isdigit() for part in parts):
        raise StarError(
            f"LIV {index}: five integers, such as 21211 or 10.1.1.1.1, are expected, not {text!r}"
        )
    if any(len(part) > 6 for part in parts):
        raise StarError(f"LIV {index}: an integer of {text!r} is too large")
    number, weights_group, weights_strategy, group, strategy = map(int, parts)
    if number not in CLASSES:
        raise StarError(f"LIV {index}: STAR's classes are 1 to {len(CLASSES)}, not {number}")
    known = CLASSES[number]
    if known.op is None:
        raise StarError(
            f"LIV {index}: this version has no operator for class {number} ({known.name}), "
            f"{known.missing}"
        )
    labels: dict[str, str] = {}
    stated = {"weights": (weights_group, weights_strategy), "features": (group, strategy)}
    for kind, (label, chosen) in stated.items():
        if chosen not in (NONE, ALL):
            raise StarError(
                f"LIV {index}: the strategies of sharing {kind} are 1 (none) and 2 (all), "
                f"not {chosen}"
            )
        if chosen == ALL:
            labels[kind] = letters(label)
    if "features" in labels and not primitive_of(known.op).lends:
        raise StarError(
            f"LIV {index}: this version shares no features of class {number} ({known.name})"
        )
    return Op(known.op.name, known.op.genes, labels.get("weights"), labels.get("features"))
