"""The run's folder: what the driver writes, so that a kill at any moment loses nothing finished.

study.yaml        the study as it was asked, frozen
provenance.json   versions, commit, seed, device, fingerprints of the data
journal.log       Optuna's journal (unless the study names another storage)
events.jsonl      one line per event, appended; what readers follow
trials/00012/     genome.json, result.json, curves.json, checkpoints
lock              held by the driver that is at work
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

from .records import FULL_DISK
from .study import Study, load_study

CHECKPOINTS = "checkpoints"
"""The subfolder of a trial that is deleted when the trial is stopped or fails."""

_FREE_TO_CHANGE = {"workers", "runs", "question"}
_MEASURED_ON = ("device", "threads")
"""Of the workers; measurements under others do not compare."""


class RunError(Exception):
    """A run that cannot be opened or go on. The message is one line."""


def now() -> str:
    """The time as ISO 8601, UTC."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all, even over an older one. Raises OSError with its name."""
    scratch = path.with_name(path.name + f".{os.getpid()}.part")
    try:
        scratch.write_text(text, encoding="utf-8")
        os.replace(scratch, path)
    except OSError as error:
        # A folder that cannot be written to cannot be tidied either.
        with suppress(OSError):
            scratch.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def write_json(path: Path, value: Any) -> None:
    """Write JSON whole or not at all."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where the file is missing."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    return content if isinstance(content, dict) else {}


@contextmanager
def storage_errors(folder: Path) -> Iterator[None]:
    """A full or failing disk becomes one line that says that the run can go on later."""
    try:
        yield
    except OSError as error:
        what = "no space is left" if error.errno in FULL_DISK else (error.strerror or str(error))
        where = error.filename or folder
        raise RunError(
            f"{where}: {what}; nothing finished is lost, the same command resumes {folder}"
        ) from error


class RunStore:
    """One driver's hold on a run's folder. Use as a context manager."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock: TextIO | None = None
        self._events: TextIO | None = None
        self._made: set[int] = set()
        """Trials whose folders are there."""
        self._told: dict[tuple[Any, ...], str] = {}
        """When each event that is told once was told."""

    @classmethod
    def open(cls, study: Study) -> RunStore:
        """Create the run's folder, or take up an existing one whose study is the same.

        Raises RunError where another driver is at work or the study differs, StudyError where the
        folder cannot be made."""
        store = cls(study.folder)
        try:
            store.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            why = error.strerror or str(error)
            raise study.error(("runs",), f"{study.folder} cannot be made: {why}") from None
        with storage_errors(study.folder):
            store._take_lock()
            try:
                store._freeze(study)
                (store.folder / "trials").mkdir(exist_ok=True)
                for name in ("journal.log", "events.jsonl"):
                    heal(store.folder / name)
                events = read_events(store.events_path)
                store._told = {_identity(e): e.get("at", "") for e in events}
                store._events = store.events_path.open("a", encoding="utf-8")
            except BaseException:
                store.close()
                raise
        return store

    def __enter__(self) -> RunStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the folder back."""
        for handle in (self._events, self._lock):
            if handle is not None:
                handle.close()
        self._events = self._lock = None

    @property
    def events_path(self) -> Path:
        return self.folder / "events.jsonl"

    @property
    def journal_path(self) -> Path:
        return self.folder / "journal.log"

    def trial_folder(self, number: int) -> Path:
        """The folder of a trial; made where it is missing."""
        folder = trial_folder(self.folder, number)
        if number not in self._made:
            folder.mkdir(parents=True, exist_ok=True)
            self._made.add(number)
        return folder

    def drop_checkpoints(self, number: int) -> None:
        shutil.rmtree(trial_folder(self.folder, number) / CHECKPOINTS, ignore_errors=True)

    def tell(self, event: str, number: int | None = None, **content: Any) -> bool:
        """Append an event, unless an earlier life of the run has told it. A `rung` event is told
        once per trial and rung, a `start` and an `end` once per trial, others as often as they
        happen. Returns whether it was new."""
        line: dict[str, Any] = {"event": event, "at": now()}
        if number is not None:
            line["trial"] = number
        line |= content
        identity = _identity(line)
        if event in ("start", "rung", "end"):
            if identity in self._told:
                return False
            self._told[identity] = line["at"]
        assert self._events is not None
        self._events.write(json.dumps(line, separators=(",", ":"), ensure_ascii=False) + "\n")
        self._events.flush()
        return True

    def when(self, event: str, number: int) -> str:
        """When a `start` or `end` was told."""
        return self._told[event, number, None]

    def _take_lock(self) -> None:
        handle = (self.folder / "lock").open("a+", encoding="utf-8")
        try:
            _flock(handle)
        except OSError:
            handle.seek(0)
            holder = handle.read().strip()
            handle.close()
            who = f" (process {holder})" if holder else ""
            raise RunError(f"{self.folder}: another search is at work on this run{who}") from None
        handle.truncate(0)
        handle.write(str(os.getpid()))
        handle.flush()
        self._lock = handle

    def _freeze(self, study: Study) -> None:
        path = self.folder / "study.yaml"
        if path.exists():
            earlier = load_study(path, check=False)
            key = difference(_comparable(earlier), _comparable(study))
            if key is None and study.search.trials < earlier.search.trials:
                key = "search.trials"
            if key is not None:
                raise RunError(
                    f"{self.folder}: this run was started with another study: {key} differs "
                    "(search.trials may grow, and workers may change but for the device and the "
                    "threads of what is measured; else give it a new name)"
                )
            if study.text == earlier.text:
                return
        write_text(path, study.text)


def _flock(handle: TextIO) -> None:
    """Take the lock; raises OSError where a driver has it. A reader that asks who holds the run
    (`locked`) has it for an instant, so one refusal is not believed."""
    for _ in range(4):
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        time.sleep(0.05)
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def trial_folder(folder: Path, number: int) -> Path:
    return folder / "trials" / f"{number:05d}"


def locked(folder: Path) -> bool:
    """Whether a driver is at work on the run."""
    try:
        with (folder / "lock").open("r", encoding="utf-8") as handle:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError as error:
        return error.errno in (errno.EWOULDBLOCK, errno.EACCES)
    return False


def heal(path: Path) -> None:
    """Cut off a last line that a kill left half-written."""
    if not path.exists():
        return
    with path.open("r+b") as handle:
        size = handle.seek(0, os.SEEK_END)
        position, tail = size, b""
        while position > 0 and b"\n" not in tail.removesuffix(b"\n"):
            step = min(position, 65536)
            position -= step
            handle.seek(position)
            tail = handle.read(step) + tail
        whole = tail.endswith(b"\n") or not tail
        start = tail.removesuffix(b"\n").rfind(b"\n") + 1
        if whole and tail:
            try:
                json.loads(tail[start:])
            except ValueError:
                whole = False
        if not whole:
            handle.truncate(position + start)


def read_events(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of an events file; a half-written last line is left out."""
    if not path.exists():
        return
    with path.open("rb") as handle:
        for line in handle:
            if not line.endswith(b"\n"):
                return
            try:
                event = json.loads(line)
            except ValueError:
                continue
            if isinstance(event, dict):
                yield event


def difference(old: Any, new: Any, key: str = "") -> str | None:
    """The dotted key of the first difference between two JSON values."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for name in [*old, *(n for n in new if n not in old)]:
            below = f"{key}.{name}" if key else str(name)
            if name not in old or name not in new:
                return below
            if (found := difference(old[name], new[name], below)) is not None:
                return found
        return None
    return None if old == new else key


def _comparable(study: Study) -> dict[str, Any]:
    dump = study.model_dump(mode="json", exclude=_FREE_TO_CHANGE)
    dump["search"].pop("trials")
    if any(goal.objective.stage == "measured" for goal in study.goals):
        dump["workers"] = {key: getattr(study.workers, key) for key in _MEASURED_ON}
    return dump


def _identity(event: Mapping[str, Any]) -> tuple[Any, ...]:
    result = event.get("result")
    rung = result.get("rung") if isinstance(result, Mapping) else None
    return event.get("event"), event.get("trial"), rung
