"""What matters: importances, attention and parallel branches, parallel coordinates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from dash import Dash, Input, Output, State, html
from dash.exceptions import PreventUpdate

from ..effects import LEAST_TRIALS, MOST_TRIALS, TRAITS, Effect, effects, judged, spearman, traits
from ..figures_effects import importance_figure, parallel_figure, trait_figure
from ..front import Outcome, label_text, shown_value
from ..objectives import Goal
from .parts import Child, choice, control, note, plot, sentence, table, trial_link
from .watch import Watch, Watched

METHOD = (
    "Importance: optuna's PED-ANOVA (arXiv 2304.10255), how far a trait's values among the best "
    "tenth of the trials differ from those among all; shares of the whole. Direction: Spearman's "
    "rank correlation. The trials come from a search that went where results were good: these are "
    "hints for the next study, not effects of causes."
)
MOST_LISTED = 60
"""Rows of the table of parallel coordinates."""
_CACHE: dict[tuple[str, int, str], list[Effect]] = {}
_MOST_CACHED = 32


def make(watch: Watch, watched: Watched, query: Mapping[str, str]) -> list[Child]:
    """The page of one run."""
    goals = watched.run.goals
    label = query.get("objective", goals[0].label)
    label = label if any(g.label == label for g in goals) else goals[0].label
    trait = query.get("trait", "attention share")
    trait = trait if trait in TRAITS else "attention share"
    return [
        html.H1("What matters"),
        html.Div(
            [
                control(
                    "Objective",
                    choice(
                        "matters-goal",
                        [{"label": label_text(g), "value": g.label} for g in goals],
                        label,
                    ),
                ),
                control("Trait", choice("matters-trait", list(TRAITS), trait)),
            ],
            className="controls",
        ),
        html.Div(_body(watched, label, trait), id="matters-body"),
    ]


def register(app: Dash, watch: Watch) -> None:
    @app.callback(
        Output("matters-body", "children"),
        Input("version", "data"),
        Input("matters-goal", "value"),
        Input("matters-trait", "value"),
        State("shown", "data"),
        prevent_initial_call=True,
    )
    def _update(version: str, label: str, trait: str, shown: dict[str, str]) -> Child:
        with watch.lock:
            watched = watch.get(shown.get("run"))
            if watched is None or watched.view is None or not watched.run.trials:
                raise PreventUpdate
            return _body(watched, label, trait)


def _effects(watched: Watched, goal: Goal) -> list[Effect]:
    """Computed again only when a twentieth more trials are there: it takes a while."""
    trials = judged(watched.run.trials)
    count = sum(t.state == "complete" for t in watched.run.trials)
    step = max(1, count // 20)
    key = (f"{watched.folder} {watched.run.study.name}", count // step * step, goal.label)
    if key not in _CACHE:
        while len(_CACHE) >= _MOST_CACHED:
            del _CACHE[next(iter(_CACHE))]
        _CACHE[key] = effects(trials, goal)
    return _CACHE[key]


def _body(watched: Watched, label: str, trait: str) -> list[Child]:
    goal = next((g for g in watched.run.goals if g.label == label), watched.run.goals[0])
    found = watched.outcome()
    trials = judged(watched.run.trials)
    if len(trials) < LEAST_TRIALS:
        return [
            sentence(
                f"{len(trials)} trials were trained to the end; from {LEAST_TRIALS} on there is "
                "something to say about what matters."
            )
        ]
    rows = {t.number: traits(t.genome) for t in trials}
    numbers = {n: float(row[trait]) for n, row in rows.items()}
    parts: list[Child] = [html.H2(f"Importance for {goal.label}")]
    ranked = _effects(watched, goal)
    if ranked:
        best = ", ".join(f"{e.trait} ({e.importance:.0%})" for e in ranked[:3])
        parts += [
            note(METHOD),
            plot(
                "matters-importance",
                importance_figure(ranked, goal),
                f"Over {len(trials)} complete trials, most important for {goal.label}: {best}.",
                table(
                    f"Importance for {goal.label}",
                    ["trait", "importance", "rank correlation"],
                    [
                        [e.trait, f"{e.importance:.1%}", "" if e.rank is None else f"{e.rank:+.2f}"]
                        for e in ranked
                    ],
                    ["importance", "rank correlation"],
                    most=60,
                ),
            ),
        ]
    else:
        parts.append(sentence("The trials do not differ in anything that could be told apart."))
    parts.append(html.H2(f"{trait.capitalize()} and {goal.label}"))
    parts.append(note(f"{trait.capitalize()}: {TRAITS[trait]}."))
    parts.append(
        plot(
            "matters-trait-plot",
            trait_figure(found, numbers, trait, goal),
            _rank_said(correlation(watched, goal, rows, trait), trait, goal),
            _correlations(watched, rows),
        )
    )
    parts.append(html.H2("Parallel coordinates"))
    names = list(TRAITS)
    coordinates = {n: {k: float(row[k]) for k in names} for n, row in rows.items()}
    few = len(coordinates) < MOST_TRIALS
    lines = (
        "One line per trial" if few else f"One line for each of {MOST_TRIALS} trials, evenly chosen"
    )
    parts.append(
        plot(
            "matters-parallel",
            parallel_figure(found, coordinates, names),
            f"{lines}; on an objective's axis better is up. Thick: the front; dashed: baselines.",
            _coordinates(watched, found, coordinates, names),
        )
    )
    return parts


def _coordinates(
    watched: Watched, found: Outcome, rows: Mapping[int, Mapping[str, float]], names: Sequence[str]
) -> Child:
    """The lines of the parallel coordinates as numbers: the front, then baselines, then others."""
    front = {t.number for t in found.front}
    drawn = [t for t in judged(watched.run.trials) if t.number in rows]
    drawn.sort(key=lambda t: (t.number not in front, t.baseline is None, t.number))
    body = [
        [
            trial_link(watched.key, t.number, t.baseline),
            "yes" if t.number in front else "",
            *(f"{rows[t.number][name]:.4g}" for name in names),
            *(shown_value(t, goal) for goal in found.goals),
        ]
        for t in drawn[:MOST_LISTED]
    ]
    labels = [label_text(g) for g in found.goals]
    more = "" if len(drawn) <= MOST_LISTED else f" ({MOST_LISTED} of {len(drawn):,})"
    return table(
        f"Traits and objectives per trial, the front first{more}",
        ["trial", "front", *names, *labels],
        body,
        [*names, *labels],
    )


def correlation(
    watched: Watched, goal: Goal, rows: Mapping[int, Mapping[str, object]], trait: str
) -> float | None:
    """The rank correlation of a numeric trait with an objective over these trials."""
    pairs = [
        (float(str(row[trait])), t.values[goal.label])
        for n, row in rows.items()
        if (t := watched.trial(n)) is not None and goal.label in t.values
    ]
    array = np.array(pairs)
    return spearman(array[:, 0], array[:, 1]) if len(pairs) > 1 else None


def _rank_said(rank: float | None, trait: str, goal: Goal) -> str:
    if rank is None:
        return f"{trait.capitalize()} is the same in all trials."
    if abs(rank) < 0.1:
        return f"No clear relation (rank correlation {rank:+.2f})."
    better = (rank > 0) == (goal.objective.direction == "maximize")
    word = "better" if better else "worse"
    return f"More {trait} goes with {word} {goal.label} (rank correlation {rank:+.2f})."


def _correlations(watched: Watched, rows: Mapping[int, Mapping[str, object]]) -> Child:
    goals = watched.run.goals
    body = []
    for name in TRAITS:
        cells = []
        for goal in goals:
            rank = correlation(watched, goal, rows, name)
            cells.append("no spread" if rank is None else f"{rank:+.2f}")
        body.append([name, *cells])
    labels = [label_text(g) for g in goals]
    caption = "Rank correlation of each trait with each objective"
    return table(caption, ["trait", *labels], body, labels)
