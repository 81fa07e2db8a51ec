"""The dashboard's frame: addresses, navigation, live updates, and a sentence for every trouble."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from dash import Dash, Input, Output, State, ctx, dcc, html, no_update
from flask import Flask

from . import view_budget, view_compare, view_front, view_matters, view_runs, view_trial
from .downloads import serve_files
from .guard import protect
from .parts import Child, attributes, href, query_of, sentence
from .watch import Watch, Watched

TICK_MILLISECONDS = 1500

RunPage = Callable[[Watch, Watched, Mapping[str, str]], list[Child]]

PAGES: dict[str, tuple[str, RunPage]] = {
    "/front": ("Front", view_front.make),
    "/trial": ("Trial", view_trial.make),
    "/compare": ("Compare", view_compare.make),
    "/matters": ("What matters", view_matters.make),
    "/budget": ("Budget", view_budget.make),
}

_INDEX = """<!DOCTYPE html>
<html lang="en">
<head>{%metas%}<title>{%title%}</title><link rel="icon" href="data:,">{%css%}</head>
<body>{%app_entry%}
<noscript><p>The dashboard needs JavaScript. Without it: mendel front, mendel report.</p></noscript>
<footer>{%config%}{%scripts%}{%renderer%}</footer></body>
</html>"""


def make_app(
    watch: Watch, hosts: Iterable[str] = (), token: str | None = None, wide: bool = False
) -> Dash:
    """The application over the watched runs; see `guard.protect` for hosts, token and wide."""
    here = Path(__file__).parent
    # Flask cannot find the folder of a module in a namespace package by itself.
    server = Flask("dashboard", root_path=str(here), instance_path=str(here), static_folder=None)
    app = Dash(
        "dashboard",
        server=server,  # type: ignore[arg-type]
        assets_folder=str(here / "assets"),
        serve_locally=True,
        suppress_callback_exceptions=True,
        title="Mendel",
        update_title="",
        index_string=_INDEX,
        meta_tags=[{"name": "viewport", "content": "width=device-width,initial-scale=1"}],
    )
    protect(server, hosts, token, wide)
    serve_files(server, watch)
    app.layout = _frame()
    _register(app, watch)
    for view in (view_runs, view_front, view_trial, view_compare, view_matters, view_budget):
        view.register(app, watch)
    return app


def _frame() -> html.Div:
    return html.Div(
        [
            dcc.Location(id="url", refresh=False),
            dcc.Interval(id="tick", interval=TICK_MILLISECONDS),
            dcc.Store(id="version"),
            dcc.Store(id="shown"),
            html.A("Skip to the content", href="#main", className="skip"),
            html.Header(
                [
                    dcc.Link("Mendel", href="/", className="brand"),
                    html.Nav(id="nav", **attributes(label="Views")),
                    html.Div(id="where"),
                ]
            ),
            html.Main(html.P("Reading the runs ...", className="sentence"), id="main", tabIndex=-1),
        ]
    )


def _register(app: Dash, watch: Watch) -> None:
    @app.callback(
        Output("version", "data"),
        Input("tick", "n_intervals"),
        State("version", "data"),
        State("shown", "data"),
        prevent_initial_call=True,
    )
    def _tick(count: int, version: str | None, shown: dict[str, str] | None) -> Any:
        with watch.lock:
            watch.poll()
            new = _version(watch, shown.get("run") if shown else None)
        return no_update if new == version else new

    @app.callback(
        Output("nav", "children"),
        Output("where", "children"),
        Output("main", "children"),
        Output("shown", "data"),
        Input("url", "pathname"),
        Input("url", "search"),
        Input("version", "data"),
        State("shown", "data"),
    )
    def _show(
        path: str | None, search: str | None, version: str | None, shown: dict[str, str] | None
    ) -> tuple[Any, ...]:
        with watch.lock:
            watch.poll()
            path = path if path in PAGES else "/"
            query = query_of(search)
            watched = None if path == "/" else _chosen(watch, query)
            key = query.get("run") or (watched.key if watched else None)
            trouble = _trouble(watch, path, key, watched)
            now = {
                "run": key or "",
                "page": f"{path}?{search or ''}",
                "trouble": trouble,
                "version": _version(watch, key),
            }
            where = _where(watched, key)
            same = shown and all(shown.get(k) == now[k] for k in ("run", "page", "trouble"))
            if ctx.triggered_id == "version" and same:
                return no_update, where, no_update, no_update
            return _nav(path, key), where, _page(watch, path, query, watched, trouble), now


def _version(watch: Watch, key: str | None) -> str:
    watched = watch.get(key)
    own = f"{watched.key} {watched.version} {id(watched)}" if watched is not None else "-"
    return own if watched is not None else f"{own} {watch.version} {watch.sentence()}"


def _chosen(watch: Watch, query: Mapping[str, str]) -> Watched | None:
    """The run of the address; without one the run at work, else the newest."""
    if "run" in query:
        return watch.get(query["run"])
    there = [w for w in watch.runs.values() if w.view is not None and w.run.trials]
    if not there:
        return next(iter(watch.runs.values()), None)
    return max(
        there,
        key=lambda w: (w.state == "running", w.run.lives[-1].last if w.run.lives else "", w.key),
    )


def _trouble(watch: Watch, path: str, key: str | None, watched: Watched | None) -> str:
    """Why a page cannot be made, as a sentence; empty where it can."""
    if path == "/":
        return watch.sentence()
    if watched is None:
        if key and watch.runs:
            return (
                f"There is no run {key} in {watch.root} (any more). If its folder comes back, "
                "it shows here by itself."
            )
        return watch.sentence() or "Choose a run."
    if watched.view is None:
        return watched.problem
    if not watched.run.trials:
        return "No trial has begun yet. The first shows here by itself."
    return ""


def _nav(path: str, key: str | None) -> list[Child]:
    views = {"/": "Runs", **{address: name for address, (name, _) in PAGES.items()}}
    links = [
        dcc.Link(
            name,
            href=address if address == "/" else href(address, run=key),
            className="here" if address == path else "",
        )
        for address, name in views.items()
    ]
    return [html.Ul([html.Li(one) for one in links])]


def _where(watched: Watched | None, key: str | None) -> list[Child]:
    if watched is None:
        return [f"run {key}"] if key else []
    if watched.view is None:
        badge = html.Span("unreadable", className="badge failed")
    else:
        badge = html.Span(watched.state, className=f"badge {watched.state}")
    return ["run ", html.B(watched.key), " ", badge]


def _page(
    watch: Watch, path: str, query: dict[str, str], watched: Watched | None, trouble: str
) -> list[Child]:
    try:
        if trouble:
            name = "Runs" if path == "/" else PAGES[path][0]
            return [html.H1(name), sentence(trouble)]
        if watched is None:
            return view_runs.make(watch, query)
        parts = PAGES[path][1](watch, watched, query)
        if watched.run.damaged:
            count = watched.run.damaged
            parts.insert(
                1,
                sentence(
                    f"{count} {'line' if count == 1 else 'lines'} of this run's events could not "
                    "be read and are left out."
                ),
            )
        return parts
    except Exception as error:
        # The last resort: a person sees a sentence, and whoever started the server the traceback.
        if os.environ.get("MENDEL_DEBUG", "") not in ("", "0"):
            traceback.print_exc()
        words = " ".join(str(error).split())[:300]
        return [
            html.H1("This page could not be made"),
            sentence(
                f"{type(error).__name__}: {words} (a fault of mendel; with MENDEL_DEBUG=1 the "
                "terminal shows where)"
            ),
        ]
