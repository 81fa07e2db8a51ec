"""The grammar of a study: which genomes it allows. `space:` of a study file.

All ranges are finite lists, so that any sampler can suggest from them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NoReturn, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from ..primitives.base import Axis, Gene, GeneError, Site, show_gene
from ..primitives.catalogue import find
from ..primitives.nearest import nearest
from .constraints import Constraints
from .genome import Op
from .header import HEADER, JOIN, MAX_SLOTS, TOKENS
from .quantity import Share
from .resolve import config_of, fits, genes_of, own_genes

ANY = "any"
"""In place of an axis' list: every value that the axis searches by itself."""

MAX_BRANCHES = 8

CANDIDATES = 4096
"""Settings of one operator that are tried before it is said that none can be built."""

Ranges = dict[str, tuple[Gene, ...]]
"""The values of every axis that varies; the others keep the point's value."""


def _refuse(path: Sequence[str | int], sentence: str) -> NoReturn:
    """A pydantic error below the field that is being validated; the sentence is whole."""
    error = PydanticCustomError("space", "{sentence}", {"sentence": sentence})
    details = InitErrorDetails(type=error, loc=tuple(path), input=None)
    raise ValidationError.from_exception_data("space", [details])


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _choices(axis: Axis) -> BeforeValidator:
    """A validator: a value or a list of different values of an axis."""

    def check(value: Any) -> tuple[Gene, ...]:
        return _values(axis, value, ())

    return BeforeValidator(check)


def _values(axis: Axis, value: Any, path: tuple[str | int, ...]) -> tuple[Gene, ...]:
    given = _listed(value)
    if not given:
        _refuse(path, f"the list is empty; {axis.name} is {axis.allowed()}")
    checked: list[Gene] = []
    for i, item in enumerate(given):
        where = (*path, i) if isinstance(value, list | tuple) else path
        # YAML has no word for the notation's `none` but null, which an axis may take as a name.
        item = "none" if item is None and "none" in axis.options else item
        try:
            gene = axis.check(item)
        except GeneError as error:
            _refuse(where, str(error))
        if gene in checked:
            _refuse(where, f"{show_gene(gene)} is listed twice")
        checked.append(gene)
    return tuple(checked)


def _read_ranges(name: str, value: Any, path: tuple[str | int, ...]) -> Ranges:
    try:
        primitive, _ = find(name)
    except GeneError as error:
        _refuse(path, str(error))
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        _refuse(path, "a mapping of axes to lists of values, or {}")
    ranges: Ranges = {}
    for key, listed in value.items():
        try:
            axis = primitive.axis(key)
        except GeneError as error:
            near = nearest(str(key), [a.name for a in primitive.axes])
            _refuse((*path, str(key)), f"{error}{near}")
        if listed == ANY and ANY not in axis.options:
            ranges[key] = axis.search or axis.options or (axis.default,)
        else:
            ranges[key] = _values(axis, listed, (*path, key))
    return ranges


def _read_listed(value: Any) -> dict[str, Ranges | None]:
    """Names with their ranges, from a mapping; None for each from a list of names."""
    if isinstance(value, list | tuple):
        for i, name in enumerate(value):
            if not isinstance(name, str):
                _refuse((i,), "the name of a primitive or a named point")
            if name in value[:i]:
                _refuse((i,), f"{name} is listed twice")
            _read_ranges(name, None, (i,))
        return dict.fromkeys(value)
    if not isinstance(value, Mapping):
        _refuse((), "a mapping of names to ranges, or a list of names")
    for name in value:
        if not isinstance(name, str):
            _refuse((), f"the name of a primitive or a named point, not {name!r}")
    if not value:
        _refuse((), "is empty: name at least one primitive")
    read = {name: _read_ranges(name, ranges, (name,)) for name, ranges in value.items()}
    return {name: None if value[name] is None else ranges for name, ranges in read.items()}


def _read_operators(value: Any) -> dict[str, Ranges]:
    return {name: ranges or {} for name, ranges in _read_listed(value).items()}


Operators = Annotated[dict[str, dict[str, Any]], BeforeValidator(_read_operators)]
Listed = Annotated[dict[str, dict[str, Any] | None], BeforeValidator(_read_listed)]
_AXES = {axis.name: axis for axis in (*HEADER, JOIN, TOKENS)}


def _depths(value: Any) -> tuple[int, int]:
    given = _listed(value)
    if len(given) == 1:
        given = given * 2
    if len(given) != 2 or not all(isinstance(d, int) and not isinstance(d, bool) for d in given):
        raise ValueError("a whole number, or [least, most]")
    least, most = given
    if not 1 <= least <= most <= MAX_SLOTS:
        raise ValueError(f"least and most are from 1 to {MAX_SLOTS}, and least is not above most")
    return least, most


def _places(value: Any) -> tuple[int, ...] | None:
    if value is None:
        return None
    given = _listed(value)
    if not given or not all(isinstance(i, int) and not isinstance(i, bool) for i in given):
        raise ValueError("the number of a slot (from 0; -1 is the last), or a list of them")
    return tuple(given)


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SlotRule(_Part):
    """The operators of some slots: those `at` places, or `every` so many from `offset` on.

    A name in a list keeps the ranges that `space.operators` gives it; a mapping gives them anew.
    """

    at: Annotated[tuple[int, ...] | None, BeforeValidator(_places)] = None
    every: Annotated[int, Field(ge=1, le=MAX_SLOTS, strict=True)] | None = None
    offset: Annotated[int, Field(ge=0, lt=MAX_SLOTS, strict=True)] = 0
    operators: Listed

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.at is None) == (self.every is None):
            _refuse((), "a slot rule has either at or every")
        if self.every is None and self.offset:
            _refuse(("offset",), "goes with every")
        if self.every is not None and self.offset >= self.every:
            _refuse(("offset",), f"is below every ({self.every})")
        return self

    def place(self, index: int, depth: int) -> str | None:
        """The name of the slot as this rule counts it, None where the rule does not match."""
        if self.every is not None:
            return f"slot{index}" if index % self.every == self.offset else None
        assert self.at is not None
        if index in self.at:
            return f"slot{index}"
        return f"slot{index - depth}" if index - depth in self.at else None


class Parallel(_Part):
    """Up to `branches` mixers in a slot; `share` is the chance that a mixer slot is parallel."""

    branches: Annotated[int, Field(ge=1, le=MAX_BRANCHES, strict=True)] = 2
    share: Share = 0.25


class Sharing(_Part):
    """Whether operators may share weights, and key-value features."""

    weights: Annotated[bool, Field(strict=True)] = False
    features: Annotated[bool, Field(strict=True)] = False


@dataclass(frozen=True)
class SlotSpace:
    """What one slot of a genome of one depth may hold."""

    label: str
    """`slot3`, or `slot-1` where a rule counts from the end: equal labels, equal choices."""
    operators: Mapping[str, Ranges]
    names: tuple[str, ...]
    mixers: tuple[str, ...]

    def allows(self, op: Op) -> bool:
        """Whether the operator's name and genes are in the ranges."""
        ranges = self.operators.get(op.name)
        if ranges is None:
            return False
        if not op.genes and not ranges:
            return True
        genes, own = genes_of(op), own_genes(op.name)
        return all(
            value in ranges[axis] if axis in ranges else value == own[axis]
            for axis, value in genes.items()
        )


class Space(_Part):
    """A study's `space:`. Raises pydantic's ValidationError; `space_check.read_space` says it in
    one line."""

    width: Annotated[tuple[int, ...], _choices(_AXES["width"])] = (64,)
    depth: Annotated[tuple[int, int], BeforeValidator(_depths)] = (4, 8)
    position: Annotated[tuple[str, ...], _choices(_AXES["position"])] = ("rope",)
    norm: Annotated[tuple[str, ...], _choices(_AXES["norm"])] = ("rmsnorm",)
    placement: Annotated[tuple[str, ...], _choices(_AXES["placement"])] = ("pre",)
    residual: Annotated[tuple[str, ...], _choices(_AXES["residual"])] = ("plain",)
    embedding_norm: Annotated[tuple[bool, ...], _choices(_AXES["embedding_norm"])] = (False,)
    tied: Annotated[tuple[bool, ...], _choices(_AXES["tied"])] = (True,)
    vocab: Annotated[tuple[int, ...], _choices(_AXES["vocab"])] = (256,)
    join: Annotated[tuple[str, ...], _choices(_AXES["join"])] = ("mean",)
    tokens: Annotated[tuple[float, ...], _choices(_AXES["tokens"])] = (1.0,)
    """The shares of the tokens that a slot may take."""
    operators: Operators
    pattern: Literal["alternate", "free"] = "alternate"
    slots: tuple[SlotRule, ...] = ()
    parallel: Parallel = Parallel(branches=1, share=0.0)
    sharing: Sharing = Sharing()
    constraints: Constraints = Constraints()

    _slots: dict[int, tuple[SlotSpace, ...]] = PrivateAttr(default_factory=dict)

    @model_validator(mode="after")
    def _check(self) -> Self:
        self._check_rules()
        reversible = self.residual == ("reversible",) and self.placement == ("post",)
        if reversible and "none" not in self.norm:
            _refuse(
                ("residual",),
                "reversible undoes each slot's addition, which a norm after it does not let: "
                "give placement pre or sandwich, or another residual, too",
            )
        forms = dict.fromkeys(r == "ngpt" for r in self.residual)
        sites = [
            Site(w, p, normalised=form)
            for w, p, form in itertools.product(self.width, self.position, forms)
        ]
        seen: set[tuple[str, ...]] = set()
        for depth in range(self.depth[0], self.depth[1] + 1):
            slots = self._slots[depth] = tuple(self._slot(i, depth) for i in range(depth))
            for i, slot in enumerate(slots):
                if slot.names in seen:
                    continue
                seen.add(slot.names)
                self._check_slot(i, slot, sites)
            for site in sites:
                if not any(first_buildable(slot.mixers, slot.operators, site) for slot in slots):
                    _refuse(
                        ("operators",),
                        f"a genome needs a mixer, and at depth {depth} no slot takes one that can "
                        f"be built at width {site.width}",
                    )
        for name, ranges in self.operators.items():
            self._check_buildable(("operators", name), name, ranges, sites)
        for i, rule in enumerate(self.slots):
            for name, own in rule.operators.items():
                ranges = self.operators.get(name, {}) if own is None else own
                self._check_buildable(("slots", i, "operators", name), name, ranges, sites)
        return self

    def _check_rules(self) -> None:
        most = self.depth[1]
        for i, rule in enumerate(self.slots):
            for place in rule.at or ():
                if not -most <= place < most:
                    _refuse(("slots", i, "at"), f"there is no slot {place} at depth {most}")

    def _check_slot(self, i: int, slot: SlotSpace, sites: Sequence[Site]) -> None:
        if not slot.names:
            wanted = "mixers" if i % 2 == 0 else "channel mixers"
            _refuse(
                ("operators",),
                f"slot {i} has nothing to hold: with pattern alternate it takes {wanted}, and "
                f"there are only {', '.join(self.operators)}",
            )
        for site in sites:
            if not first_buildable(slot.names, slot.operators, site):
                _refuse(
                    ("operators",),
                    f"slot {i} takes {', '.join(slot.names)}, and none can be built at width "
                    f"{site.width}: {_problem(slot.names[0], slot.operators[slot.names[0]], site)}",
                )

    def _check_buildable(
        self, path: tuple[str | int, ...], name: str, ranges: Ranges, sites: Sequence[Site]
    ) -> None:
        if not any(first_buildable((name,), {name: ranges}, site) for site in sites):
            _refuse(
                path,
                f"none of these values can be built at width {sites[0].width}: "
                f"{_problem(name, ranges, sites[0])}",
            )

    def slots_at(self, depth: int) -> tuple[SlotSpace, ...]:
        """What every slot of a genome of that depth may hold. The depth is one of the space's."""
        return self._slots[depth]

    def _slot(self, index: int, depth: int) -> SlotSpace:
        label, operators = f"slot{index}", self._by_pattern(index)
        for rule in self.slots:
            place = rule.place(index, depth)
            if place is not None:
                label = place
                operators = {
                    name: self.operators.get(name, {}) if ranges is None else ranges
                    for name, ranges in rule.operators.items()
                }
                break
        mixers = tuple(name for name in operators if find(name)[0].kind == "mixer")
        return SlotSpace(label, operators, tuple(operators), mixers)

    def _by_pattern(self, index: int) -> dict[str, Ranges]:
        if self.pattern == "free":
            return self.operators
        kind = "mixer" if index % 2 == 0 else "channel"
        return {n: ranges for n, ranges in self.operators.items() if find(n)[0].kind == kind}

    def readers_ahead(self) -> Iterator[tuple[tuple[str | int, ...], str]]:
        """Where the space allows an operator that reads later tokens: the keys below `space`, and
        which operator, in words that a sentence begins with."""
        for name, ranges in self.operators.items():
            if (words := _reads_ahead(name, ranges)) is not None:
                yield ("operators", name), words
        for i, rule in enumerate(self.slots):
            for name, own in rule.operators.items():
                if own is not None and (words := _reads_ahead(name, own)) is not None:
                    yield ("slots", i, "operators", name), words

    def size(self) -> int:
        """How many genomes the space holds, sharing aside: an upper bound, for `--dry-run`.

        Genomes that a constraint or a combination of genes excludes are counted too.
        """
        header = math.prod(len(getattr(self, axis.name)) for axis in HEADER)
        return header * sum(
            math.prod(map(self._slot_size, self.slots_at(depth)))
            for depth in range(self.depth[0], self.depth[1] + 1)
        )

    def _slot_size(self, slot: SlotSpace) -> int:
        each = {
            name: math.prod(len(values) for values in ranges.values())
            for name, ranges in slot.operators.items()
        }
        total = sum(each.values())
        mixers = sum(each[name] for name in slot.mixers)
        chains = int("chain" in self.join)
        for branches in range(2, self.parallel.branches + 1):
            # Branches have an order in a chain alone, otherwise they are multisets.
            multisets = math.comb(mixers + branches - 1, branches)
            total += multisets * (len(self.join) - chains) + mixers**branches * chains
        return total * len(self.tokens)


def show_size(size: int) -> str:
    """A number of genomes for people: `1,234`, or `about 10^23.4` where it is huge."""
    return f"{size:,}" if size < 10**9 else f"about 10^{math.log10(size):.1f}"


def every_op(name: str, ranges: Ranges) -> Iterator[Op]:
    """Every operator of that name in the ranges, lazily."""
    for values in itertools.product(*ranges.values()):
        yield make_op(name, dict(zip(ranges, values, strict=True)))


def make_op(name: str, genes: Mapping[str, Gene]) -> Op:
    """The operator with those genes that differ from the name's own values."""
    own = own_genes(name)
    return Op(name, tuple((axis, value) for axis, value in genes.items() if value != own[axis]))


def first_buildable(names: Sequence[str], operators: Mapping[str, Ranges], site: Site) -> Op | None:
    """The first operator of those names and ranges that can be built there, if any can."""
    for name in names:
        for op in itertools.islice(every_op(name, operators[name]), CANDIDATES):
            if fits(op, site):
                return op
    return None


def _reads_ahead(name: str, ranges: Ranges) -> str | None:
    """That the operator can read later tokens, in words, where some of its values let it."""
    own = own_genes(name)
    if "causal" not in own or False not in ranges.get("causal", (own["causal"],)):
        return None
    return f"{name}{' with causal=false' if own['causal'] else ''} reads later tokens"


def _problem(name: str, ranges: Ranges, site: Site) -> str:
    """Why the first setting of an operator cannot be built there."""
    try:
        config_of(next(every_op(name, ranges)), site)
    except GeneError as error:
        return str(error)
    return "the others of its values"
