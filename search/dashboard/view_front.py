"""The front: two objectives as axes, a third as colour or depth, and what a point is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import plotly.graph_objects as go
from dash import Dash, Input, Output, State, ctx, dcc, html, no_update
from dash.exceptions import PreventUpdate

from ...genome.files import GenomeFileError, from_dict
from ...primitives.base import GeneError
from ..figures_front import View, front_figure, front_space_figure
from ..front import Outcome, label_text, shown_value
from ..objectives import Goal
from ..records import TrialRecord
from ..report import broken, summary
from .parts import (
    Child,
    attributes,
    choice,
    control,
    fold,
    href,
    link,
    note,
    plot,
    sentence,
    table,
    tiles,
    trial_link,
)
from .view_runs import histories
from .watch import Watch, Watched

Window = dict[str, Any] | None
"""What is zoomed to: `axes` are the objectives that it holds for, `x` and `y` ranges or None."""

NONE = "none"
MOST_LISTED = 50
"""Rows of a table of trials."""


def make(watch: Watch, watched: Watched, query: Mapping[str, str]) -> list[Child]:
    """The page of one run."""
    goals = watched.run.goals
    labels = [g.label for g in goals]
    x = query.get("x", labels[1] if len(labels) > 1 else labels[0])
    y = query.get("y", labels[0])
    third = query.get("third", NONE)
    x, y = (label if label in labels else labels[0] for label in (x, y))
    options = [{"label": label_text(g), "value": g.label} for g in goals]
    chosen: list[int] = []
    figure, said, numbers, detail = _content(watch, watched, x, y, third, "colour", chosen, None)
    return [
        html.H1(["Front of ", watched.key]),
        html.P(watched.run.study.question, className="question"),
        html.Div(_head(watched), id="front-head"),
        html.Div(
            [
                control("Horizontal axis", choice("front-x", options, x)),
                control("Vertical axis", choice("front-y", options, y)),
                control(
                    "Third objective",
                    choice("front-third", [{"label": "none", "value": NONE}, *options], third),
                ),
                control(
                    "Shown as",
                    choice(
                        "front-mode",
                        [
                            {"label": "colour", "value": "colour"},
                            {"label": "third axis (3-D)", "value": "space"},
                        ],
                        "colour",
                    ),
                ),
            ],
            className="controls",
        ),
        dcc.Store(id="front-chosen", data=chosen),
        dcc.Store(id="front-window", data=None),
        dcc.Store(id="front-drawn", data=[x, y, third, "colour", chosen, None]),
        html.Div(
            [
                html.Div(
                    [
                        plot("front-graph", figure, ""),
                        html.Div(said, id="front-text"),
                    ],
                    className="wide",
                ),
                html.Section(
                    detail, id="front-detail", className="card", **attributes(live="polite")
                ),
            ],
            className="beside",
        ),
        html.Div(numbers, id="front-table"),
        html.H2("Progress"),
        html.Div(_progress(watch, watched), id="front-progress"),
    ]


def register(app: Dash, watch: Watch) -> None:
    @app.callback(
        Output("front-chosen", "data"),
        Input("front-graph", "clickData"),
        Input("front-graph", "selectedData"),
        prevent_initial_call=True,
    )
    def _choose(clicked: Any, selected: Any) -> list[int]:
        data = clicked if "clickData" in str(ctx.triggered[0]["prop_id"]) else selected
        points = (data or {}).get("points", [])
        numbers = [n for p in points if isinstance(n := p.get("customdata"), int)]
        if not numbers:
            raise PreventUpdate
        return list(dict.fromkeys(numbers))

    @app.callback(
        Output("front-window", "data"),
        Input("front-graph", "relayoutData"),
        State("front-window", "data"),
        State("front-x", "value"),
        State("front-y", "value"),
        prevent_initial_call=True,
    )
    def _zoom(moved: dict[str, Any] | None, window: Window, x: str, y: str) -> Any:
        moved = moved or {}
        old = window if window and window["axes"] == [x, y] else None
        new: dict[str, Any] = {"axes": [x, y], "x": None, "y": None}
        changed = False
        for axis in ("x", "y"):
            ends = [moved.get(f"{axis}axis.range[{i}]") for i in (0, 1)]
            if all(isinstance(end, int | float) for end in ends):
                new[axis], changed = ends, True
            elif moved.get(f"{axis}axis.autorange"):
                changed = True
            elif old is not None:
                new[axis] = old[axis]
        return new if changed and new != window else no_update

    @app.callback(
        Output("front-graph", "figure"),
        Output("front-text", "children"),
        Output("front-table", "children"),
        Output("front-detail", "children"),
        Output("front-head", "children"),
        Output("front-progress", "children"),
        Output("front-drawn", "data"),
        Input("version", "data"),
        Input("front-x", "value"),
        Input("front-y", "value"),
        Input("front-third", "value"),
        Input("front-mode", "value"),
        Input("front-chosen", "data"),
        Input("front-window", "data"),
        State("shown", "data"),
        State("front-drawn", "data"),
        prevent_initial_call=True,
    )
    def _update(
        version: str,
        x: str,
        y: str,
        third: str,
        mode: str,
        chosen: list[int],
        window: Window,
        shown: dict[str, str],
        drawn: list[Any],
    ) -> tuple[Any, ...]:
        with watch.lock:
            watched = watch.get(shown.get("run") if shown else None)
            newer = ctx.triggered_id == "version"
            asked = [x, y, third, mode, chosen or [], window]
            # Controls announce themselves when they appear, with what is drawn already.
            if not newer and asked == drawn:
                raise PreventUpdate
            if watched is None or watched.view is None or not watched.run.trials:
                raise PreventUpdate
            if newer and shown.get("version") == version:
                raise PreventUpdate
            figure, said, numbers, detail = _content(
                watch, watched, x, y, third, mode, chosen or [], window
            )
            rest = (_head(watched), _progress(watch, watched)) if newer else (no_update, no_update)
            kept = numbers if newer else no_update
            return figure, said, kept, detail, *rest, asked


def _goal(watched: Watched, label: str | None) -> Goal | None:
    return next((g for g in watched.run.goals if g.label == label), None)


def _content(
    watch: Watch,
    watched: Watched,
    x: str,
    y: str,
    third: str,
    mode: str,
    chosen: list[int],
    window: Window,
) -> tuple[go.Figure, Child, Child, Child]:
    found = watched.outcome()
    goal_x, goal_y, extra = (_goal(watched, label) for label in (x, y, third))
    goal_x, goal_y = goal_x or found.goals[0], goal_y or found.goals[0]
    if extra is not None and mode == "space":
        figure = front_space_figure(found, goal_x, goal_y, extra, chosen)
    else:
        kept = window if window and window["axes"] == [x, y] else None
        untrained = [t for t in (*found.infeasible, *found.failed) if not t.rungs]
        view = View(
            extra,
            chosen,
            watch.over_seeds(watched),
            watched.counted(untrained[-400:]),
            kept["x"] if kept else None,
            kept["y"] if kept else None,
        )
        figure = front_figure(found, goal_x, goal_y, view)
    # A new value here is the only thing that throws a zoom away.
    figure.update_layout(uirevision=f"{watched.key} {x} {y} {mode}", clickmode="event")
    return (
        figure,
        _said(watched, found, goal_x, goal_y, extra),
        _tables(watched, found),
        _detail(watched, found, chosen),
    )


def _head(watched: Watched) -> Child:
    found = watched.outcome()
    ended, wanted = watched.progress()
    return tiles(
        [
            (watched.state, "state"),
            (f"{ended} / {wanted}", "candidates done"),
            (str(len(found.front)), "on the front"),
            (f"{found.hypervolume:.3f}", "hypervolume"),
            (str(len(found.failed)), "failures"),
        ]
    )


def _said(watched: Watched, found: Outcome, x: Goal, y: Goal, third: Goal | None) -> Child:
    texts = summary(watched.run, found)
    if found.knee is not None:
        knee = next(t for t in found.front if t.number == found.knee)
        texts.append(
            f"Suggested as a compromise (the knee): {knee.baseline or f'trial {knee.number}'}, "
            + ", ".join(f"{g.label} {shown_value(knee, g)}" for g in found.goals)
            + "."
        )
    unscored = sum(not t.rungs for t in (*found.failed, *found.infeasible))
    if unscored:
        texts.append(
            f"{unscored} infeasible or failed trials have no score; they stand at the worse edge "
            "of the plot where their cost is known."
        )
    shown = f"Horizontal: {label_text(x)}; vertical: {label_text(y)}"
    shown += f"; third: {label_text(third)}." if third else "."
    bars = "Bars: the spread over seeds, or the 10th to 90th percentile of a measurement."
    return [
        note(f"{shown} {bars}"),
        *(html.P(t) for t in texts),
        *(note(r) for r in watched.run.remarks),
    ]


def _tables(watched: Watched, found: Outcome) -> Child:
    behind = [t for t in found.baselines if t in found.dominated]
    parts: list[Child] = []
    if found.front:
        parts.append(
            _trials(watched, found, found.front, "The front, the best in the first objective first")
        )
    if behind:
        parts.append(_trials(watched, found, behind, "Baselines off the front"))
    own = [t for t in found.dominated if t.baseline is None]
    if own:
        parts.append(fold(f"{len(own):,} dominated", _trials(watched, found, own, "Dominated")))
    if found.stopped:
        inner = _trials(watched, found, found.stopped, "Stopped early by halving")
        parts.append(fold(f"{len(found.stopped):,} stopped early", inner))
    if found.running:
        inner = _trials(watched, found, found.running, "Under way")
        parts.append(fold(f"{len(found.running):,} under way", inner))
    if found.infeasible:
        inner = table(
            "Infeasible",
            ["trial", "constraint exceeded by", "genome"],
            [
                [trial_link(watched.key, t.number, t.baseline), broken(t), t.notation]
                for t in found.infeasible
            ],
            code=["genome"],
        )
        parts.append(fold(f"{len(found.infeasible):,} infeasible", inner))
    if found.failed:
        inner = table(
            "Failed",
            ["trial", "kind", "reason", "genome"],
            [
                [
                    trial_link(watched.key, t.number, t.baseline),
                    t.failure.kind if t.failure else "",
                    t.failure.reason if t.failure else "",
                    t.notation,
                ]
                for t in found.failed
            ],
            code=["genome"],
        )
        parts.append(fold(f"{len(found.failed):,} failed", inner, opened=not found.complete))
    return parts


def _trials(watched: Watched, found: Outcome, trials: Any, caption: str) -> Child:
    labels = [label_text(g) for g in found.goals]
    rows = []
    for t in trials[:MOST_LISTED]:
        name = "knee" if t.number == found.knee else ""
        rows.append(
            [
                trial_link(watched.key, t.number, t.baseline),
                *([name] if found.knee is not None else []),
                *(shown_value(t, g) for g in found.goals),
                t.notation,
            ]
        )
    mark = ["note"] if found.knee is not None else []
    if len(trials) > MOST_LISTED:
        caption += f" (the first {MOST_LISTED} of {len(trials):,})"
    return table(caption, ["trial", *mark, *labels, "genome"], rows, labels, ["genome"])


def _detail(watched: Watched, found: Outcome, chosen: list[int]) -> Child:
    trials = [t for n in chosen if (t := watched.trial(n)) is not None]
    if not trials:
        hint = note(
            "Click a point, or draw a box or a lasso around several. By keyboard: follow a "
            "trial's link in the tables below."
        )
        knee = watched.trial(found.knee) if found.knee is not None else None
        if knee is None:
            return [html.H2("Choose a point"), hint]
        return [hint, html.P("Suggested, the knee of the front:"), *one(watched, found, knee)]
    if len(trials) == 1:
        return one(watched, found, trials[0])
    rows = [
        [trial_link(watched.key, t.number, t.baseline), *(shown_value(t, g) for g in found.goals)]
        for t in trials
    ]
    labels = [label_text(g) for g in found.goals]
    parts = [
        html.H2(f"{len(trials)} chosen"),
        table("Chosen", ["trial", *labels], rows, labels, most=20),
    ]
    if len(trials) <= 4:
        named = ",".join(str(t.number) for t in trials)
        parts.append(html.P(link("Compare them", "/compare", run=watched.key, **{"with": named})))
    return parts


def one(watched: Watched, found: Outcome, trial: TrialRecord) -> list[Child]:
    """A trial in short, with ways on."""
    name = trial.baseline or f"Trial {trial.number}"
    rows = [[label_text(g), shown_value(trial, g)] for g in found.goals if g.label in trial.values]
    parts: list[Child] = [
        html.H2([name, " ", html.Span(trial.state, className="badge " + trial.state)])
    ]
    if rows:
        parts.append(table(f"Objectives of {name}", ["objective", "value"], rows, ["value"]))
    if trial.failure is not None:
        parts.append(sentence(f"{trial.failure.kind}: {trial.failure.reason}"))
    try:
        from_dict(trial.genome)
        parts.append(
            html.Img(
                src=href("/picture", run=watched.key, trial=trial.number),
                alt=f"Architecture of {name}: {trial.notation}",
                className="picture",
            )
        )
    except (GenomeFileError, GeneError) as error:
        parts.append(sentence(f"This genome cannot be drawn: {error}"))
    parts.append(html.P(html.Code(trial.notation)))
    ways: list[Child] = [link("All about it", "/trial", run=watched.key, trial=trial.number)]
    rival = next((t for t in found.baselines if t.number != trial.number), None)
    if rival is not None:
        named = f"{trial.number},{rival.number}"
        ways += [
            " · ",
            link(f"Compare with {rival.baseline}", "/compare", run=watched.key, **{"with": named}),
        ]
    parts.append(html.P(ways))
    return parts


def _progress(watch: Watch, watched: Watched) -> Child:
    if not watched.outcome().complete:
        return sentence("No trial was trained to the end yet, so there is no hypervolume.")
    rival = watch.random_search(watched)
    runs = [watched]
    if rival is not None and rival.outcome().complete:
        runs.append(rival)
    parts: list[Child] = [histories(runs)]
    if len(runs) > 1:
        parts.append(note(f"{rival.key if rival else ''} is random search with the same study."))
    return parts
