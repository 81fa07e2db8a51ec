"""Proof of an export: each check is run and named, and the first that fails is told.

Checks of a model run its own code, as a stranger's machine would; so verify folders that you trust.
Where a file is not as it was sealed, that code is not run.

The hashes find damage and slips. They are no signature: who changes a file on purpose can seal the
folder anew. So the command tells the seal, to be compared with what the author gives.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ...genome.files import GenomeFileError, load
from ...genome.genome import GRAMMAR_VERSION
from ...genome.hash import canonical_hash
from ...genome.notation import NotationError, parse
from ..terminal import Mistake, clean
from .drift import Failed, Skipped, differs, writer
from .facts import costs
from .formats import FORMATS
from .proof import PROVENANCE, differences, is_export, read_facts


@dataclass(frozen=True)
class Result:
    """One check: its name, `passed`, `failed` or `skipped`, and what is to be said of it."""

    name: str
    state: str
    said: str = ""


class Check(NamedTuple):
    """A name, and what gives a remark or raises Failed or Skipped. Where the check of a gate fails,
    those after it have nothing to stand on."""

    name: str
    run: Callable[[], str]
    gate: bool = False


GATES = ("files", "genome")
"""What a model's code is not run without."""

UNTOUCHED = "its code is not run: the folder is not as it was sealed"


def verify(folder: Path) -> Iterator[Result]:
    """The checks of an export one after the other, all of them but those that a failure makes
    pointless. Raises Mistake where the folder is no export or of a newer grammar or format."""
    if not folder.is_dir():
        raise Mistake(f"{folder} is no folder")
    if not (folder / PROVENANCE).is_file():
        raise Mistake(f"{folder} is no export: {PROVENANCE} is missing")
    facts = read_facts(folder)
    if not is_export(folder):
        yield Result("files", "failed", f"{PROVENANCE} is not what an export writes")
        return
    _require_readable(folder, facts)
    whole = True
    for result in run([Check("files", lambda: _files(folder, facts)), *_design(folder, facts)]):
        whole = whole and not (result.name in GATES and result.state == "failed")
        yield result
    if facts["format"] == "hf" and not whole:
        yield Result("model", "skipped", UNTOUCHED)
    elif facts["format"] == "hf":
        # Not at the top: only this needs transformers.
        from .verify_model import checks

        yield from run(checks(folder, facts))


def run(checks: list[Check]) -> Iterator[Result]:
    """The results of checks; a fault in what is checked is a failure too."""
    for check in checks:
        try:
            yield Result(check.name, "passed", check.run())
            continue
        except Skipped as error:
            yield Result(check.name, "skipped", str(error))
            continue
        except Mistake:
            raise
        except Failed as error:
            yield Result(check.name, "failed", str(error))
        except Exception as error:
            words = " ".join(str(error).split())
            yield Result(check.name, "failed", f"{type(error).__name__}: {words}")
        if check.gate:
            return


def _require_readable(folder: Path, facts: dict[str, Any]) -> None:
    """Raises Mistake where a newer version of Mendel wrote the folder."""
    genome = facts.get("genome")
    grammar = genome.get("grammar") if isinstance(genome, dict) else None
    if isinstance(grammar, int) and grammar > GRAMMAR_VERSION:
        raise Mistake(
            f"{folder}: grammar {grammar} is newer than this version of mendel, which reads "
            f"grammar {GRAMMAR_VERSION}"
        )
    if facts.get("format") not in FORMATS:
        raise Mistake(
            f"{folder}: the format {facts.get('format')!r} is none that this version of mendel "
            f"reads: {', '.join(FORMATS)}"
        )


def _files(folder: Path, facts: dict[str, Any]) -> str:
    wrong = differences(folder, facts)
    if wrong:
        raise Failed("; ".join(wrong))
    return f"{len(facts['files']) + 1} files are as they were sealed"


def _design(folder: Path, facts: dict[str, Any]) -> list[Check]:
    """The checks of the genome and of what follows from it."""
    told: Any = facts.get("genome")

    def genome() -> str:
        if not (isinstance(told, dict) and {"notation", "hash"} <= told.keys()):
            raise Failed(f"{PROVENANCE} names no genome")
        try:
            found = parse(told["notation"])
            for path in _genome_files(folder):
                if load(path) != found:
                    raise Failed(f"{path.name} is another genome than {PROVENANCE} names")
        except (GenomeFileError, NotationError) as error:
            raise Failed(str(error)) from None
        return str(told["notation"])

    def same_hash() -> str:
        found = canonical_hash(parse(told["notation"]))
        if found != told["hash"]:
            # A config that gained a field changes hashes; the genome itself is checked above.
            who = writer(facts)
            if who is not None:
                raise Skipped(f"hashes differ between versions: {who}")
            raise Failed(f"the genome's hash is {found}, and {PROVENANCE} has {told['hash']}")
        return str(found)

    def same_costs() -> str:
        path = folder / "costs.json"
        if not path.exists():
            raise Skipped("the format holds no costs")
        written = json.loads(path.read_text(encoding="utf-8"))
        counted = clean(costs(parse(told["notation"]), _vocab(facts)))
        if written != json.loads(json.dumps(counted)):
            differs("costs.json is not what this version counts for the genome", facts)
        return f"{written['params']:,} parameters"

    return [
        Check("genome", genome, gate=True),
        Check("hash", same_hash),
        Check("costs", same_costs),
    ]


def _vocab(facts: dict[str, Any]) -> int | None:
    """The vocabulary of the weights in the folder; None where there are none."""
    weights = facts.get("weights")
    return weights["vocab"] if isinstance(weights, dict) else None


def _genome_files(folder: Path) -> list[Path]:
    return [p for p in (folder / "genome.yaml", folder / "genome.json") if p.exists()]
