"""Budget: time per rung, what stopping early saved, how busy the workers were."""

from __future__ import annotations

from collections.abc import Mapping

from dash import Dash, Input, Output, State, html
from dash.exceptions import PreventUpdate

from ..budget import occupancy, rung_times, saving
from ..figures_effects import occupancy_figure, rung_figure
from ..units import duration_text
from .parts import Child, note, plot, sentence, table, tiles
from .watch import Watch, Watched


def make(watch: Watch, watched: Watched, query: Mapping[str, str]) -> list[Child]:
    """The page of one run."""
    return [html.H1("Budget"), html.Div(body(watched), id="budget-body")]


def register(app: Dash, watch: Watch) -> None:
    @app.callback(
        Output("budget-body", "children"),
        Input("version", "data"),
        State("shown", "data"),
        prevent_initial_call=True,
    )
    def _update(version: str, shown: dict[str, str]) -> Child:
        with watch.lock:
            watched = watch.get(shown.get("run"))
            if watched is None or watched.view is None or shown.get("version") == version:
                raise PreventUpdate
            return body(watched)


def body(watched: Watched) -> list[Child]:
    """Everything that changes while the run goes on."""
    run = watched.run
    rungs = rung_times(run)
    if not rungs:
        return [sentence("No rung of any trial has ended yet, so no time was spent that counts.")]
    spent = sum(r.seconds for r in rungs)
    saved = saving(run)
    busy = occupancy(run)
    share = saved.seconds / (saved.seconds + spent) if saved.seconds + spent else 0.0
    facts = [
        (duration_text(spent), "of worker time"),
        (f"{saved.trials:,}", "trials stopped early"),
        (duration_text(saved.seconds), "of worker time saved"),
    ]
    if busy is not None:
        facts.append(
            (f"{busy.mean:.0%}", f"of {busy.workers} worker{'' if busy.workers == 1 else 's'} busy")
        )
        facts.append((duration_text(busy.edges[-1]), "the search at work"))
    steps = [run.study.steps(r.rung) for r in rungs]
    rows = [
        [
            str(r.rung),
            "; ".join(f"{proxy} {n:,}" for proxy, n in named.items()),
            f"{r.trials:,}",
            duration_text(r.seconds),
            duration_text(r.seconds / r.trials),
        ]
        for r, named in zip(rungs, steps, strict=True)
    ]
    columns = ["rung", "steps at its end", "trials", "worker time", "per trial"]
    parts: list[Child] = [
        tiles(facts),
        html.P(
            f"Stopping {saved.trials:,} trials early saved {duration_text(saved.seconds)}, "
            f"{share:.0%} of what training all of them to the end would have taken; each is "
            "counted at its own pace."
        ),
        html.Div(
            [
                plot(
                    "budget-rungs",
                    rung_figure(rungs),
                    f"Worker time per rung, {duration_text(spent)} in all.",
                    table("Time per rung", columns, rows, ["trials", "worker time", "per trial"]),
                )
            ],
            className="two",
        ),
    ]
    if busy is None:
        parts.append(note("The journal does not say when the search was at work."))
        return parts
    numbers = [
        [duration_text(busy.edges[i]), f"{share:.0%}"] for i, share in enumerate(busy.shares)
    ]
    said = (
        f"On average {busy.mean:.0%} of the workers trained; the rest is starting, "
        "measuring, waiting and scoring that no rung counts."
    )
    parts[-1].children.append(
        plot(
            "budget-occupancy",
            occupancy_figure(busy),
            said,
            table("Workers that train", ["from", "share"], numbers, ["from", "share"]),
        )
    )
    return parts
