"""What a command's argument means: a notation, a file, a preset, RUN:TRIAL, a training's folder."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from ..genome import presets, published, star
from ..genome.files import GenomeFileError, from_dict, load
from ..genome.genome import Genome
from ..genome.header import DEFAULT_WIDTH
from ..genome.notation import parse
from ..genome.rules import InvalidGenome, require_valid
from ..primitives.catalogue import names
from ..primitives.nearest import nearest, unknown
from .records import TrialRecord
from .run import RunView, open_run
from .store import read_json
from .terminal import Mistake

RUNS = Path("runs")
"""Where a run is looked for by its bare name."""

PLAN = "plan.json"
"""In the folder of `mendel train`: what is trained there."""

GENOME = "genome.yaml"
"""In the folder of an export."""

_TRIAL = re.compile(r"(?P<run>.+):(?P<trial>\d+)")
_STAR = re.compile(r"\s*[\d.]{5,}(\s*-\s*[\d.]{5,})*\s*")
_SUFFIXES = (".yaml", ".yml", ".json")


@dataclass(frozen=True)
class Source:
    """A genome and where it came from; `run` and `trial` are set where it is a trial's, `training`
    where it is the folder of a `mendel train`."""

    text: str
    name: str
    genome: Genome
    run: RunView | None = None
    trial: TrialRecord | None = None
    training: Path | None = None


def find_run(text: str) -> RunView:
    """The run of a folder or of a name under ./runs. Raises Mistake."""
    for path in (Path(text), RUNS / text):
        if path.is_dir():
            return open_run(path)
    here = sorted(p.name for p in RUNS.glob("*") if p.is_dir()) if RUNS.is_dir() else []
    known = f"; {RUNS}/ has {', '.join(here)}" if here else f"; there is nothing in {RUNS}/"
    raise Mistake(f"no run is named {text!r} and it is no folder{known}{nearest(text, here)}")


def find_genome(text: str, width: int | None = None, depth: int | None = None) -> Source:
    """The genome that an argument means. Raises Mistake, or the reader's own one-line error.

    `width` and `depth` are for presets, which scale; a notation takes `width` where it names none.
    """
    found = _find(text, width, depth)
    try:
        require_valid(found.genome)
    except InvalidGenome as error:
        raise Mistake(f"{text}: {error}") from None
    return found


def _find(text: str, width: int | None, depth: int | None) -> Source:
    if not text.strip():
        raise Mistake("the genome is empty; give a notation, a file, a preset or RUN:TRIAL")
    path = Path(text)
    if path.suffix in _SUFFIXES:
        _no_scale(text, "a file", width, depth)
        return Source(text, path.stem, load(path))
    # Not the path's own method, which raises for the length of some notations.
    if os.path.isfile(path / PLAN):
        _no_scale(text, "a training", width, depth)
        return Source(text, path.resolve().name, _planned(path / PLAN), training=path)
    match = _TRIAL.fullmatch(text)
    if match is not None:
        _no_scale(text, "a trial", width, depth)
        run = find_run(match["run"])
        trial = run.trial(int(match["trial"]))
        name = trial.baseline or f"{run.study.name}:{trial.number}"
        return Source(text, name, genome_of(trial, text), run, trial)
    if _STAR.fullmatch(text):
        if depth is not None:
            raise Mistake("--depth is for presets; STAR's integers have the slots that they name")
        genome = star.read(text, width=DEFAULT_WIDTH if width is None else width)
        return Source(text, "genome", genome)
    if text in presets.names():
        return Source(text, text, presets.load(text, width, depth))
    if text in published.names():
        _no_scale(text, "a published model", width, depth)
        return Source(text, text, published.load(text))
    if os.path.exists(path) and text not in names():
        raise Mistake(f"{text} is {other_than_genome(path)}")
    if _is_word(text) and text not in names():
        sentence = f"no preset, primitive, file or trial is named {text!r}"
        known = [*presets.names(), *published.names(), *names()]
        allowed = f"presets are {', '.join(presets.names())}; mendel presets lists models too"
        raise Mistake(unknown(sentence, text, known, allowed))
    if depth is not None:
        raise Mistake("--depth is for presets; a notation has the slots that it names")
    return Source(text, "genome", parse(text, width=DEFAULT_WIDTH if width is None else width))


def genome_of(trial: TrialRecord, text: str) -> Genome:
    """A trial's genome; `text` says whose it is. Raises Mistake where another version wrote what
    this one cannot read."""
    try:
        return from_dict(trial.genome)
    except GenomeFileError as error:
        raise Mistake(f"{text}: {error}") from None


def _planned(path: Path) -> Genome:
    """The genome of a training's plan."""
    try:
        return from_dict(read_json(path).get("genome"))
    except (OSError, ValueError) as error:
        raise Mistake(f"{path}: {error}") from None


def other_than_genome(path: Path) -> str:
    """What a path is that is no genome, and where there is one."""
    if (path / GENOME).is_file():
        return f"an export of mendel; its genome is {path / GENOME}"
    what = "a folder" if path.is_dir() else "a file"
    return f"{what} and no genome; genomes are files that end in {', '.join(_SUFFIXES)}"


def _is_word(text: str) -> bool:
    return re.fullmatch(r"[\w.+-]+", text) is not None


def _no_scale(text: str, what: str, width: int | None, depth: int | None) -> None:
    if width is not None or depth is not None:
        raise Mistake(f"--width and --depth are for presets; {text} is {what} with its own size")
