"""Text from a file, a folder, a glob or a Hugging Face dataset on disk, as documents of bytes.

Reading is deterministic (paths in sorted order) and keeps nothing between calls, on disk or in
memory, so a changed file is never answered with an old text.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .task import ProxyError

SEPARATOR = 0
"""The byte after each document. Plain text does not contain it."""

STDLIB = "python-stdlib"
"""The name of the default corpus: the source text of this Python's standard library."""

TEXT_SUFFIXES = frozenset(
    {".txt", ".text", ".md", ".markdown", ".rst", ".tex", ".html", ".htm", ".xml", ".json"}
    | {".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".rs", ".go", ".java", ".js"}
    | {".ts", ".sh", ".sql", ".r", ".jl", ".toml", ".yaml", ".yml", ".ini", ".cfg", ".csv", ".tsv"}
)
"""What is read from a folder as one plain-text document per file; elsewhere any suffix is."""

TABLE_SUFFIXES = frozenset([".jsonl", ".ndjson", ".parquet", ".arrow"])
"""One document per row, in the text field."""

_STDLIB_SKIPPED = frozenset(
    ["test", "tests", "idle_test", "lib2to3", "site-packages", "dist-packages", "__pycache__"]
)


@dataclass(frozen=True)
class Corpus:
    """Documents as bytes, in order, and where they come from."""

    source: str
    documents: tuple[bytes, ...]

    @property
    def bytes(self) -> int:
        """Bytes with one separator after each document."""
        return sum(len(d) + 1 for d in self.documents)

    def fingerprint(self) -> dict[str, Any]:
        """`sha256` of the text with separators, `bytes`, `documents`, `source`."""
        digest = hashlib.sha256()
        for document in self.documents:
            digest.update(document)
            digest.update(bytes([SEPARATOR]))
        return {
            "source": self.source,
            "sha256": digest.hexdigest(),
            "bytes": self.bytes,
            "documents": len(self.documents),
        }


def join(documents: list[bytes]) -> NDArray[np.uint8]:
    """The documents as one array of bytes, a separator after each."""
    end = bytes([SEPARATOR])
    return np.frombuffer(b"".join(d + end for d in documents), dtype=np.uint8)


def read_corpus(
    text: str | None, *, text_field: str = "text", split: str = "train", max_bytes: int
) -> Corpus:
    """The first documents, in sorted order of paths and rows, up to `max_bytes` in all.

    `text` is a file, a folder (read recursively), a glob, or a folder that `datasets` saved a data
    set to (`split` picks from several); None is the standard library's source, without its tests.
    A document that goes past `max_bytes` is cut there if it is the first, else left out.

    Raises ProxyError with one line: nothing there, not readable, not text, no such field, empty, a
    package that is not installed.
    """
    source = STDLIB if text is None else text
    paths = _stdlib_files() if text is None else _files(text, split)
    documents: list[bytes] = []
    room = max_bytes
    for document in _documents(paths, text_field):
        if not document:
            continue
        if len(document) + 1 > room:
            if not documents:
                documents.append(document[: max(room - 1, 0)])
            break
        documents.append(document)
        room -= len(document) + 1
    if not documents:
        raise ProxyError(f"text {source}: no text in it ({len(paths)} files read)")
    return Corpus(source, tuple(documents))


def _stdlib_files() -> list[Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = []
    for folder, inner, names in os.walk(root):
        # Pruned while walking: site-packages can be far larger than the library.
        inner[:] = [name for name in inner if name not in _STDLIB_SKIPPED]
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    if not files:
        raise ProxyError(
            f"text: this Python has no source of its standard library in {root}; name a text"
        )
    return sorted(files)


def _files(text: str, split: str) -> list[Path]:
    path = Path(text).expanduser()
    try:
        if path.is_file():
            return [path]
        if path.is_dir():
            return _folder(path, split)
        found = [Path(p) for p in glob.glob(str(path), recursive=True)]
    except OSError as error:
        raise ProxyError(f"text {text}: {error.strerror}") from None
    files = sorted(p for p in found if p.is_file())
    if not files:
        kind = "matches no file" if glob.has_magic(text) else "does not exist"
        raise ProxyError(f"text {text} {kind}; it is a file, a folder or a glob")
    return files


def _folder(folder: Path, split: str) -> list[Path]:
    """The files of a folder, or of a data set's split where `datasets` has saved one there."""
    splits = folder / "dataset_dict.json"
    if splits.is_file():
        names = json.loads(splits.read_text())["splits"]
        if split not in names:
            raise ProxyError(f"text {folder}: no split {split!r}; it has {', '.join(names)}")
        return _folder(folder / split, split)
    state = folder / "state.json"
    if state.is_file() and (folder / "dataset_info.json").is_file():
        return [
            folder / entry["filename"] for entry in json.loads(state.read_text())["_data_files"]
        ]
    wanted = TEXT_SUFFIXES | TABLE_SUFFIXES
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in wanted and p.is_file())
    if not files:
        raise ProxyError(
            f"text {folder}: no file in this folder ends in one of {' '.join(sorted(wanted))}"
        )
    return files


def _documents(paths: list[Path], field: str) -> Iterator[bytes]:
    for path in paths:
        try:
            match path.suffix.lower():
                case ".jsonl" | ".ndjson":
                    yield from _json_lines(path, field)
                case ".parquet":
                    yield from _parquet(path, field)
                case ".arrow":
                    yield from _arrow(path, field)
                case _:
                    document = path.read_bytes()
                    if SEPARATOR in document[:65_536]:
                        raise ProxyError(f"text {path} is not text: it holds zero bytes")
                    yield document
        except OSError as error:
            raise ProxyError(f"text {path}: {error.strerror or error}") from None


def _json_lines(path: Path, field: str) -> Iterator[bytes]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ProxyError(f"text {path}:{number} is not JSON: {error}") from None
            if not isinstance(row, dict) or field not in row:
                has = ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__
                raise ProxyError(f"text {path}:{number}: no field {field!r}; it has {has}")
            yield _encoded(row[field], f"{path}:{number}", field)


def _parquet(path: Path, field: str) -> Iterator[bytes]:
    pa = _pyarrow(path)
    import pyarrow.parquet as parquet  # in the optional extra `parquet`

    try:
        with parquet.ParquetFile(path) as file:
            _check_column(file.schema_arrow.names, path, field)
            for batch in file.iter_batches(columns=[field]):
                yield from _column(batch.column(0), path, field)
    except pa.ArrowInvalid as error:
        raise ProxyError(f"text {path} is not a parquet file: {_one_line(error)}") from None


def _arrow(path: Path, field: str) -> Iterator[bytes]:
    """`datasets` writes Arrow's streaming format; the file format is read too."""
    pa = _pyarrow(path)
    import pyarrow.ipc as ipc  # in the optional extra `parquet`

    try:
        with pa.memory_map(str(path)) as source:
            file_format = source.read(6) == b"ARROW1"
            source.seek(0)
            reader = ipc.open_file(source) if file_format else ipc.open_stream(source)
            _check_column(reader.schema.names, path, field)
            batches = (
                (reader.get_batch(i) for i in range(reader.num_record_batches))
                if file_format
                else iter(reader)
            )
            for batch in batches:
                yield from _column(batch.column(field), path, field)
    except pa.ArrowInvalid as error:
        raise ProxyError(f"text {path} is not an Arrow file: {_one_line(error)}") from None


def _pyarrow(path: Path) -> Any:
    try:
        import pyarrow  # optional
    except ImportError:
        raise ProxyError(
            f"text {path} needs pyarrow, which is not installed: pip install 'mendel[parquet]'"
        ) from None
    return pyarrow


def _check_column(names: list[str], path: Path, field: str) -> None:
    if field not in names:
        raise ProxyError(f"text {path}: no field {field!r}; it has {', '.join(names)}")


def _column(column: Any, path: Path, field: str) -> Iterator[bytes]:
    for value in column:
        yield _encoded(value.as_py(), str(path), field)


def _encoded(value: object, where: str, field: str) -> bytes:
    """A row's text in UTF-8; a missing text is an empty document."""
    if value is None:
        return b""
    if not isinstance(value, str):
        raise ProxyError(f"text {where}: field {field!r} is {type(value).__name__}, not text")
    # A lone surrogate, which JSON can write, has no UTF-8 form.
    return value.encode("utf-8", errors="replace")


def _one_line(error: Exception) -> str:
    return str(error).splitlines()[0]
