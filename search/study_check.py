"""What only a look at the machine can tell of a study: each answers in words, None where all is
well, and nothing is created."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import torch
from sqlalchemy import create_engine, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError

from .worker import find

SECONDS = 5
"""For which an answer is waited."""


def unwritable(folder: Path) -> str | None:
    """Why a folder cannot be made or written."""
    for place in (folder, *folder.absolute().parents):
        if place.is_dir():
            writable = os.access(place, os.W_OK | os.X_OK)
            return None if writable else f"{place} cannot be written"
        if place.exists():
            return f"{place} is not a folder"
    return f"{folder} has no folder above it"


def unloadable(evaluate: str) -> str | None:
    """Why the function at `module:name` cannot be had. Imports the module."""
    try:
        function = find(evaluate)
    except (Exception, SystemExit) as error:
        # The module is the user's: anything can go wrong in it.
        return f"{evaluate} cannot be loaded: {type(error).__name__}: {_line(error)}"
    return None if callable(function) else f"{evaluate} is not a function"


def missing_device(name: str) -> str | None:
    """Why a device is not there."""
    if not name.startswith("cuda"):
        return None
    if not torch.cuda.is_available():
        return f"torch finds no CUDA device on this machine, so not {name!r}; there are auto, cpu"
    count = torch.cuda.device_count()
    if int(name.partition(":")[2] or 0) >= count:
        there = ", ".join(f"cuda:{n}" for n in range(count))
        return f"there is no {name}; there are auto, cpu, cuda, {there}"
    return None


def unreachable(address: str) -> str | None:
    """Why there is no Ray cluster at an address; Ray itself would try on and on."""
    if address in ("auto", "local"):
        return None
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not (host and port.isascii() and port.isdigit()):
        return f"{address!r} is no address; it is auto, HOST:PORT or ray://HOST:PORT"
    try:
        socket.create_connection((host, int(port)), timeout=SECONDS).close()
    except (OSError, OverflowError) as error:
        return f"nobody answers at {address}: {getattr(error, 'strerror', None) or error}"
    return None


def unopenable(storage: str) -> str | None:
    """Why Optuna could not keep a run at this URL of a database."""
    try:
        url = make_url(storage)
        engine = create_engine(url)
        file = url.database if url.get_backend_name() == "sqlite" else None
        if file and file != ":memory:" and not Path(file).exists():
            # To connect would make the file.
            if not Path(file).absolute().parent.is_dir():
                return f"{storage}: {Path(file).parent} is not a folder"
            return unwritable(Path(file).absolute().parent)
        with engine.connect() as connection:
            connection.execute(text("SELECT 1" if file is None else "PRAGMA schema_version"))
        engine.dispose()
    except (SQLAlchemyError, ImportError, ValueError) as error:
        allowed = "the URL of a database is allowed, such as sqlite:///runs.db"
        return f"{storage} cannot be opened: {_line(error)}; {allowed}"
    return None


def _line(error: BaseException) -> str:
    """The first line of what went wrong; a driver's own words, without SQLAlchemy's around."""
    words = str(getattr(error, "orig", None) or error).strip() or type(error).__name__
    return words.splitlines()[0].rstrip(".")[:200]
