"""Files that the pages link to: pictures of architectures, and exports of trials."""

from __future__ import annotations

import io
import re
import tempfile
import zipfile
from pathlib import Path

from flask import Flask, Response, request

from ...genome.files import from_dict
from ..exports.folder import export
from ..exports.formats import DEFAULT, FORMATS
from ..exports.order import Order
from ..exports.proof import files_of
from ..source import Source
from ..terminal import Mistake
from .designs import UNREADABLE, design, drawing
from .watch import Watch, Watched


def serve_files(server: Flask, watch: Watch) -> None:
    """Add the addresses /picture and /export."""

    @server.get("/picture")
    def _picture() -> Response:
        with watch.lock:
            watched = _run(watch)
            key = request.args.get("trial") or f"preset:{request.args.get('preset', '')}"
            if watched is None:
                return _gone("There is no such run.")
            try:
                found = design(watched, key)
                if found is None:
                    return _gone("There is no such design.")
                return Response(drawing(watched, found), mimetype="image/svg+xml")
            except UNREADABLE as error:
                return _gone(f"This genome cannot be drawn: {error}")

    @server.get("/export")
    def _export() -> Response:
        with watch.lock:
            watched = _run(watch)
            number = request.args.get("trial", "")
            if watched is None:
                return _gone("There is no such run.")
            if not (number.isascii() and number.isdigit() and len(number) < 10):
                return _gone("A trial is a number.")
            kind = request.args.get("format", DEFAULT)
            if kind not in FORMATS:
                return _gone(f"format is one of {', '.join(FORMATS)}.")
            try:
                return _packed(watched, int(number), kind, request.args.get("file"))
            except UNREADABLE as error:
                return _gone(f"This trial cannot be exported: {error}")
            except Mistake as error:
                return _gone(str(error))


def export_files() -> tuple[str, ...]:
    """The names of the files of an export that can be had one by one."""
    return ("genome.yaml", "genome.json", "costs.json", "scores.json", "provenance.json")


def _run(watch: Watch) -> Watched | None:
    watched = watch.get(request.args.get("run"))
    return watched if watched is not None and watched.view is not None else None


def _packed(watched: Watched, number: int, to: str, wanted: str | None) -> Response:
    """The export of a trial as a zip archive, or one file of it."""
    trial = watched.trial(number)
    if trial is None:
        return _gone("There is no such trial.")
    name = f"{_plain(watched.key)}-trial-{number:05d}"
    title = trial.baseline or f"{watched.run.study.name}:{number}"
    genome = from_dict(trial.genome)
    source = Source(f"{watched.key}:{number}", title, genome, watched.run, trial)
    with tempfile.TemporaryDirectory(prefix="mendel-") as scratch:
        folder = export(Order(source), Path(scratch) / name, to)
        files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in files_of(folder)}
    if wanted is not None:
        if wanted not in files:
            return _gone(f"An export has {', '.join(files)}.")
        return _attachment(files[wanted], f"{name}-{wanted}", "application/octet-stream")
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for path, content in files.items():
            archive.writestr(f"{name}/{path}", content)
    return _attachment(packed.getvalue(), f"{name}.zip", "application/zip")


def _plain(text: str) -> str:
    """A run's name as part of a file's name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.") or "run"


def _attachment(content: bytes, name: str, kind: str) -> Response:
    answer = Response(content, mimetype=kind)
    answer.headers["Content-Disposition"] = f'attachment; filename="{name}"'
    return answer


def _gone(text: str) -> Response:
    return Response(text + "\n", status=404, mimetype="text/plain")
