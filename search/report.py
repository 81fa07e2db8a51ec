"""`report.html`: a run on one self-contained page, for people who were not there."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Any

from ..genome.cost import DEFAULT_CONTEXT, cost
from ..genome.files import GenomeFileError, from_dict
from ..primitives.base import DTYPES, GeneError
from . import loads
from .figures import curves_figure, hypervolume_figure
from .figures_front import front_figure
from .front import Outcome, label_text, outcome_of, shown_value
from .objectives import CacheSettings, Goal
from .outline import outline
from .page import Page, fold, table, text
from .picture import picture
from .records import TrialRecord
from .run import RunView
from .store import write_text
from .units import duration_text

FILE = "report.html"
MOST_WINNERS = 8
"""Members of the front that are drawn; the others stand in the table."""
MOST_CURVES = 14
_SAME = ("score", "accuracy")
"""Metrics that the score repeats."""


def write_report(run: RunView, path: Path | None = None) -> Path:
    """Write the report of a run, into its folder unless a path is given; the path."""
    path = run.folder / FILE if path is None else path
    write_text(path, report(run))
    return path


def report(run: RunView) -> str:
    """The page as HTML."""
    found = outcome_of(run)
    page = Page(f"{run.study.name} · Mendel")
    page.add(text("h1", run.study.name))
    if run.study.question:
        page.add(text("p", run.study.question, "question"))
    page.add(_tiles(run, found), *(text("p", s) for s in summary(run, found)))
    if run.state != "complete":
        page.add(
            text("p", f"The run is {run.state}: this page shows what there is so far.", "note")
        )
    page.add(*(text("p", remark, "note") for remark in run.remarks))
    _front(page, found)
    _hypervolume(page, found)
    _winners(page, run, found)
    _curves(page, run, found)
    _baselines(page, found)
    _troubles(page, found)
    _provenance(page, run)
    return page.html()


def summary(run: RunView, found: Outcome) -> list[str]:
    """The outcome in sentences."""
    trained = [t for t in (*found.complete, *found.stopped) if t.baseline is None]
    first = (
        f"{_many(len(trained), 'candidate')} and {_many(len(found.baselines), 'baseline')} were "
        f"trained on {_names(list(run.study.proxies))}; {len(found.stopped)} were stopped early, "
        f"{len(found.infeasible)} broke a constraint and {len(found.failed)} failed."
    )
    sentences = [first]
    if not found.front:
        return [*sentences, "No trial was trained to the end, so there is no front yet."]
    own = sum(t.baseline is None for t in found.front)
    beaten = [_who(t) for t in found.baselines if t in found.dominated]
    sentences.append(
        f"{_many(len(found.front), 'design')} {'stands' if len(found.front) == 1 else 'stand'} on "
        f"the Pareto front: {own} found by the search and "
        f"{_many(len(found.front) - own, 'baseline')}. "
        + (f"Dominated by it: {_names(beaten)}." if beaten else "No baseline is dominated by it.")
    )
    for goal in found.goals:
        best = min(found.complete, key=lambda t: (goal.loss(t.values[goal.label]), t.number))
        line = f"Best in {goal.label}: {_who(best)} with {shown_value(best, goal)}"
        rivals = [t for t in found.complete if (t.baseline is None) != (best.baseline is None)]
        if rivals:
            second = min(rivals, key=lambda t: (goal.loss(t.values[goal.label]), t.number))
            kind = "baseline" if second.baseline is not None else "found design"
            line += f"; the best {kind}, {_who(second)}, has {shown_value(second, goal)}"
        sentences.append(line + ".")
    return sentences


def _who(trial: TrialRecord) -> str:
    return trial.baseline if trial.baseline is not None else f"trial {trial.number}"


def _many(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _names(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _tiles(run: RunView, found: Outcome) -> str:
    tiles = [
        (str(len(run.trials)), "trials"),
        (str(len(found.front)), "on the front"),
        (f"{found.hypervolume:.3f}", "hypervolume"),
        (str(len(found.failed)), "failures"),
    ]
    seconds = elapsed(run.trials)
    if seconds is not None:
        tiles.append((duration_text(seconds), "from first to last trial"))
    inner = "".join(
        f'<div class="tile"><b>{escape(a)}</b><span>{escape(b)}</span></div>' for a, b in tiles
    )
    return f'<div class="tiles">{inner}</div>'


def elapsed(trials: Sequence[TrialRecord]) -> float | None:
    """Seconds from the first start to the last end; None where nothing has ended."""
    starts = [datetime.fromisoformat(t.started) for t in trials if t.started]
    ends = [datetime.fromisoformat(t.finished) for t in trials if t.finished]
    return (max(ends) - min(starts)).total_seconds() if starts and ends else None


def _front(page: Page, found: Outcome) -> None:
    page.add(text("h2", "The front"))
    first, rest = found.goals[0], found.goals[1:]
    if not found.complete:
        page.add(text("p", "Nothing to plot yet."))
        return
    page.add(
        text(
            "p",
            "Each point is a trained model. Filled points are beaten by no other trial in all "
            "objectives at once; diamonds are the published designs that ran under the same "
            "budget. Hover over a point for its architecture.",
            "note",
        )
    )
    for other in rest:
        page.figure(
            front_figure(found, other, first),
            f"Scatter plot of {first.label} over {other.label}; the table below has its numbers.",
        )
    if not rest:
        page.figure(
            hypervolume_figure(found), f"{first.label} over trials; the table has its numbers."
        )
    page.add(_trials_table(found, found.front, "The front, the best in the first objective first"))
    if found.dominated:
        page.add(
            fold(
                f"{_many(len(found.dominated), 'dominated trial')}",
                _trials_table(found, found.dominated, "Trained to the end and dominated"),
            )
        )


def _trials_table(found: Outcome, trials: Sequence[TrialRecord], caption: str) -> str:
    labels = [label_text(g) for g in found.goals]
    rows = []
    for t in trials:
        mark = " (knee)" if t.number == found.knee else ""
        name = f"{t.baseline} (trial {t.number})" if t.baseline else f"trial {t.number}"
        rows.append([name + mark, *(shown_value(t, g) for g in found.goals), t.notation])
    return table(
        ["design", *labels, "genome"],
        rows,
        numbers=labels,
        roles=[_role(t, found) for t in trials],
        code=["genome"],
        caption=caption,
    )


def _role(trial: TrialRecord, found: Outcome) -> str:
    if trial.baseline is not None:
        return "base"
    return "mark" if trial.number == found.knee else ""


def _hypervolume(page: Page, found: Outcome) -> None:
    page.add(text("h2", "Progress"))
    page.add(
        text(
            "p",
            "The hypervolume is the part of the objectives' space that the front dominates; it "
            "grows whenever a trial improves on what was known.",
            "note",
        )
    )
    page.figure(
        hypervolume_figure(found), "Hypervolume over complete trials; the table has its numbers."
    )
    names = {t.number: _who(t) for t in found.complete}
    gains, before = [], 0.0
    for i, (number, volume) in enumerate(found.history):
        if volume > before or i == len(found.history) - 1:
            gains.append([str(i + 1), names[number], f"{volume:.4f}"])
        before = volume
    page.add(
        table(
            ["after", "design", "hypervolume"],
            gains,
            numbers=["after", "hypervolume"],
            caption="The trials that improved the front, and the last one",
        )
    )


def _picture(trial: TrialRecord, context: int, dtype: str) -> str:
    """The drawing of a trial; a sentence where this version cannot read its genome."""
    try:
        genome = from_dict(trial.genome)
        drawn = outline(genome, cost(genome, context, DTYPES[dtype]))
    except (GenomeFileError, GeneError) as error:
        return text("p", f"This version of mendel cannot draw it: {error}", "note")
    return picture(drawn, f"architecture of trial {trial.number}")


def _winners(page: Page, run: RunView, found: Outcome) -> None:
    own = [t for t in found.front if t.baseline is None]
    page.add(text("h2", "The winners"))
    if not own:
        page.add(text("p", "The search found nothing that stands on the front."))
        return
    own.sort(key=lambda t: t.number != found.knee)
    context, dtype = _context(found.goals)
    for trial in own[:MOST_WINNERS]:
        mark = ", the knee of the front" if trial.number == found.knee else ""
        page.add(
            '<div class="card">',
            text("h3", f"Trial {trial.number}{mark}"),
            f"<p><code>{escape(trial.notation)}</code></p>",
            '<div class="split">',
            _picture(trial, context, dtype),
            "<div>",
            _facts(run, trial, found, context, dtype),
            "</div></div>",
            _routers(trial),
            "</div>",
        )
    if len(own) > MOST_WINNERS:
        page.add(
            text("p", f"{len(own) - MOST_WINNERS} more stand in the table of the front.", "note")
        )


def _context(goals: Sequence[Goal]) -> tuple[int, str]:
    """Context and dtype of the drawings' caches: those of the study's objective, if it has one."""
    for goal in goals:
        if isinstance(goal.settings, CacheSettings):
            return goal.settings.context, goal.settings.dtype
    return DEFAULT_CONTEXT, "bf16"


def _facts(run: RunView, trial: TrialRecord, found: Outcome, context: int, dtype: str) -> str:
    last = trial.rungs[-1]
    rows = [[label_text(g), shown_value(trial, g)] for g in found.goals]
    for proxy, scores in last.scores.items():
        others = [f"{k.replace('_', ' ')} {v:.4g}" for k, v in scores.items() if k not in _SAME]
        steps = f"after {last.steps.get(proxy, 0):,} steps"
        rows.append([proxy, "; ".join([f"score {scores['score']:.4f} {steps}", *others])])
    for name, m in last.measurements.items():
        conditions = ", ".join(f"{k} {v}" for k, v in m.conditions.items() if k != "versions")
        rows.append([f"{name}: measured with", f"{m.repeats} repeats; {conditions}"])
    parents = ", ".join(f"trial {p}" for p in trial.parents) or "none"
    rows += [
        ["cache drawn at", f"{context:,} tokens, {dtype}"],
        ["came about by", trial.variation],
        ["parents", parents],
        ["trained for", duration_text(sum(r.seconds for r in trial.rungs))],
        ["hash", trial.hash[:16]],
        ["take it along", f"mendel export {run.folder}:{trial.number} --out winner"],
    ]
    return table(["", "value"], rows, role="facts")


def _routers(trial: TrialRecord) -> str:
    rows = loads.load_rows(trial)
    if not rows:
        return ""
    return table(loads.COLUMNS, rows, numbers=loads.NUMBERS, caption=loads.CAPTION)


def _curves(page: Page, run: RunView, found: Outcome) -> None:
    chosen = [*found.front, *(t for t in found.baselines if t not in found.front)][:MOST_CURVES]
    curves = {t.number: run.curves(t.number) for t in chosen}
    if not any(curves.values()):
        return
    page.add(text("h2", "Learning curves"))
    page.add(
        text(
            "p",
            "Training loss of the front and of the baselines (dashed), in nats per target.",
            "note",
        )
    )
    for proxy in run.study.proxies:
        lines = {_who(t): curves[t.number][proxy] for t in chosen if proxy in curves[t.number]}
        if not lines:
            continue
        page.add(text("h3", proxy))
        page.figure(
            curves_figure(
                lines, "loss", "training loss", {_who(t) for t in chosen if t.baseline is not None}
            ),
            f"Training loss over steps on {proxy}; the table has the last values.",
        )
        rows = []
        for t in chosen:
            losses = [r for r in curves[t.number].get(proxy, []) if "loss" in r]
            if losses:
                score = t.rungs[-1].scores.get(proxy, {}).get("score") if t.rungs else None
                rows.append(
                    [
                        _who(t),
                        f"{losses[-1]['step']:,}",
                        f"{losses[-1]['loss']:.4f}",
                        "" if score is None else f"{score:.4f}",
                    ]
                )
        page.add(
            table(
                ["design", "steps", "last loss", "score"],
                rows,
                numbers=["steps", "last loss", "score"],
            )
        )


def _baselines(page: Page, found: Outcome) -> None:
    if not found.baselines:
        return
    page.add(text("h2", "Baselines"))
    labels = [label_text(g) for g in found.goals]
    front = {t.number for t in found.front}
    rows = []
    for t in found.baselines:
        where = "on the front" if t.number in front else t.state.replace("complete", "dominated")
        rows.append(
            [t.baseline or "", where, *(shown_value(t, g) for g in found.goals), t.notation]
        )
    page.add(table(["baseline", "where", *labels, "genome"], rows, numbers=labels, code=["genome"]))


def _troubles(page: Page, found: Outcome) -> None:
    page.add(text("h2", "Stopped, infeasible and failed"))
    if not (found.stopped or found.infeasible or found.failed):
        page.add(text("p", "None: every trial was trained to the end."))
        return
    if found.failed:
        page.add(
            table(
                ["trial", "kind", "reason", "genome"],
                [
                    [
                        _who(t),
                        t.failure.kind if t.failure else "",
                        t.failure.reason if t.failure else "",
                        t.notation,
                    ]
                    for t in found.failed
                ],
                code=["genome"],
                caption="Failures",
            )
        )
    if found.stopped:
        labels = [label_text(g) for g in found.goals]
        rows = [
            [
                _who(t),
                str(t.rungs[-1].rung) if t.rungs else "",
                *(shown_value(t, g) for g in found.goals),
                t.notation,
            ]
            for t in found.stopped
        ]
        inner = table(["trial", "rung", *labels, "genome"], rows, numbers=labels, code=["genome"])
        page.add(fold(f"{_many(len(found.stopped), 'trial')} stopped early by halving", inner))
    if found.infeasible:
        rows = [[_who(t), broken(t), t.notation] for t in found.infeasible]
        inner = table(["trial", "constraint exceeded by", "genome"], rows, code=["genome"])
        page.add(fold(f"{_many(len(found.infeasible), 'trial')} broke a constraint", inner))


def broken(trial: TrialRecord) -> str:
    """The constraints that a trial exceeds, and by how much."""
    return ", ".join(f"{k} by {v:.4g}" for k, v in trial.constraints.items() if v > 0)


def _provenance(page: Page, run: RunView) -> None:
    page.add(text("h2", "Provenance"))
    facts = dict(run.provenance)
    # The first life's facts are those above.
    lives = facts.pop("lives", [])[1:]
    rows = [[k, v if isinstance(v, str) else _short(v)] for k, v in facts.items()]
    if lives:
        rows.append(["resumed at", ", ".join(str(life.get("at")) for life in lives)])
    if rows:
        page.add(table(["what", "value"], rows))
    page.add(
        fold("The study", f"<pre>{escape(run.study.text)}</pre>"),
        text(
            "p",
            "Scores are of small proxy tasks in short trainings. They rank designs; they do not "
            "make a language model, and a rank can change at another size.",
            "note",
        ),
    )


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_short(v)}" for k, v in value.items())
    if isinstance(value, list):
        return ", ".join(_short(v) for v in value)
    return value if isinstance(value, str) else json.dumps(value)
