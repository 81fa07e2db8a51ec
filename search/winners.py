"""The winners of a run as files: one folder per found member of the front."""

from __future__ import annotations

import shutil
from pathlib import Path

from ..genome.files import from_dict
from .exports.folder import export
from .exports.order import Order
from .front import Outcome
from .run import RunView
from .source import Source

FOLDER = "winners"


def write_winners(run: RunView, found: Outcome) -> list[Path]:
    """Export every found member of the front into `winners/trial-00012/`; the folders.

    Folders of trials that are no longer on the front are taken away."""
    place = run.folder / FOLDER
    chosen = {f"trial-{t.number:05d}": t for t in found.front if t.baseline is None}
    for old in place.glob("trial-*"):
        if old.name not in chosen:
            shutil.rmtree(old)
    written = []
    for name, trial in chosen.items():
        text = f"{run.folder}:{trial.number}"
        title = f"{run.study.name}:{trial.number}"
        source = Source(text, title, from_dict(trial.genome), run, trial)
        written.append(export(Order(source), place / name, force=True))
    return written
