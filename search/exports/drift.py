"""Is an export what this version of Mendel writes? What another one wrote is said to be its.

Formulas, configs and code change from version to version, so an old export is no worse for having
others: its own code is run and has to give its logits. One that says that this very version wrote
it, and differs, was touched.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from ...genome.encoded import classes_of
from ...genome.genome import Genome
from ...genome.resolve import blueprint
from ..provenance import commit
from .bundle import bundle
from .facts import VERSION
from .hf import ROOT


class Failed(Exception):
    """What a check found, as a sentence."""


class Skipped(Exception):
    """Why there was nothing to check, as a sentence."""


def writer(facts: Mapping[str, Any]) -> str | None:
    """Which version wrote the folder, in words; None where it was this very one."""
    theirs, ours = _version(facts.get("mendel"), facts.get("commit")), _version(VERSION, commit())
    return None if theirs == ours else f"written by {theirs}; this is {ours}"


def _version(number: object, commit: object) -> str:
    if not isinstance(commit, str):
        return f"mendel {number}"
    return f"mendel {number} at {commit[:9]}{'+' if commit.endswith('+') else ''}"


def differs(what: str, facts: Mapping[str, Any]) -> NoReturn:
    """Raises Skipped where another version wrote the folder, else Failed."""
    who = writer(facts)
    if who is not None:
        raise Skipped(f"{what}: {who}")
    raise Failed(f"{what}, though it says that this version wrote it")


def same_code(folder: Path, genome: Genome, facts: Mapping[str, Any]) -> str:
    """The files of code are those that this version writes for the genome; see `differs`."""
    written = bundle([ROOT], classes_of(blueprint(genome)))
    there = {path.name: path.read_text(encoding="utf-8") for path in folder.glob("*.py")}
    odd = sorted(n for n in written.keys() | there.keys() if written.get(n) != there.get(n))
    if odd:
        differs(f"{_listed(odd)} not what this version writes", facts)
    return f"{len(written)} files are what this version writes"


def _listed(names: Iterable[str]) -> str:
    first, *rest = names
    if not rest:
        return f"{first} is"
    return f"{first} and {len(rest)} other file{'' if len(rest) == 1 else 's'} of code are"
