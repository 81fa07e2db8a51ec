"""The run folders that a dashboard shows: found, followed and never written to."""

from __future__ import annotations

import stat
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from ...genome.files import GenomeFileError, from_dict
from ...primitives.base import GeneError
from ..figures_front import Spreads
from ..front import Outcome, outcome_of
from ..objectives import cheap_values
from ..records import TrialRecord
from ..run import RunState, RunView, open_run
from ..store import RunError

POLL_SECONDS = 0.5
"""The files are looked at this often at most, however many pages are open."""
STUDY_BYTES = 1 << 20
"""A study file above this size is not read."""
_FILES = ("study.yaml", "events.jsonl", "provenance.json", "lock")


def inside(root: Path, path: Path) -> bool:
    """Whether `path` is a regular file within `root`, wherever links lead."""
    try:
        real = path.resolve(strict=True)
        return real.is_relative_to(root.resolve()) and stat.S_ISREG(real.stat().st_mode)
    except (OSError, RuntimeError, ValueError):
        return False


@dataclass
class Watched:
    """One run's folder. Without a `view` the `problem` says in a sentence why."""

    key: str
    folder: Path
    view: RunView | None = None
    problem: str = ""
    state: RunState = "new"
    version: int = 0
    """Grows with every change that a page could show."""
    stamp: tuple[float, int] = (0.0, 0)
    _outcome: tuple[int, Outcome] | None = None
    _counted: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def run(self) -> RunView:
        assert self.view is not None
        return self.view

    def outcome(self) -> Outcome:
        """The run's outcome in all its objectives, computed once per version."""
        if self._outcome is None or self._outcome[0] != self.version:
            self._outcome = (self.version, outcome_of(self.run))
        return self._outcome[1]

    def counted(self, trials: Sequence[TrialRecord]) -> dict[int, dict[str, float]]:
        """Objectives of untrained trials that can be counted from the genome, by number."""
        found = {}
        for trial in trials:
            if trial.hash not in self._counted:
                try:
                    values = cheap_values(self.run.goals, from_dict(trial.genome))
                except (GenomeFileError, GeneError):
                    values = {}
                self._counted[trial.hash] = values
            found[trial.number] = self._counted[trial.hash]
        return found

    def trial(self, number: int) -> TrialRecord | None:
        """The trial of that number, if there is one."""
        try:
            return self.run.trial(number)
        except RunError:
            return None

    def progress(self) -> tuple[int, int]:
        """Candidates that ended, and those that the study asks for."""
        ended = sum(
            t.baseline is None and t.state in ("complete", "stopped", "failed")
            for t in self.run.trials
        )
        return ended, self.run.study.search.trials

    def eta(self) -> float | None:
        """Seconds left at the pace of the driver's present life; None where there is no basis."""
        ended, wanted = self.progress()
        if self.state != "running" or not self.run.lives:
            return None
        began = self.run.lives[-1].began
        here = sum(
            t.baseline is None and t.state in ("complete", "stopped", "failed")
            for t in self.run.trials
            if t.finished >= began
        )
        if not here:
            return None
        elapsed = (datetime.now(UTC) - datetime.fromisoformat(began)).total_seconds()
        return max(0.0, elapsed / here * (wanted - ended))


class Watch:
    """All runs of a folder, or the one run that the folder is. `lock` is held while a page is
    made, so that no page sees half of a change."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.runs: dict[str, Watched] = {}
        self.version = 0
        self.lock = threading.RLock()
        self._polled = float("-inf")

    def poll(self) -> None:
        """Take in what was written since the last call."""
        with self.lock:
            if time.monotonic() - self._polled < POLL_SECONDS:
                return
            folders = self._folders()
            for key in [k for k in self.runs if k not in folders]:
                del self.runs[key]
                self.version += 1
            for key, folder in folders.items():
                self._follow(key, folder)
            self._polled = time.monotonic()

    def sentence(self) -> str:
        """Why there is nothing to show; empty where there are runs."""
        if self.runs:
            return ""
        if not self.root.is_dir():
            return (
                f"The folder {self.root} does not exist (any more). It appears with the first "
                "search; this page waits for it."
            )
        return (
            f"There is no run in {self.root} yet. Start one with: mendel search study.yaml. "
            "It shows here by itself."
        )

    def get(self, key: str | None) -> Watched | None:
        """The run of that key; only what a look into the folder found has one."""
        return self.runs.get(key) if key is not None else None

    def curves(self, watched: Watched, number: int) -> dict[str, list[dict[str, float]]]:
        """The learning curves of a trial; empty where there are none or they lie elsewhere."""
        path = watched.run.trial_folder(number) / "curves.json"
        if not inside(self.root, path):
            return {}
        found = watched.run.curves(number)
        return {str(k): rows for k, v in found.items() if (rows := _rows(v))}

    def over_seeds(self, watched: Watched) -> Spreads:
        """Least and most of each objective, for genomes that runs of the same study with another
        seed have trained too."""
        mine = _asked(watched, ("seed",))
        others = [
            w
            for w in self.runs.values()
            if w is not watched and w.view is not None and _asked(w, ("seed",)) == mine
        ]
        if not others:
            return {}
        values: dict[str, dict[str, list[float]]] = {}
        for w in (watched, *others):
            for trial in w.run.trials:
                if trial.state == "complete":
                    for label, value in trial.values.items():
                        values.setdefault(trial.hash, {}).setdefault(label, []).append(value)
        return {
            key: {label: (min(v), max(v)) for label, v in by_label.items() if len(v) > 1}
            for key, by_label in values.items()
        }

    def random_search(self, watched: Watched) -> Watched | None:
        """A run of the same study with the random sampler, beside another sampler's run."""
        if watched.run.study.search.sampler == "random":
            return None
        mine = _asked(watched, ("sampler", "seed", "trials"))
        rivals = (
            w
            for w in self.runs.values()
            if w.view is not None
            and w.view.study.search.sampler == "random"
            and _asked(w, ("sampler", "seed", "trials")) == mine
        )
        return next(rivals, None)

    def _folders(self) -> dict[str, Path]:
        if (self.root / "study.yaml").exists():
            return {self.root.resolve().name: self.root}
        try:
            children = sorted(self.root.iterdir())
        except OSError:
            return {}
        marks = ("study.yaml", "events.jsonl")
        return {
            p.name: p
            for p in children
            if p.is_dir()
            and p.resolve().is_relative_to(self.root.resolve())
            and any((p / mark).exists() for mark in marks)
        }

    def _follow(self, key: str, folder: Path) -> None:
        watched = self.runs.setdefault(key, Watched(key, folder))
        before = (watched.problem, watched.state)
        problem, stamp = self._outside(folder), _stamp(folder / "study.yaml")
        changed = False
        if problem:
            watched.view, watched.problem = None, problem
        elif watched.view is None or stamp != watched.stamp:
            watched.stamp = stamp
            try:
                watched.view, watched.problem = open_run(folder), ""
                changed = True
            except (RunError, OSError) as error:
                watched.view, watched.problem = None, f"This run cannot be read. {error}"
        else:
            changed = watched.view.refresh()
        watched.state = watched.view.state if watched.view is not None else "new"
        if changed or (watched.problem, watched.state) != before:
            watched.version += 1
            self.version += 1

    def _outside(self, folder: Path) -> str:
        for name in _FILES:
            path = folder / name
            if (path.exists() or path.is_symlink()) and not inside(self.root, path):
                return f"This run is not shown: its {name} is no file within {self.root}."
        if not (folder / "study.yaml").exists():
            return "This run cannot be read: its study.yaml is missing."
        if (folder / "study.yaml").stat().st_size > STUDY_BYTES:
            return "This run cannot be read: its study.yaml is larger than 1 MiB."
        return ""


def _stamp(path: Path) -> tuple[float, int]:
    try:
        status = path.stat()
    except OSError:
        return (0.0, 0)
    return (status.st_mtime, status.st_ino)


def _asked(watched: Watched, free: tuple[str, ...]) -> object:
    """What a study asks, but for its name and some keys of its search."""
    dump = watched.run.study.model_dump(
        mode="json", exclude={"name", "question", "workers", "runs", "storage"}
    )
    dump["search"] = {k: v for k, v in dump["search"].items() if k not in free}
    return dump


def _rows(curve: object) -> list[dict[str, float]]:
    """Rows of a curve that hold a step and numbers; a foreign file may hold anything."""
    if not isinstance(curve, list):
        return []
    rows = [
        {k: v for k, v in row.items() if isinstance(v, int | float)}
        for row in curve
        if isinstance(row, dict)
    ]
    return [row for row in rows if "step" in row]
