"""Letting operators share weights or features with earlier ones, and ending what cannot be shared.

Rows of operators, one list per slot, are changed in place here; callers own them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from ..primitives.base import Config, Site
from .blueprint import Place
from .genome import Genome, Op
from .header import LABEL
from .resolve import (
    Kind,
    config_of,
    fits,
    groups,
    letters,
    primitive_of,
    replace_ops,
    sites,
)
from .rules import lending_problem
from .space import SlotSpace

Rows = list[list[Op]]


def rows_of(genome: Genome) -> Rows:
    """The operators as lists that may be changed."""
    return [list(slot.branches) for slot in genome.slots]


def with_rows(genome: Genome, rows: Rows) -> Genome:
    """The genome with those operators, and the same joins and shares of tokens."""
    slots = [replace_ops(slot, row) for row, slot in zip(rows, genome.slots, strict=True)]
    return replace(genome, slots=tuple(slots))


def share_weights(rows: Rows, place: Place, slot: SlotSpace) -> bool:
    """Give an operator the weights of the nearest earlier one of its name, and so its genes.

    False where there is none whose genes the slot allows.
    """
    i, j = place
    op = rows[i][j]
    for at in _earlier(rows, place):
        partner = rows[at[0]][at[1]]
        if partner.name == op.name and slot.allows(partner):
            label = partner.weights or _fresh(rows, "weights")
            rows[at[0]][at[1]] = replace(partner, weights=label)
            rows[i][j] = replace(op, genes=partner.genes, weights=label)
            return True
    return False


def share_features(rows: Rows, place: Place, slot: SlotSpace, site: Site) -> bool:
    """Let an operator borrow from the nearest earlier slot that lends what fits.

    Where its own genes do not fit, it takes those of the lender, if the slot allows them.
    `site` is any site of the genome. False where there is no such lender.
    """
    i, j = place
    op = rows[i][j]
    taken = {other.features for other in rows[i] if other.features is not None}
    for at in _earlier(rows, place):
        lender = rows[at[0]][at[1]]
        if at[0] == i or lender.features in taken or not primitive_of(lender).lends:
            continue
        for candidate in (op, replace(lender, weights=None, features=None)):
            if not slot.allows(candidate) or not _can_borrow(lender, candidate, site):
                continue
            label = lender.features or _fresh(rows, "features")
            rows[at[0]][at[1]] = replace(lender, features=label)
            rows[i][j] = replace(candidate, weights=None, features=label)
            return True
    return False


def _can_borrow(lender: Op, borrower: Op, site: Site) -> bool:
    lends, borrows = replace(site, borrows=False), replace(site, borrows=True)
    return (
        fits(lender, lends)
        and fits(borrower, borrows)
        and lending_problem(
            lender, config_of(lender, lends), borrower, config_of(borrower, borrows)
        )
        is None
    )


def _earlier(rows: Rows, place: Place) -> Iterable[Place]:
    """The places before one, nearest first."""
    for i in range(place[0], -1, -1):
        last = place[1] if i == place[0] else len(rows[i])
        for j in range(last - 1, -1, -1):
            yield i, j


def _fresh(rows: Rows, kind: Kind) -> str:
    used = {op.weights if kind == "weights" else op.features for row in rows for op in row}
    number = 0
    while letters(number) in used:
        number += 1
    return letters(number)


def prune(genome: Genome) -> Genome:
    """The genome without the sharing labels that break a rule; its operators must be buildable.

    Of a feature group stay the first lender with a borrower, and its borrowers, as far as their
    slots take all tokens; of a weight group the largest set of operators with equal configs.
    """
    return _prune_weights(_prune_features(genome))


def _prune_features(genome: Genome) -> Genome:
    rows = rows_of(genome)
    for label, members in groups(genome, "features").items():
        whole = [place for place in members if genome.slots[place[0]].tokens == 1]
        kept = _lender_and_borrowers(genome, whole) if LABEL.fullmatch(label) else []
        for i, j in members:
            if (i, j) not in kept:
                rows[i][j] = replace(rows[i][j], features=None)
    return with_rows(genome, rows)


def _lender_and_borrowers(genome: Genome, members: list[Place]) -> list[Place]:
    depth = len(genome.slots)

    def op(place: Place) -> Op:
        return genome.slots[place[0]].branches[place[1]]

    def site(place: Place, borrows: bool) -> Site:
        return genome.site_at(place[0], depth, borrows)

    for first, place in enumerate(members):
        if not primitive_of(op(place)).lends:
            continue
        lent = config_of(op(place), site(place, False))
        kept, used = [place], {place[0]}
        for other in members[first + 1 :]:
            where = site(other, True)
            if other[0] in used or not fits(op(other), where):
                continue
            wanted = config_of(op(other), where)
            if lending_problem(op(place), lent, op(other), wanted) is None:
                kept.append(other)
                used.add(other[0])
        if len(kept) > 1:
            return kept
    return []


def _prune_weights(genome: Genome) -> Genome:
    found = groups(genome, "weights")
    if not found:
        return genome
    rows, where = rows_of(genome), sites(genome)
    for label, members in found.items():
        alike: dict[Config, list[Place]] = {}
        for i, j in members:
            alike.setdefault(config_of(rows[i][j], where[i][j]), []).append((i, j))
        kept = max(alike.values(), key=len)
        if len(kept) < 2 or not LABEL.fullmatch(label):
            kept = []
        for i, j in members:
            if (i, j) not in kept:
                rows[i][j] = replace(rows[i][j], weights=None)
    return with_rows(genome, rows)
