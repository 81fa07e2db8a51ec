"""Designs that a page shows: trials and presets, their pictures, differences and lineage."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass

from ...genome import presets
from ...genome.cost import DEFAULT_CONTEXT, cost
from ...genome.files import GenomeFileError, from_dict
from ...genome.genome import Genome
from ...genome.notation import show_slot
from ...genome.presets import PresetError
from ...primitives.base import DTYPES, GeneError
from ..objectives import CacheSettings
from ..outline import Outline, outline
from ..picture import picture
from ..records import TrialRecord
from .watch import Watched

UNREADABLE = (GenomeFileError, GeneError, PresetError)
"""What reading a genome may raise; the message is a sentence."""

PRESET = "preset:"
MOST_ANCESTORS = 40

_DARK = (
    "@media (prefers-color-scheme:dark){svg{--paper:#14171c;--ink:#e6e9ef;--faint:#a3acba;"
    "--mixer:#56b4e9;--channel:#e69f00;--link:#d98bb9}}"
)


@dataclass(frozen=True)
class Design:
    """A trial, or a preset at the study's size."""

    key: str
    """A trial's number, or `preset:` and a name; what addresses hold."""
    name: str
    genome: Genome
    trial: TrialRecord | None = None


def design(watched: Watched, key: str) -> Design | None:
    """The design of that key; None where there is none. Raises one of UNREADABLE."""
    if key.startswith(PRESET):
        name = key.removeprefix(PRESET)
        if name not in presets.names():
            return None
        space = watched.run.study.space
        return Design(key, name, presets.load(name, width=max(space.width), depth=space.depth[1]))
    if not (key.isascii() and key.isdigit() and len(key) < 10):
        return None
    trial = watched.trial(int(key))
    if trial is None:
        return None
    name = trial.baseline or f"trial {trial.number}"
    return Design(str(trial.number), name, from_dict(trial.genome), trial)


def context_of(watched: Watched) -> tuple[int, str]:
    """Context and dtype that caches are shown at: those of the study's objective, if it has one."""
    for goal in watched.run.goals:
        if isinstance(goal.settings, CacheSettings):
            return goal.settings.context, goal.settings.dtype
    return DEFAULT_CONTEXT, "bf16"


def outline_of(watched: Watched, found: Design) -> Outline:
    """The content of a drawing, with costs at the study's context."""
    context, dtype = context_of(watched)
    return outline(found.genome, cost(found.genome, context, DTYPES[dtype]))


def drawing(watched: Watched, found: Design) -> str:
    """The picture as an SVG file that follows the reader's colour scheme by itself."""
    svg = picture(outline_of(watched, found), f"architecture of {found.name}")
    return svg.replace("<style>", f"<style>{_DARK}", 1)


def slots_of(genome: Genome) -> list[str]:
    """Each slot in notation."""
    return [show_slot(slot) for slot in genome.slots]


def differences(before: Genome, after: Genome) -> list[tuple[str, str]]:
    """What makes one genome the other: (`-`, `+` or `~`, a sentence's part), in order."""
    found: list[tuple[str, str]] = []
    for name in ("width", "position", "norm", "placement", "residual", "embedding_norm", "tied"):
        old, new = getattr(before, name), getattr(after, name)
        if old != new:
            found.append(("~", f"{name}: {old} becomes {new}"))
    a, b = slots_of(before), slots_of(after)
    for kind, i, j, k, m in difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        if kind == "equal":
            continue
        found += [("-", f"slot {n}: {a[n]}") for n in range(i, j)]
        found += [("+", f"slot {n}: {b[n]}") for n in range(k, m)]
    return found


@dataclass(frozen=True)
class Ancestor:
    """A step back in a lineage."""

    generation: int
    trial: TrialRecord
    changes: tuple[tuple[str, str], ...]
    """Against its first parent; empty where it has none or one of the two cannot be read."""


def lineage(watched: Watched, trial: TrialRecord) -> list[Ancestor]:
    """The trial and its ancestors, parents before grandparents, back to baselines and random
    starts; at most MOST_ANCESTORS."""
    found: list[Ancestor] = []
    seen = {trial.number}
    queue = [(0, trial)]
    while queue and len(found) < MOST_ANCESTORS:
        generation, current = queue.pop(0)
        parents = [p for n in current.parents if (p := watched.trial(n)) is not None]
        changes: list[tuple[str, str]] = []
        if parents:
            try:
                changes = differences(from_dict(parents[0].genome), from_dict(current.genome))
            except UNREADABLE:
                changes = []
        found.append(Ancestor(generation, current, tuple(changes)))
        for parent in parents:
            if parent.number not in seen:
                seen.add(parent.number)
                queue.append((generation + 1, parent))
    return found


def choices(watched: Watched, also: Mapping[str, str]) -> list[dict[str, str]]:
    """What can be compared: the front, the baselines, the presets, and what is chosen already."""
    found = watched.outcome()
    options = {str(t.number): _label(t) for t in (*found.front[:60], *found.baselines)}
    options |= {PRESET + name: f"preset {name}" for name in presets.names()}
    options |= also
    return [{"label": label, "value": key} for key, label in options.items()]


def _label(trial: TrialRecord) -> str:
    return f"{trial.number} {trial.baseline}" if trial.baseline else f"trial {trial.number}"
