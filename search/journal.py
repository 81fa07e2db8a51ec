"""Optuna's journal file with one writer: the run's lock stands in for lock files and most syncs.

Optuna's own backend takes a lock file and syncs the disk for each of the five or so entries of a
trial, which costs more than everything else that the driver does. A killed driver loses nothing
that was handed to the operating system; a machine that loses power loses at most SYNC_SECONDS.
"""

from __future__ import annotations

import json
import os
import time
from collections import deque
from collections.abc import Generator
from pathlib import Path
from typing import Any

from optuna.storages.journal import BaseJournalBackend

SYNC_SECONDS = 1.0


class RunJournal(BaseJournalBackend):
    """Entries as lines of JSON, as in `optuna.storages.journal.JournalFileBackend`, whose readers
    (such as optuna-dashboard) can read along. The caller holds the run and has healed the file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("ab")
        with path.open("rb") as handle:
            self._count = sum(1 for _ in handle)
        self._fresh: deque[tuple[int, bytes]] = deque()
        """Appended entries, by number, that were not read back yet."""
        self._synced = time.monotonic()

    def read_logs(self, log_number_from: int) -> Generator[dict[str, Any], None, None]:
        first = self._fresh[0][0] if self._fresh else self._count
        if log_number_from < first:
            with self._path.open("rb") as handle:
                for number, line in enumerate(handle):
                    if log_number_from <= number < first:
                        yield json.loads(line)
        while self._fresh:
            number, line = self._fresh.popleft()
            if number >= log_number_from:
                yield json.loads(line)

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        lines = [json.dumps(log, separators=(",", ":")).encode() + b"\n" for log in logs]
        self._file.write(b"".join(lines))
        self._file.flush()
        for line in lines:
            self._fresh.append((self._count, line))
            self._count += 1
        if time.monotonic() - self._synced > SYNC_SECONDS:
            self._sync()

    def close(self) -> None:
        """Sync and close."""
        self._sync()
        self._file.close()

    def _sync(self) -> None:
        os.fsync(self._file.fileno())
        self._synced = time.monotonic()
