"""Files that a command makes where its user says: none over an older one, all of them or none."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from .store import write_text
from .terminal import Mistake

GENOMES = (".yaml", ".yml", ".json")
"""Endings of files that hold a genome."""


def check_new(path: Path, suffixes: tuple[str, ...]) -> None:
    """Raises Mistake unless a file of one of these kinds can be made there."""
    if path.suffix not in suffixes:
        raise Mistake(f"{path}: the file's name ends in {', '.join(suffixes)}")
    if path.exists():
        raise Mistake(f"{path} exists already; choose another name")
    if not path.absolute().parent.is_dir():
        raise Mistake(f"{path.parent} is no folder")


def write_new(files: Mapping[Path, str]) -> None:
    """Write the files; where one cannot be written none stays. Raises Mistake."""
    written: list[Path] = []
    for path, text in files.items():
        try:
            write_text(path, text)
        except OSError as error:
            for other in written:
                other.unlink(missing_ok=True)
            raise Mistake(f"{path}: cannot be written: {error.strerror}") from None
        written.append(path)


def remove_empty(folders: Iterable[Path]) -> None:
    """Take away those of the folders into which nothing came; the innermost stand first."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()
