"""Write an export whole or not at all: scratch folder, hashes, reading back, the final place."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from ...genome.files import load
from ...genome.notation import parse
from ...genome.notation import show as notation
from ..store import read_json
from ..terminal import Mistake
from .facts import provenance, write
from .formats import DEFAULT, FORMATS
from .order import Order

PROVENANCE = "provenance.json"
"""Holds the sha256 of every other file, by its path in the folder."""


def export(order: Order, out: Path, to: str = DEFAULT, *, force: bool = False) -> Path:
    """Write the folder, read it back, compare, and only then put it in its place.

    Raises Mistake where there is no such format, where `out` is not empty and `force` is not given
    or it is no folder of ours, and where the format refuses the order.
    """
    if to not in FORMATS:
        raise Mistake(f"--format is one of {', '.join(FORMATS)}, not {to!r}")
    _require_free(out, force)
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = out.with_name(f".{out.name}.{os.getpid()}.part")
    scratch.mkdir()
    try:
        FORMATS[to].write(order, scratch)
        write(scratch / PROVENANCE, provenance(order, to, hashes(scratch)))
        check(order, scratch)
        if out.exists():
            shutil.rmtree(out)
        scratch.rename(out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return out


def _require_free(out: Path, force: bool) -> None:
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise Mistake(f"{out} exists already and is no folder; choose another name")
    if not out.exists() or not any(out.iterdir()):
        return
    if not force:
        raise Mistake(f"{out} exists already and is not empty; take another folder or --force")
    if not is_export(out):
        raise Mistake(f"{out} exists and is no exported design; --force replaces only those")


def is_export(folder: Path) -> bool:
    """Whether a folder was written by `export`."""
    facts = read_facts(folder)
    return "mendel" in facts and isinstance(facts.get("files"), dict)


def read_facts(folder: Path) -> dict[str, Any]:
    """What provenance.json holds; empty where there is none that can be read."""
    try:
        return read_json(folder / PROVENANCE)
    except (OSError, ValueError):
        return {}


def files_of(folder: Path) -> list[Path]:
    """Every file below a folder, in order."""
    return sorted(p for p in folder.rglob("*") if p.is_file())


def hashes(folder: Path) -> dict[str, str]:
    """The sha256 of every file but provenance.json, by its path in the folder."""
    named = {p.relative_to(folder).as_posix(): p for p in files_of(folder)}
    return {name: sha256(path) for name, path in named.items() if name != PROVENANCE}


def sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def check(order: Order, folder: Path) -> None:
    """Read everything back; raises RuntimeError where it is not what was meant."""
    genome = order.source.genome
    for path in (folder / "genome.yaml", folder / "genome.json"):
        if path.exists() and load(path) != genome:
            raise RuntimeError(f"{path}: what was written is not the genome that was meant")
    if parse(notation(genome)) != genome:
        raise RuntimeError(f"{folder}: the notation does not give the genome back")
    proof = json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))
    if proof["files"] != hashes(folder):
        raise RuntimeError(f"{folder}: a file changed while it was written")
