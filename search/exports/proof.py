"""provenance.json: where an export came from, the sha256 of every other file, and its own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..store import read_json
from ..terminal import clean

PROVENANCE = "provenance.json"
OWN = "sha256"
"""The key of the file's own hash: of its other keys as JSON, sorted."""


CLUTTER = (".git", ".gitattributes", ".cache")
"""What clones and downloads of a model hub put beside an export's files; no loader reads them."""


def files_of(folder: Path) -> list[Path]:
    """Every file below a folder but for the hub's own, in order."""
    found = (p for p in folder.rglob("*") if p.relative_to(folder).parts[0] not in CLUTTER)
    return sorted(p for p in found if p.is_file())


def sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def hashes(folder: Path) -> dict[str, str]:
    """The sha256 of every file but provenance.json, by its path in the folder."""
    named = {p.relative_to(folder).as_posix(): p for p in files_of(folder)}
    return {name: sha256(path) for name, path in named.items() if name != PROVENANCE}


def own_hash(facts: Mapping[str, Any]) -> str:
    """The hash of what provenance.json holds, but for this hash."""
    rest = {k: v for k, v in facts.items() if k != OWN}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def seal(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write provenance.json: the facts, the files' hashes, its own."""
    whole = {**clean(facts), "files": hashes(folder)}
    write(folder / PROVENANCE, {**whole, OWN: own_hash(whole)})


def read_facts(folder: Path) -> dict[str, Any]:
    """What provenance.json holds; empty where there is none that can be read."""
    try:
        return read_json(folder / PROVENANCE)
    except (OSError, ValueError):
        return {}


def is_export(folder: Path) -> bool:
    """Whether a folder was written by `export`."""
    facts = read_facts(folder)
    return "mendel" in facts and isinstance(facts.get("files"), dict)


def differences(folder: Path, facts: Mapping[str, Any]) -> list[str]:
    """What is not as provenance.json has it, a sentence each."""
    found = []
    if facts.get(OWN) != own_hash(facts):
        found.append(f"{PROVENANCE} was changed")
    told, there = facts.get("files"), hashes(folder)
    told = told if isinstance(told, dict) else {}
    found += [f"{name} is missing" for name in told if name not in there]
    found += [f"{name} was changed" for name in told if name in there and told[name] != there[name]]
    found += [f"{name} was added" for name in there if name not in told]
    return found


def write(path: Path, value: Mapping[str, Any]) -> None:
    """Write strict JSON for people."""
    path.write_text(json.dumps(clean(value), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
