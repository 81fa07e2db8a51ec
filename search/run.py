"""A run as readers see it: without locks, live or long over, tolerant of half-written lines."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from .objectives import Goal
from .pareto import Frame, as_losses
from .records import Failure, Measurement, RungResult, TrialRecord
from .store import RunError, locked, trial_folder
from .study import Study, StudyError, load_study

RunState = Literal["new", "running", "interrupted", "complete"]


@dataclass
class Life:
    """One driver's time on a run; `last` is when it was last heard of. ISO 8601, UTC."""

    began: str
    workers: int
    last: str


@dataclass(frozen=True)
class Work:
    """A rung of a trial that ended at `at` (ISO 8601, UTC) after `seconds` on a worker."""

    trial: int
    rung: int
    at: str
    seconds: float


class RunView:
    """A reader's view. `refresh` takes in what was written since."""

    def __init__(self, folder: Path, study: Study) -> None:
        self.folder = folder
        self.study = study
        self.trials: list[TrialRecord] = []
        """By number, without gaps except where a line is damaged."""
        self.remarks: list[str] = []
        """What the driver said about the run as a whole, such as why it ended early."""
        self.lives: list[Life] = []
        self.work: list[Work] = []
        """In the order in which rungs ended."""
        self.damaged = 0
        """Lines that could not be read as events."""
        self._by_number: dict[int, TrialRecord] = {}
        self._offset = 0
        self._file: tuple[int, int] | None = None
        """Device and inode of the file that was read so far."""
        self._ended = False
        self.refresh()

    @property
    def goals(self) -> list[Goal]:
        return self.study.goals

    @property
    def provenance(self) -> dict[str, Any]:
        """What provenance.json holds; empty where it is not written yet."""
        try:
            content = json.loads((self.folder / "provenance.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    @property
    def state(self) -> RunState:
        """`running` while a driver holds the run; `complete` when the last one ended it."""
        if locked(self.folder):
            return "running"
        if self._ended:
            return "complete"
        return "interrupted" if self.trials else "new"

    def refresh(self) -> bool:
        """Read the events appended since the last call. Returns whether there were any."""
        try:
            handle = (self.folder / "events.jsonl").open("rb")
        except OSError:
            return False
        changed = False
        with handle:
            status = os.fstat(handle.fileno())
            if self._offset and not self._goes_on(handle, status):
                self._forget()
                changed = True
            self._file = (status.st_dev, status.st_ino)
            handle.seek(self._offset)
            for line in handle:
                if not line.endswith(b"\n"):
                    break
                self._offset += len(line)
                changed = True
                try:
                    self._apply(json.loads(line))
                except (ValueError, KeyError, TypeError, AttributeError):
                    self.damaged += 1
        if changed:
            self.trials = [self._by_number[n] for n in sorted(self._by_number)]
        return changed

    def _goes_on(self, handle: BinaryIO, status: os.stat_result) -> bool:
        """Whether the file is the one that was read, with that much of it still there: a resume may
        have cut off a damaged line, and a run may have been deleted and begun anew."""
        if self._file != (status.st_dev, status.st_ino) or status.st_size < self._offset:
            return False
        handle.seek(self._offset - 1)
        return handle.read(1) == b"\n"

    def _forget(self) -> None:
        self.trials, self.remarks, self.lives, self.work = [], [], [], []
        self._by_number = {}
        self.damaged = self._offset = 0
        self._ended = False

    def trial(self, number: int) -> TrialRecord:
        """The trial of that number; RunError with the numbers that there are."""
        try:
            return self._by_number[number]
        except KeyError:
            there = f"0 to {max(self._by_number)}" if self._by_number else "none yet"
            raise RunError(f"{self.folder}: there is no trial {number}; trials: {there}") from None

    def trial_folder(self, number: int) -> Path:
        return trial_folder(self.folder, number)

    def curves(self, number: int) -> dict[str, list[dict[str, Any]]]:
        """Per proxy the training curve; empty where none was written."""
        try:
            text = (self.trial_folder(number) / "curves.json").read_text(encoding="utf-8")
            content = json.loads(text)
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    def frame(self) -> Frame:
        """How the run's losses are normalised: a score by its definition's bounds, anything else by
        the span over the baselines and the first `population` candidates that ended a rung. Fixed
        once those have ended one."""
        return frame_of(self.goals, self.trials, self.study.search.population)

    def _apply(self, event: Mapping[str, Any]) -> None:
        kind = event.get("event")
        if self.lives and kind != "begin":
            self.lives[-1].last = event["at"]
        if kind == "begin":
            self._ended = False
            self.lives.append(Life(event["at"], int(event.get("workers", 1)), event["at"]))
        elif kind == "complete":
            self._ended = True
        elif kind == "remark":
            self.remarks.append(str(event["text"]))
        elif kind == "start":
            number = int(event["trial"])
            self._by_number[number] = TrialRecord(
                number,
                "running",
                event["genome"],
                event["notation"],
                event["hash"],
                event["baseline"],
                list(event["parents"]),
                event["variation"],
                constraints=event["constraints"],
                started=event["at"],
            )
        elif kind in ("rung", "end") and event.get("trial") in self._by_number:
            record = self._by_number[event["trial"]]
            if kind == "rung":
                result = rung_result(event["result"])
                record.rungs.append(result)
                self.work.append(Work(record.number, result.rung, event["at"], result.seconds))
            else:
                record.state = event["state"]
                record.finished = event["at"]
                record.failure = Failure(**event["failure"]) if event.get("failure") else None


def frame_of(goals: Sequence[Goal], trials: Iterable[TrialRecord], population: int) -> Frame:
    """See `RunView.frame`; `trials` in order of their numbers."""
    judged = [t for t in trials if t.rungs]
    first = [t for t in judged if t.baseline is None][:population]
    basis = [t for t in judged if t.baseline is not None] + first
    rows = [[g.loss(t.values[g.label]) for g in goals] for t in basis]
    return Frame.around(as_losses(rows), [g.loss_bounds() for g in goals])


def rung_result(content: Mapping[str, Any]) -> RungResult:
    """A rung's result from its JSON form."""
    measurements = {k: Measurement(**v) for k, v in content.get("measurements", {}).items()}
    return RungResult(**{**content, "measurements": measurements})


def open_run(path: Path | str) -> RunView:
    """Open a run's folder for reading. Raises RunError with one line where there is none."""
    folder = Path(path)
    if not (folder / "study.yaml").is_file():
        raise RunError(f"{folder}: there is no run here (study.yaml is missing)")
    try:
        return RunView(folder, load_study(folder / "study.yaml", check=False))
    except StudyError as error:
        raise RunError(str(error)) from None
