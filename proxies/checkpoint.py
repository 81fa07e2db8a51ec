"""A training on disk: one safetensors file with its facts as JSON in the header."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .task import ProxyError

FILE = "checkpoint.safetensors"
VERSION = 1


def write(folder: Path, tensors: dict[str, Tensor], facts: dict[str, Any]) -> Path:
    """Write the checkpoint of that folder, all or nothing: a kill leaves the old one whole.

    Raises OSError, with the checkpoint's name, where the disk does not take it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / FILE
    # One file, so that weights and facts can never be of different moments.
    temporary = folder / f".{FILE}.{os.getpid()}"
    header = {"mendel": json.dumps({"version": VERSION, **facts}, allow_nan=False)}
    try:
        save_tensors({k: t.detach().contiguous() for k, t in tensors.items()}, temporary, header)
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)
    return path


def save_tensors(tensors: dict[str, Tensor], path: Path, header: dict[str, str]) -> None:
    """Write a safetensors file. Raises OSError where the disk does not take it."""
    try:
        save_file(tensors, path, header)
    except SafetensorError as error:
        # The library tells the system's errors in words alone.
        found = re.search(r"\(os error (\d+)\)", str(error))
        if found is None:
            raise
        number = int(found[1])
        raise OSError(number, os.strerror(number), str(path)) from None


def read(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors on the CPU and facts. Raises ProxyError with one line."""
    path = folder / FILE
    if not path.is_file():
        raise ProxyError(f"{folder} holds no checkpoint ({FILE})")
    try:
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get("mendel")
            facts = None if header is None else json.loads(header)
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise ProxyError(f"{path} is not readable: {str(error).splitlines()[0]}") from None
    if not isinstance(facts, dict):
        raise ProxyError(f"{path} is not a checkpoint of a training")
    if facts.get("version") != VERSION:
        raise ProxyError(f"{path} has version {facts.get('version')}; this reads {VERSION}")
    return tensors, facts


def difference(saved: object, asked: object, at: str = "") -> str | None:
    """The first place where two JSON values differ, as words; None where they are equal."""
    if isinstance(saved, dict) and isinstance(asked, dict):
        for key in sorted(saved.keys() | asked.keys()):
            found = difference(saved.get(key), asked.get(key), f"{at}.{key}" if at else key)
            if found is not None:
                return found
        return None
    if isinstance(saved, list) and isinstance(asked, list) and len(saved) == len(asked):
        for i, (a, b) in enumerate(zip(saved, asked, strict=True)):
            found = difference(a, b, f"{at}[{i}]")
            if found is not None:
                return found
        return None
    if saved == asked:
        return None
    return f"{at} is {json.dumps(saved)} there and {json.dumps(asked)} here"
