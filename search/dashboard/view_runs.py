"""All runs: what each is at, and several laid over one another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime

import numpy as np
from dash import Dash, Input, Output, State, dcc, html
from dash.exceptions import PreventUpdate

from ..figures import fronts_figure, histories_figure
from ..front import losses, shown_value
from ..pareto import Frame
from ..run import RunView
from ..units import duration_text
from .parts import Child, Raw, anchor, badge, control, note, plot, sentence, table, trial_link
from .watch import Watch, Watched

MOST_LAID = 6


def make(watch: Watch, query: dict[str, str]) -> list[Child]:
    """The page. `query` may name runs to lay over one another: `with=a,b`."""
    asked = [key for key in query.get("with", "").split(",") if key in watch.runs]
    chosen = asked or _first_comparable(watch)
    return [
        html.H1("Runs"),
        html.Div(_overview(watch), id="runs-table"),
        html.H2("Laid over one another"),
        html.Div(
            control(
                "Runs to lay over one another",
                dcc.Dropdown(id="runs-chosen", options=_options(watch), value=chosen, multi=True),
            ),
            className="wide-control",
        ),
        html.Div(_laid(watch, chosen), id="runs-laid"),
    ]


def register(app: Dash, watch: Watch) -> None:
    @app.callback(
        Output("runs-table", "children"),
        Output("runs-chosen", "options"),
        Output("runs-laid", "children"),
        Input("version", "data"),
        Input("runs-chosen", "value"),
        State("shown", "data"),
        prevent_initial_call=True,
    )
    def _update(version: str, chosen: list[str], shown: dict[str, str]) -> tuple[Child, ...]:
        with watch.lock:
            if watch.sentence():
                raise PreventUpdate
            return _overview(watch), _options(watch), _laid(watch, chosen or [])


def _options(watch: Watch) -> list[dict[str, str]]:
    return [{"label": w.key, "value": w.key} for w in watch.runs.values() if w.view is not None]


def _first_comparable(watch: Watch) -> list[str]:
    """The newest run and those with the same objectives."""
    there = [w for w in watch.runs.values() if w.view is not None and w.outcome().complete]
    if not there:
        return []
    newest = max(there, key=lambda w: w.run.lives[-1].last if w.run.lives else "")
    same = [w.key for w in there if _labels(w.run) == _labels(newest.run) and w is not newest]
    return [newest.key, *same][:MOST_LAID]


def _labels(run: RunView) -> list[str]:
    return [goal.label for goal in run.goals]


def _overview(watch: Watch) -> Child:
    rows: list[list[str]] = []
    for w in watch.runs.values():
        if w.view is None:
            rows.append(
                [w.key, Raw('<span class="badge failed">unreadable</span>'), w.problem, *[""] * 6]
            )
            continue
        found = w.outcome()
        ended, wanted = w.progress()
        eta = w.eta()
        rows.append(
            [
                anchor(w.key, "/front", run=w.key),
                badge(w.state),
                w.run.study.question,
                f"{ended} of {wanted}",
                "" if eta is None else duration_text(eta),
                str(len(w.run.trials)),
                str(len(found.failed)),
                str(len(found.front)),
                f"{found.hypervolume:.4f}" if found.complete else "",
            ]
        )
    running = sum(w.state == "running" for w in watch.runs.values())
    columns = ["run", "state", "question", "candidates done", "time left", "trials", "failures"]
    columns += ["on the front", "hypervolume"]
    return [
        html.P(f"{len(rows)} {'run' if len(rows) == 1 else 'runs'}, {running} at work."),
        table("Runs; trials count baselines and infeasible ones too", columns, rows, columns[3:]),
    ]


def _laid(watch: Watch, chosen: list[str]) -> Child:
    there = [w for key in chosen if (w := watch.get(key)) is not None and w.view is not None]
    there = [w for w in there if w.outcome().complete][:MOST_LAID]
    if not there:
        return sentence("Choose one run or more in which a trial was trained to the end.")
    labels = _labels(there[0].run)
    same = [w for w in there if _labels(w.run) == labels]
    left = [w.key for w in there if w not in same]
    parts: list[Child] = []
    if left:
        parts.append(note(f"Left out, because their objectives differ: {', '.join(left)}."))
    parts.append(histories(same))
    if len(labels) > 1:
        goals = there[0].run.goals
        fronts = {w.key: list(w.outcome().front) for w in same}
        sizes = "; ".join(f"{key}: {len(trials)}" for key, trials in fronts.items())
        parts.append(
            plot(
                "runs-fronts",
                fronts_figure(fronts, goals[1], goals[0]),
                f"The fronts in {labels[1]} and {labels[0]}; members: {sizes}. Hollow: baselines.",
                table(
                    "Members of the fronts",
                    ["run", "trial", *labels],
                    [
                        [w.key, trial_link(w.key, t.number, t.baseline)]
                        + [shown_value(t, g) for g in goals]
                        for w in same
                        for t in w.outcome().front
                    ],
                    labels,
                ),
            )
        )
    return parts


def histories(runs: list[Watched], over_time: bool = True) -> html.Div:
    """Hypervolume of runs with the same objectives, in one common frame."""
    trials: dict[str, list[tuple[float, float]]] = {}
    times: dict[str, list[tuple[float, float]]] = {}
    for w, history in zip(runs, _histories(runs), strict=True):
        # Where nothing was gained there is no corner to draw.
        kept = [
            i
            for i, (_, v) in enumerate(history)
            if i in (0, len(history) - 1) or v != history[i - 1][1]
        ]
        trials[w.key] = [(float(i + 1), history[i][1]) for i in kept]
        clock = working_clock(w.run)
        finished = {t.number: t.finished for t in w.outcome().complete}
        times[w.key] = [(clock(finished[history[i][0]]), history[i][1]) for i in kept]
    ends = "; ".join(f"{k} {rows[-1][1]:.4f} after {rows[-1][0]:.0f}" for k, rows in trials.items())
    frame = ", in one frame for all shown" if len(runs) > 1 else ""
    said = f"Hypervolume over complete trials{frame}: {ends}."
    numbers = table(
        "Hypervolume",
        ["run", "complete trials", "time at work", "hypervolume"],
        [
            [key, f"{count:.0f}", duration_text(times[key][i][0]), f"{volume:.4f}"]
            for key, rows in trials.items()
            for i, (count, volume) in enumerate(rows)
        ],
        ["complete trials", "time at work", "hypervolume"],
    )
    parts = [plot("volume-trials", histories_figure(trials, "trials"), said, numbers)]
    if over_time:
        parts.append(
            plot(
                "volume-time",
                histories_figure(times, "time"),
                "The same over the time that the search was at work; pauses are left out.",
                numbers,
            )
        )
    return html.Div(parts, className="two")


def _histories(runs: list[Watched]) -> list[Sequence[tuple[int, float]]]:
    """(trial, hypervolume) per complete trial of each run: in the run's own frame where it stands
    alone, else in one frame around all."""
    if len(runs) == 1:
        return [runs[0].outcome().history]
    goals = runs[0].run.goals
    ordered = [sorted(w.outcome().complete, key=lambda t: (t.finished, t.number)) for w in runs]
    rows = [losses(goals, trials) for trials in ordered]
    frame = Frame.around(np.vstack(rows), [g.loss_bounds() for g in goals])
    return [
        [(t.number, v) for t, v in zip(trials, frame.hypervolume_history(block), strict=True)]
        for trials, block in zip(ordered, rows, strict=True)
    ]


def working_clock(run: RunView) -> Callable[[str], float]:
    """A function from a time to the seconds that drivers had been at work until then."""
    spans = [
        (
            datetime.fromisoformat(life.began).timestamp(),
            datetime.fromisoformat(life.last).timestamp(),
        )
        for life in run.lives
    ]

    def clock(at: str) -> float:
        moment = datetime.fromisoformat(at).timestamp()
        return sum(max(0.0, min(moment, last) - began) for began, last in spans)

    return clock
