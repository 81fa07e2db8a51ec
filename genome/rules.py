"""What makes a genome valid, and what keeps it inside a space: every rule with its sentence."""

from __future__ import annotations

from dataclasses import dataclass

from ..primitives.base import Config, GeneError, Site, show_gene
from ..primitives.catalogue import find
from .blueprint import Place, place_name
from .genome import Genome, Op
from .header import HEADER, LABEL, MAX_SLOTS, SLOT, header_of
from .residual import norms_of
from .resolve import config_of, groups, primitive_of, sites
from .space import SlotSpace, Space

RULES: dict[str, str] = {
    "header": "width, position, norm, placement, residual, tied and vocab have allowed values",
    "reversible": "residual=reversible goes with placement=pre or sandwich",
    "depth": f"a genome has from 1 to {MAX_SLOTS} slots",
    "slot": "a slot holds at least one operator, has a known join, and takes a share of the tokens",
    "operator": "an operator is in the catalogue, and its genes go together at the genome's width",
    "mixer": "a genome has at least one mixer",
    "label": "a sharing label is up to 32 letters, digits and underscores",
    "group": "a sharing group has at least two members",
    "weights": "operators that share weights have equal configs",
    "lender": "the first operator of a feature group is of a primitive that lends features",
    "borrower": "the later operators of a feature group fit the keys and values that they borrow",
    "slots of a group": "the members of a feature group stand in different slots",
    "tokens": "operators share features in slots that take all tokens",
}
"""The rules of every genome."""


@dataclass(frozen=True)
class Violation:
    """A rule that is broken, where, and a sentence for a person."""

    rule: str
    where: str
    """`genome`, `slot 3`, `slot 3, branch 1`; counted from 0."""
    sentence: str

    def __str__(self) -> str:
        return f"{self.where}: {self.sentence}"


class InvalidGenome(ValueError):
    """A genome that breaks rules; the message is one line."""


def require_valid(genome: Genome) -> None:
    """Raises InvalidGenome with the first violation, and how many more there are."""
    found = violations(genome)
    if found:
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise InvalidGenome(f"{found[0]}{more}")


def violations(genome: Genome) -> list[Violation]:
    """The rules that a genome breaks; empty for a valid one."""
    found = _header(genome)
    if not 1 <= len(genome.slots) <= MAX_SLOTS:
        found.append(Violation("depth", "genome", f"{len(genome.slots)} slots; {RULES['depth']}"))
    for i, slot in enumerate(genome.slots):
        if not slot.branches:
            found.append(Violation("slot", f"slot {i}", "the slot holds no operator"))
        for axis in SLOT:
            try:
                axis.check(getattr(slot, axis.name))
            except GeneError as error:
                found.append(Violation("slot", f"slot {i}", str(error)))
    if any(violation.rule == "header" for violation in found):
        # Operators are judged at a width and a position; without them nothing can be said.
        return found
    if cannot_reverse(genome):
        sentence = (
            "residual=reversible undoes each slot's addition, which a norm after it "
            f"(placement=post) does not let; {RULES['reversible']}"
        )
        found.append(Violation("reversible", "genome", sentence))
    placed: dict[Place, tuple[Op, Site, Config]] = {}
    has_mixer = False
    for i, (slot, row) in enumerate(zip(genome.slots, sites(genome), strict=True)):
        for j, (op, site) in enumerate(zip(slot.branches, row, strict=True)):
            try:
                has_mixer |= find(op.name)[0].kind == "mixer"
                placed[i, j] = op, site, config_of(op, site)
            except GeneError as error:
                where = place_name(genome, (i, j))
                found.append(Violation("operator", where, f"{op.name}: {error}"))
            for label in (op.weights, op.features):
                if label is not None and not LABEL.fullmatch(label):
                    where = place_name(genome, (i, j))
                    found.append(Violation("label", where, f"{label!r} is no label"))
    if not has_mixer:
        found.append(Violation("mixer", "genome", f"there is no mixer; {RULES['mixer']}"))
    return found + _weights(genome, placed) + _features(genome, placed)


def cannot_reverse(genome: Genome) -> bool:
    """The genome is reversible but for the norms after its additions."""
    return genome.residual == "reversible" and norms_of(genome)[1] == "post"


def _header(genome: Genome) -> list[Violation]:
    found = []
    for axis, value in zip(HEADER, header_of(genome).values(), strict=True):
        try:
            axis.check(value)
        except GeneError as error:
            found.append(Violation("header", "genome", str(error)))
    return found


def _alone(genome: Genome, label: str, members: list[Place], what: str) -> list[Violation]:
    if len(members) > 1:
        return []
    where = place_name(genome, members[0])
    return [Violation("group", where, f"nothing else has {what}=@{label}; {RULES['group']}")]


def _weights(genome: Genome, placed: dict[Place, tuple[Op, Site, Config]]) -> list[Violation]:
    found = []
    for label, members in groups(genome, "weights").items():
        found += _alone(genome, label, members, "weights")
        known = [place for place in members if place in placed]
        for place in known[1:]:
            if placed[place][2] != placed[known[0]][2]:
                sentence = (
                    f"weights=@{label} are those of {place_name(genome, known[0])}, "
                    f"whose config differs; {RULES['weights']}"
                )
                found.append(Violation("weights", place_name(genome, place), sentence))
    return found


def _features(genome: Genome, placed: dict[Place, tuple[Op, Site, Config]]) -> list[Violation]:
    found = []
    for label, members in groups(genome, "features").items():
        found += _alone(genome, label, members, "features")
        for place in members:
            tokens = genome.slots[place[0]].tokens
            if tokens != 1:
                sentence = f"features=@{label} where tokens={show_gene(tokens)}; {RULES['tokens']}"
                found.append(Violation("tokens", place_name(genome, place), sentence))
        if any(place not in placed for place in members):
            continue
        lender, config = placed[members[0]][0], placed[members[0]][2]
        if not primitive_of(lender).lends:
            sentence = f"features=@{label}: {lender.name} lends no features; {RULES['lender']}"
            found.append(Violation("lender", place_name(genome, members[0]), sentence))
            continue
        seen = {members[0][0]}
        for place in members[1:]:
            op, _, wanted = placed[place]
            where = place_name(genome, place)
            if place[0] in seen:
                sentence = f"two members of features=@{label}; {RULES['slots of a group']}"
                found.append(Violation("slots of a group", where, sentence))
            seen.add(place[0])
            problem = lending_problem(lender, config, op, wanted)
            if problem:
                found.append(Violation("borrower", where, f"features=@{label}: {problem}"))
    return found


def lending_problem(lender: Op, lent: Config, borrower: Op, wanted: Config) -> str | None:
    """Why the borrower cannot use the lender's features, as a sentence; None where it can."""
    primitive = primitive_of(lender)
    if not primitive.lends or primitive.lending_problem is None:
        return f"{lender.name} lends no features"
    if not primitive_of(borrower).lends:
        return f"{borrower.name} takes no features"
    return primitive.lending_problem(lent, wanted)


def space_violations(genome: Genome, space: Space) -> list[Violation]:
    """Where a genome leaves the space's form; constraints are judged in `constraints.py`."""
    found = []
    for name, value in header_of(genome).items():
        options = getattr(space, name)
        if value not in options:
            listed = ", ".join(map(show_gene, options))
            sentence = f"{name}={show_gene(value)} is outside the space; it has {listed}"
            found.append(Violation("space header", "genome", sentence))
    depth = len(genome.slots)
    least, most = space.depth
    if not least <= depth <= most:
        sentence = f"{depth} slots; the space has from {least} to {most}"
        return [*found, Violation("space depth", "genome", sentence)]
    for i, (slot, allowed) in enumerate(zip(genome.slots, space.slots_at(depth), strict=True)):
        count = len(slot.branches)
        names = allowed.names if count == 1 else allowed.mixers
        for j, op in enumerate(slot.branches):
            where = place_name(genome, (i, j))
            if op.name not in names:
                sentence = f"{op.name} is not allowed here; allowed are {', '.join(names)}"
                found.append(Violation("space operator", where, sentence))
            elif not _allows(allowed, op):
                sentence = f"the genes of {op.name} are outside the space's ranges"
                found.append(Violation("space genes", where, sentence))
            for kind in ("weights", "features"):
                if getattr(op, kind) is not None and not getattr(space.sharing, kind):
                    sentence = f"the space shares no {kind}"
                    found.append(Violation("space sharing", where, sentence))
        if count > max(1, space.parallel.branches):
            sentence = f"{count} parallel operators; the space has up to {space.parallel.branches}"
            found.append(Violation("space parallel", f"slot {i}", sentence))
        if count > 1 and slot.join not in space.join:
            sentence = f"join={slot.join} is outside the space; it has {', '.join(space.join)}"
            found.append(Violation("space parallel", f"slot {i}", sentence))
        if slot.tokens not in space.tokens:
            listed = ", ".join(map(show_gene, space.tokens))
            sentence = f"tokens={show_gene(slot.tokens)} is outside the space; it has {listed}"
            found.append(Violation("space tokens", f"slot {i}", sentence))
    return found


def _allows(slot: SlotSpace, op: Op) -> bool:
    try:
        return slot.allows(op)
    except GeneError:
        return False
