"""A run as readers see it: without locks, live or long over, tolerant of half-written lines."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from .objectives import Goal
from .pareto import Frame, as_losses
from .records import Failure, Measurement, RungResult, TrialRecord
from .store import RunError, locked, trial_folder
from .study import Study, StudyError, load_study

RunState = Literal["new", "running", "interrupted", "complete"]


class RunView:
    """A reader's view. `refresh` takes in what was written since."""

    def __init__(self, folder: Path, study: Study) -> None:
        self.folder = folder
        self.study = study
        self.trials: list[TrialRecord] = []
        """By number, without gaps except where a line is damaged."""
        self.remarks: list[str] = []
        """What the driver said about the run as a whole, such as why it ended early."""
        self._by_number: dict[int, TrialRecord] = {}
        self._offset = 0
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
        path = self.folder / "events.jsonl"
        try:
            handle = path.open("rb")
        except FileNotFoundError:
            return False
        changed = False
        with handle:
            handle.seek(self._offset)
            for line in handle:
                if not line.endswith(b"\n"):
                    break
                self._offset += len(line)
                try:
                    event = json.loads(line)
                except ValueError:
                    continue
                self._apply(event)
                changed = True
        if changed:
            self.trials = [self._by_number[n] for n in sorted(self._by_number)]
        return changed

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
        if kind == "begin":
            self._ended = False
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
                record.rungs.append(rung_result(event["result"]))
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
