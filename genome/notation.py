"""The one-line notation of genomes: reading and writing.

    genome   = [ "{" gene { "," gene } "}" ] sequence
    sequence = item { ">" item }                        serial: one slot after the other
    item     = unit [ "*" count ]                       count copies of the unit
    unit     = operator | "[" sequence "]" | slot
    slot     = "[" operator { "|" operator } "]" [ "(" gene { "," gene } ")" ]     parallel
    operator = name [ "(" gene { "," gene } ")" ]
    gene     = axis "=" value | "weights" "=" "@" label | "features" "=" "@" label

The braces hold the header genes (width, position, norm, placement, residual, tied, vocab). A slot
in brackets has the genes join and tokens, also with one operator: `[mha](tokens=0.5)`.
Whitespace has no meaning. Example:
`{width=64} [mamba2 > swiglu]*3 > [gqa(kv_heads=2) | mamba2] > moe(experts=8)`.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import NoReturn

from ..primitives.base import Axis, Gene, GeneError, Primitive, show_gene
from ..primitives.catalogue import find
from ..primitives.nearest import nearest
from .genome import Genome, Op, Slot
from .header import (
    DEFAULT_WIDTH,
    HEADER,
    LABEL,
    MAX_SLOTS,
    SLOT,
    header_of,
    slot_of,
    with_header,
)

MAX_DEPTH = 32
"""Brackets within brackets."""

_TOKEN = re.compile(r"\s+|(?P<mark>[\[\]{}()|>*,=@])|(?P<word>[^\s\[\]{}()|>*,=@]+)")
_LABELS = ("weights", "features")


class NotationError(ValueError):
    """A notation that cannot be read: one line that starts with the column (from 1)."""

    def __init__(self, column: int, sentence: str) -> None:
        super().__init__(f"column {column}: {sentence}")
        self.column = column


@dataclass(frozen=True)
class _Token:
    text: str
    column: int
    is_word: bool


def read_gene(axis: Axis, text: str) -> Gene:
    """The value of an axis from its written form. Raises GeneError with a sentence."""
    for option in axis.options:
        if show_gene(option) == text:
            return option
    value: Gene = text
    try:
        value = int(text)
    except ValueError:
        try:
            number = float(text)
        except ValueError:
            pass
        else:
            value = number if math.isfinite(number) else text
    return axis.check(value)


def parse(text: str, *, width: int = DEFAULT_WIDTH) -> Genome:
    """The genome that a notation describes; `width` holds where its header names none.

    Raises NotationError. What goes together is not judged here: see `rules.violations`.
    """
    return _Parser(text).genome(width)


class _Parser:
    def __init__(self, text: str) -> None:
        self.tokens = [
            _Token(match.group(), match.start() + 1, match.lastgroup == "word")
            for match in _TOKEN.finditer(text)
            if match.lastgroup
        ]
        self.end = _Token("", len(text) + 1, False)
        self.at = 0
        self.depth = 0

    @property
    def next(self) -> _Token:
        return self.tokens[self.at] if self.at < len(self.tokens) else self.end

    def take(self) -> _Token:
        token = self.next
        self.at += 1
        return token

    def accept(self, mark: str) -> bool:
        if self.next.text == mark:
            self.at += 1
            return True
        return False

    def fail(self, wanted: str, after: str) -> NoReturn:
        token = self.next
        found = f"not {token.text!r}" if token.text else "but the text ends"
        where = f" after {after}" if after else ""
        raise NotationError(token.column, f"expected {wanted}{where}, {found}")

    def word(self, wanted: str, after: str) -> _Token:
        if not self.next.is_word:
            self.fail(wanted, after)
        return self.take()

    def mark(self, mark: str, after: str) -> None:
        if not self.accept(mark):
            self.fail(f"'{mark}'", after)

    def genome(self, width: int) -> Genome:
        header: dict[str, Gene] = {"width": width}
        if self.accept("{"):
            header |= self.header()
        slots = self.sequence()
        if self.next is not self.end:
            self.fail("'>' or the end", "the slot")
        try:
            return with_header(header, slots)
        except GeneError as error:
            raise NotationError(1, str(error)) from None

    def header(self) -> dict[str, Gene]:
        axes = {axis.name: axis for axis in HEADER}
        genes: dict[str, Gene] = {}
        if self.accept("}"):
            return genes
        while True:
            token = self.word("a header gene", "'{'" if not genes else "','")
            if token.text not in axes:
                raise NotationError(
                    token.column,
                    f"the header has no gene {token.text!r}; it has {', '.join(axes)}"
                    + nearest(token.text, axes),
                )
            self.new_name(token, genes)
            self.mark("=", token.text)
            genes[token.text] = self.value(axes[token.text])
            if self.accept("}"):
                return genes
            if not self.accept(","):
                self.fail("'}' or ','", f"the value {show_gene(genes[token.text])}")

    def sequence(self) -> list[Slot]:
        slots = self.item()
        while self.accept(">"):
            start = self.next
            slots += self.item()
            self.limit(len(slots), start)
        return slots

    def item(self) -> list[Slot]:
        start = self.next
        if self.accept("["):
            slots = self.bracket(start)
        elif start.is_word:
            slots = [Slot((self.operator(),))]
        else:
            after = f"'{self.tokens[self.at - 1].text}'" if self.at else ""
            self.fail("an operator or '['", after)
        if self.accept("*"):
            token = self.word("a count of repeats", "'*'")
            if not (token.text.isascii() and token.text.isdigit()) or int(token.text[:9]) < 1:
                raise NotationError(
                    token.column, f"repeats are a whole number of at least 1, not {token.text!r}"
                )
            # Long digit strings are cut first: reading them would take quadratic time.
            count = int(token.text) if len(token.text) < 9 else MAX_SLOTS + 1
            self.limit(len(slots) * count, token)
            slots = slots * count
        return slots

    def bracket(self, start: _Token) -> list[Slot]:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise NotationError(start.column, f"brackets nest at most {MAX_DEPTH} deep")
        is_operator = self.next.is_word
        slots = self.item()
        bare = is_operator and self.tokens[self.at - 2].text != "*"
        if bare and self.next.text == "|":
            ops = list(slots[0].branches)
            while self.accept("|"):
                if not self.next.is_word:
                    self.fail("an operator (a parallel branch is one operator)", "'|'")
                ops.append(self.operator())
            if not self.accept("]"):
                self.fail("'|' or ']'", "a parallel branch")
            slots = [self.with_genes(tuple(ops))]
        else:
            if self.next.text == "|":
                raise NotationError(
                    self.next.column, "a parallel branch is one operator, without repeats or '>'"
                )
            while self.accept(">"):
                bare = False
                token = self.next
                slots += self.item()
                self.limit(len(slots), token)
            if self.next.text == "|":
                raise NotationError(
                    self.next.column, "a parallel branch is one operator, without repeats or '>'"
                )
            if not self.accept("]"):
                self.fail("'>' or ']'", "the slot")
            if bare:
                slots = [self.with_genes(slots[0].branches)]
        self.depth -= 1
        return slots

    def with_genes(self, ops: tuple[Op, ...]) -> Slot:
        """The slot of those operators, with the genes in the brackets that may follow."""
        axes = {axis.name: axis for axis in SLOT}
        genes: dict[str, Gene] = {}
        if not self.accept("("):
            return Slot(ops)
        while True:
            token = self.word("'join' or 'tokens'", "'('" if not genes else "','")
            if token.text not in axes:
                raise NotationError(
                    token.column, f"a slot has 'join' and 'tokens', not {token.text!r}"
                )
            self.new_name(token, genes)
            self.mark("=", token.text)
            genes[token.text] = self.value(axes[token.text])
            if self.accept(")"):
                return slot_of(ops, genes)
            if not self.accept(","):
                self.fail("')' or ','", f"the value {show_gene(genes[token.text])}")

    def operator(self) -> Op:
        token = self.take()
        try:
            primitive, _ = find(token.text)
        except GeneError as error:
            raise NotationError(token.column, str(error)) from None
        if not self.accept("(") or self.accept(")"):
            return Op(token.text)
        genes: dict[str, Gene] = {}
        labels: dict[str, str] = {}
        while True:
            gene = self.word("an axis, 'weights' or 'features'", "'('" if not genes else "','")
            self.new_name(gene, {**genes, **labels})
            if gene.text in _LABELS:
                self.mark("=", gene.text)
                labels[gene.text] = shown = self.label(gene.text)
            else:
                axis = self.axis(primitive, gene)
                self.mark("=", gene.text)
                genes[gene.text] = self.value(axis)
                shown = show_gene(genes[gene.text])
            if self.accept(")"):
                return Op(
                    token.text, tuple(genes.items()), labels.get("weights"), labels.get("features")
                )
            if not self.accept(","):
                self.fail("')' or ','", f"the value {shown}")

    def axis(self, primitive: Primitive, token: _Token) -> Axis:
        try:
            return primitive.axis(token.text)
        except GeneError as error:
            choices = [a.name for a in primitive.axes] + list(_LABELS)
            raise NotationError(token.column, f"{error}{nearest(token.text, choices)}") from None

    def new_name(self, token: _Token, seen: dict[str, Gene]) -> None:
        if token.text in seen:
            raise NotationError(token.column, f"{token.text} is given twice")

    def value(self, axis: Axis) -> Gene:
        token = self.word(f"a value ({axis.allowed()})", "'='")
        try:
            return read_gene(axis, token.text)
        except GeneError as error:
            raise NotationError(token.column, str(error)) from None

    def label(self, kind: str) -> str:
        self.mark("@", f"'{kind}='")
        token = self.word("a label", "'@'")
        if not LABEL.fullmatch(token.text):
            raise NotationError(
                token.column,
                f"a label is up to 32 letters, digits and underscores, not {token.text!r}",
            )
        return token.text

    def limit(self, slots: int, token: _Token) -> None:
        if slots > MAX_SLOTS:
            raise NotationError(token.column, f"a genome has at most {MAX_SLOTS} slots")


def show(genome: Genome) -> str:
    """The notation of a genome; `parse(show(genome)) == genome`.

    The header names the width and what differs from the defaults; repeats are written as `*n`.
    """
    header = ", ".join(
        f"{axis.name}={show_gene(value)}"
        for axis, value in zip(HEADER, header_of(genome).values(), strict=True)
        if axis.name == "width" or value != axis.default
    )
    return f"{{{header}}} {show_slots(genome.slots)}"


def show_slots(slots: tuple[Slot, ...]) -> str:
    """The notation of a sequence of slots, without the header."""
    return _sequence([show_slot(slot) for slot in slots])


def show_slot(slot: Slot) -> str:
    """The notation of one slot."""
    ops = " | ".join(show_op(op) for op in slot.branches)
    genes = ", ".join(
        f"{axis.name}={show_gene(getattr(slot, axis.name))}"
        for axis in SLOT
        if getattr(slot, axis.name) != axis.default
    )
    if genes:
        return f"[{ops}]({genes})"
    return f"[{ops}]" if len(slot.branches) != 1 else ops


def show_op(op: Op) -> str:
    """The notation of one operator."""
    genes = [f"{name}={show_gene(value)}" for name, value in op.genes]
    if op.weights is not None:
        genes.append(f"weights=@{op.weights}")
    if op.features is not None:
        genes.append(f"features=@{op.features}")
    return f"{op.name}({', '.join(genes)})" if genes else op.name


def _sequence(items: list[str]) -> str:
    """Items joined by `>`, with the repeat that saves most written first, from the left."""
    count = len(items)
    # runs[p][i]: how many items from i on equal the item p later.
    runs: list[list[int]] = [[]]
    for period in range(1, count // 2 + 1):
        run = [0] * (count - period + 1)
        for i in range(count - period - 1, -1, -1):
            run[i] = run[i + 1] + 1 if items[i] == items[i + period] else 0
        runs.append(run)
    parts: list[str] = []
    i = 0
    while i < count:
        saved, period, repeats = 0, 1, 1
        for p in range(1, (count - i) // 2 + 1):
            r = runs[p][i] // p + 1
            if (r - 1) * p > saved:
                saved, period, repeats = (r - 1) * p, p, r
        body = items[i] if period == 1 else f"[{_sequence(items[i : i + period])}]"
        parts.append(body if repeats == 1 else f"{body}*{repeats}")
        i += period * repeats
    return " > ".join(parts)
