"""A genome at a size: its pattern repeated or stretched, its width set, to so many parameters.

`scale` looks at every width of a ladder and every depth of the genome's pattern (`motif.py`),
counts what they have without making a tensor, and takes what comes nearest to the parameters and to
the aspect (`aspect.py`) together.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from ..primitives.base import Gene, show_gene
from . import presets
from .aspect import aspect_of, usual_aspect
from .cost import cost
from .genome import Genome
from .header import HEADER
from .motif import Pattern, pattern_of
from .notation import parse
from .rules import require_valid, violations
from .widen import changed_genes, widen

BOUND = 0.05
"""How far from the parameters that were asked for a result may be, as a share of them."""

ASPECT_WEIGHT = 0.1
"""A tenth more or less of the aspect counts as a hundredth more or less of the parameters."""

CUT_WEIGHT = 0.02
"""A motif that is cut counts as two hundredths more or less of the parameters."""

GROWN = 1e8
"""Active parameters from which on a genome's own aspect is a choice that scaling keeps."""

SAMPLE_WIDTH = 256
"""The width at which the four heads of a preset's attention have 64 channels."""

MUCH, FAR = 0.3, 2.0
"""A share of the parameters in the tables, and a factor of the aspect, that are worth a word."""

NEAR = 16
"""Widths of the ladder on either side of the best that are looked at."""


class ScaleError(ValueError):
    """A size that a genome cannot have: one line."""


@dataclass(frozen=True)
class Wish:
    """The size that is asked for; see `scale`."""

    params: float
    active: bool = False
    aspect: float | None = None
    width: int | None = None
    depth: int | None = None
    repeat: bool | None = None
    bound: float = BOUND

    def check(self) -> None:
        """Raises ScaleError for what no genome could have."""
        if not (math.isfinite(self.params) and self.params >= 1):
            raise ScaleError(f"a model has at least 1 parameter, not {self.params:g}")
        if self.aspect is not None and not (math.isfinite(self.aspect) and self.aspect > 0):
            raise ScaleError(f"the aspect is a number above 0, not {self.aspect:g}")
        if self.width is not None and self.depth is not None:
            raise ScaleError("width and depth together leave nothing to choose; pin one of them")


@dataclass(frozen=True)
class Scaled:
    """A genome at a size, and how it came about."""

    genome: Genome
    params: int
    active_params: int
    deviation: float
    """Of the parameters that were asked for (all or the active ones), as a share of them."""
    aspect: float
    """Width over layers of two slots."""
    usual_aspect: float
    """That of published models with as many active parameters."""
    done: tuple[str, ...]
    """What was done, one statement each."""


def ladder(most: int) -> list[int]:
    """The widths that are looked at, rising: multiples of 64, above 1024 of 128, above 8192 of 256,
    as most published widths are."""
    return [w for w in range(64, most + 1, 64) if w <= 1024 or w % (128 if w <= 8192 else 256) == 0]


@dataclass(frozen=True)
class _Shape:
    """A width and a number of the pattern, with what it has."""

    width: int
    count: int
    params: int
    active: int
    score: float = math.inf


class _Search:
    """A genome, what is asked of it, and what is known of each width."""

    def __init__(self, genome: Genome, wish: Wish) -> None:
        self.genome, self.wish = genome, wish
        self.pattern: Pattern = pattern_of(genome, wish.repeat)
        self.widths = _widths(genome, wish)
        self.counts = _counts(self.pattern, wish.depth)
        whole = [n for n in self.counts if self.pattern.whole(n)]
        self.ways = (whole, [n for n in self.counts if not self.pattern.whole(n)])
        self.depths = [self.pattern.depth(n) for n in self.counts]
        self.known: dict[int, list[_Shape]] = {}
        self.sources: dict[int, list[int]] = {}

    @cached_property
    def taste(self) -> float:
        """The genome's own aspect over that of published models; 1 below `GROWN`."""
        active = cost(self.genome, context=1).total.active_params
        return aspect_of(self.genome) / usual_aspect(active) if active >= GROWN else 1.0

    def size(self, shape: _Shape) -> int:
        return shape.active if self.wish.active else shape.params

    def aspect(self, active: int) -> float:
        """The wanted aspect of a genome with so many active parameters."""
        return self.wish.aspect or usual_aspect(active) * self.taste

    def lean(self, shape: _Shape) -> float:
        """The logarithm of the aspect over the wanted one."""
        own = 2 * shape.width / self.pattern.depth(shape.count)
        return math.log(own / self.aspect(shape.active))

    def at(self, width: int) -> list[_Shape]:
        """The shapes of a width on both sides of the wanted size; empty where heads do not fit."""
        if width not in self.known:
            self.known[width] = self._at(width)
        return self.known[width]

    def _at(self, width: int) -> list[_Shape]:
        wide = widen(self.genome, width)
        if wide is None:
            return []
        counted = cost(self.pattern.make(wide, self.pattern.sample), context=1)
        ends = counted.embedding + counted.head

        def shape(count: int) -> _Shape:
            if count not in self.sources:
                self.sources[count] = self.pattern.sources(count)
            slots = [counted.slots[i] for i in self.sources[count]]
            params = ends.params + sum(part.params for part in slots)
            active = ends.active_params + sum(part.active_params for part in slots)
            return _Shape(width, count, params, active)

        found = []
        for counts in self.ways:
            over = bisect.bisect(counts, self.wish.params, key=lambda n: self.size(shape(n)))
            # Sizes rise with the depth but for blocks of unlike length and cost.
            found += [shape(n) for n in counts[max(0, over - 2) : over + 2]]
        if found:
            # Where repeats share their weights, the depth is left to the aspect.
            depth = 2 * width / self.aspect(found[0].active)
            near = bisect.bisect(self.depths, depth)
            numbers = {each.count for each in found}
            more = self.counts[max(0, near - 1) : near + 1]
            found += [shape(n) for n in more if n not in numbers]
        return [replace(each, score=self.score(each)) for each in found]

    def score(self, shape: _Shape) -> float:
        """0 for exactly what is wanted."""
        miss = abs(math.log(self.size(shape) / self.wish.params))
        cut = 0.0 if self.pattern.whole(shape.count) else CUT_WEIGHT
        return miss + ASPECT_WEIGHT * abs(self.lean(shape)) + cut

    def shapes(self) -> list[_Shape]:
        """The shapes of all widths about the one where size and aspect are both as wanted."""
        low, high = 0, len(self.widths) - 1
        while low < high:
            middle = (low + high) // 2
            # Where heads do not fit the next width speaks for this one.
            near = next((s for w in self.widths[middle : high + 1] if (s := self.at(w))), None)
            if near is not None and self._too_narrow(near):
                low = middle + 1
            else:
                high = middle
        about = {*self.widths[max(0, low - NEAR) : low + NEAR + 1]}
        if self.genome.width in self.widths:
            about.add(self.genome.width)
        found = [shape for width in sorted(about) for shape in self.at(width)]
        return sorted(found, key=lambda s: (s.score, s.width))

    def _too_narrow(self, shapes: Sequence[_Shape]) -> bool:
        """Whether these shapes of a width call for a wider one: by their size where no depth brings
        it to what is wanted, else by the aspect."""
        sizes = [self.size(shape) for shape in shapes]
        if max(sizes) < self.wish.params:
            return True
        return min(sizes) <= self.wish.params and self.lean(shapes[0]) < 0

    def made(self, shape: _Shape) -> Genome | None:
        """The genome of a shape; None where it breaks a rule."""
        if (shape.width, shape.count) == (self.genome.width, self.pattern.own):
            return self.genome
        wide = widen(self.genome, shape.width)
        if wide is None:
            return None
        made = self.pattern.make(wide, shape.count)
        return None if violations(made) else made

    def done(self, made: Genome, count: int, fresh: bool) -> list[str]:
        """What was done to get there; with `fresh` there was no genome of a size before."""
        before = self.genome
        lines = [self.pattern.said(count, fresh)]
        if made.width == before.width:
            return [*lines, f"the width stays {made.width}"]
        lines.append(f"width {made.width}" if fresh else f"width {before.width} -> {made.width}")
        wide = widen(before, made.width)
        assert wide is not None
        seen: dict[str, None] = {}
        for (*_, old), (*_, new) in zip(before.ops(), wide.ops(), strict=True):
            changes = [
                f"{name} {show_gene(was)} -> {show_gene(now)}"
                for name, (was, now) in changed_genes(old, new).items()
            ]
            if changes:
                seen[f"{old.name}: {', '.join(changes)}"] = None
        return [*lines, *seen]

    def refusal(self, shapes: Sequence[_Shape]) -> str:
        """Why there is no such genome, and the nearest that there is."""
        wish = self.wish
        nearest = min(shapes, key=lambda s: abs(math.log(self.size(s) / wish.params)))
        what = "active parameters" if wish.active else "parameters"
        pinned = " as pinned" if wish.width is not None or wish.depth is not None else ""
        size = self.size(nearest)
        narrow = wish.width is None and nearest.width == self.widths[0] and size > wish.params
        more = f"; narrower than {nearest.width} is a width only where it is pinned"
        return (
            f"no width and depth{pinned} come within {wish.bound:.0%} of {_count(wish.params)} "
            f"{what}; the nearest has {size:,} (width {nearest.width}, "
            f"{self.pattern.depth(nearest.count)} slots){more if narrow else ''}"
        )


def scale(
    genome: Genome,
    params: float,
    *,
    active: bool = False,
    aspect: float | None = None,
    width: int | None = None,
    depth: int | None = None,
    repeat: bool | None = None,
    bound: float = BOUND,
) -> Scaled:
    """The genome with so many parameters, all of them or with `active` those that a token uses.

    `aspect` is the wanted width over layers of two slots (published models' where it is None);
    `width` and `depth` (slots) pin one of the two. `repeat` is for a genome without a motif: it is
    repeated whole, or with False stretched (None: see `pattern_of`). Raises ScaleError where no
    width and depth come within `bound` of the size, InvalidGenome where the genome is none.
    """
    return _scale(genome, Wish(params, active, aspect, width, depth, repeat, bound), fresh=False)


def scale_preset(
    name: str,
    params: float,
    *,
    vocab: int | None = None,
    active: bool = False,
    aspect: float | None = None,
    width: int | None = None,
    depth: int | None = None,
    bound: float = BOUND,
) -> Scaled:
    """A preset with so many parameters; see `scale`.

    It has the preset's motif, or the small one where the width comes out below what that is for.
    Raises ScaleError, and PresetError for an unknown name.
    """
    preset = presets.describe(name)
    header = {**preset.header, "width": SAMPLE_WIDTH}
    if vocab is not None:
        header["vocab"] = vocab
    wish = Wish(params, active, aspect, width, depth, bound=bound)
    if preset.small is None:
        return _scale(_twice(preset.motif, header), wish, fresh=True)
    below = preset.small["below"]
    refused: ScaleError | None = None
    try:
        whole = _scale(_twice(preset.motif, header), wish, fresh=True)
    except ScaleError as error:
        refused = error
    else:
        if whole.genome.width >= below:
            return whole
    small = _scale(_twice(str(preset.small["motif"]), header), wish, fresh=True)
    if refused is not None and small.genome.width >= below:
        raise refused
    return small


def _twice(motif: str, header: dict[str, Gene]) -> Genome:
    slots = parse(motif).slots
    return presets.repeated(slots, header, 2 * len(slots))


def _scale(genome: Genome, wish: Wish, *, fresh: bool) -> Scaled:
    require_valid(genome)
    wish.check()
    search = _Search(genome, wish)
    shapes = search.shapes()
    if not shapes:
        where = "any width" if wish.width is None else f"a width of {wish.width}"
        raise ScaleError(f"an operator has no heads that divide {where}")
    for shape in shapes:
        if abs(search.size(shape) / wish.params - 1) > wish.bound:
            continue
        made = search.made(shape)
        if made is None:
            continue
        total = cost(made, context=1).total
        deviation = (total.active_params if wish.active else total.params) / wish.params - 1
        if abs(deviation) <= wish.bound:
            usual = usual_aspect(total.active_params)
            done = (*search.done(made, shape.count, fresh), *_warnings(made, usual, wish))
            return Scaled(
                made, total.params, total.active_params, deviation, aspect_of(made), usual, done
            )
    raise ScaleError(search.refusal(shapes))


def _warnings(made: Genome, usual: float, wish: Wish) -> list[str]:
    """What a person would want to know of the result."""
    found = []
    total = cost(made, context=1).total.params
    tables = made.vocab * made.width * (1 if made.tied else 2)
    if tables > MUCH * total:
        found.append(
            f"the vocabulary of {made.vocab:,} takes {tables / total:.0%} of the parameters"
        )
    ratio = aspect_of(made) / usual
    free = wish.aspect is None and wish.width is None and wish.depth is None
    if free and total >= GROWN and not 1 / FAR <= ratio <= FAR:
        found.append(
            f"width over layers is {aspect_of(made):.0f}, that of published models of this size "
            f"{usual:.0f}"
        )
    return found


def _count(params: float) -> str:
    """All digits of a number that could be had; of others those that were given."""
    return f"{params:,.0f}" if params < 1e15 else f"{params:g}"


def _widths(genome: Genome, wish: Wish) -> list[int]:
    if wish.width is not None:
        next(axis for axis in HEADER if axis.name == "width").check(wish.width)
        return [wish.width]
    # No backbone has fewer parameters than a square map of an eighth of its width.
    most = min(65536, max(1024, 8 * math.isqrt(int(wish.params))))
    return sorted({*ladder(most), genome.width})


def _counts(pattern: Pattern, depth: int | None) -> list[int]:
    counts = pattern.counts()
    if depth is None:
        return counts
    fit = [n for n in counts if pattern.depth(n) == depth]
    if fit:
        return fit
    depths = sorted({pattern.depth(n) for n in counts}, key=lambda d: (abs(d - depth), d))[:2]
    near = " or ".join(str(d) for d in sorted(depths))
    raise ScaleError(f"the pattern of the genome gives no depth of {depth} slots; nearest: {near}")
