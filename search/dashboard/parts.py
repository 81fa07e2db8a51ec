"""Small pieces that every view is made of. Dash escapes every text by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import parse_qs, urlencode

import plotly.graph_objects as go
from dash import dcc, html

MOST_ROWS = 200
"""Rows of a table that are shown; a sentence says how many there are."""

Child = Any
"""What Dash takes as a child: a component, a text, or a list of them."""

CONFIG = {
    "displaylogo": False,
    "responsive": True,
    "scrollZoom": False,
    "modeBarButtonsToRemove": ["autoScale2d", "toImage"],
}


def href(path: str, **query: object) -> str:
    """A link within the dashboard; empty values are left out."""
    kept = {k: str(v) for k, v in query.items() if v not in (None, "")}
    return f"{path}?{urlencode(kept)}" if kept else path


def query_of(search: str | None) -> dict[str, str]:
    """The parameters of an address; of repeated ones the first."""
    return {k: v[0] for k, v in parse_qs((search or "").lstrip("?")).items()}


def link(text: Child, path: str, **query: object) -> dcc.Link:
    return dcc.Link(text, href=href(path, **query))


def trial_link(run: str, number: int, baseline: str | None = None) -> dcc.Link:
    """A link to a trial's page."""
    text = f"{number} {baseline}" if baseline else str(number)
    return link(text, "/trial", run=run, trial=number)


def note(text: Child) -> html.P:
    return html.P(text, className="note")


def sentence(text: str) -> html.P:
    """What stands in the place of a view that has nothing to show."""
    return html.P(text, className="sentence", role="status")


def table(
    caption: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[Child]],
    numbers: Sequence[str] = (),
    code: Sequence[str] = (),
    roles: Sequence[str] | None = None,
    most: int = MOST_ROWS,
) -> html.Div:
    """A table with a caption; `numbers` and `code` name columns, `roles` is a class per row."""
    kinds = ["n" if c in numbers else "code" if c in code else "" for c in columns]
    shown = rows[:most]
    body = [
        html.Tr(
            [
                html.Td(html.Code(cell) if kind == "code" and cell else cell, className=kind)
                for kind, cell in zip(kinds, row, strict=True)
            ],
            className=roles[i] if roles else "",
        )
        for i, row in enumerate(shown)
    ]
    more = f" (the first {most:,} of {len(rows):,})" if len(rows) > most else ""
    return html.Div(
        html.Table(
            [
                html.Caption(caption + more),
                html.Thead(
                    html.Tr(
                        [
                            html.Th(c, scope="col", className=k)
                            for c, k in zip(columns, kinds, strict=True)
                        ]
                    )
                ),
                html.Tbody(body),
            ]
        ),
        className="wrap",
        # A table that scrolls sideways must be reachable by keyboard.
        tabIndex=0,
        role="region",
        **{"aria-label": caption},
    )


def fold(summary: str, children: Child, opened: bool = False) -> html.Details:
    return html.Details([html.Summary(summary), html.Div(children)], open=opened)


def graph(name: str, figure: go.Figure) -> dcc.Graph:
    height = int(figure.layout.height or 450)
    return dcc.Graph(id=name, figure=figure, config=CONFIG, style={"height": f"{height}px"})


def plot(name: str, figure: go.Figure, said: str, rows: Child | None = None) -> html.Figure:
    """A plot with its summary in words and, folded, its numbers as a table."""
    words = html.Figcaption(said, id=f"{name}-said")
    parts: list[Child] = [graph(name, figure), words]
    if rows is not None:
        parts.append(fold("The numbers as a table", rows))
    return html.Figure(parts)


def control(label: str, component: Child, hint: str = "") -> html.Div:
    """A control under its visible label."""
    return html.Div(
        [
            html.Label(label, htmlFor=component.id, id=f"{component.id}-label"),
            component,
            *([html.Span(hint, className="hint")] if hint else []),
        ],
        className="control",
    )


def choice(name: str, options: Sequence[Mapping[str, Any]] | Sequence[str], value: str) -> Any:
    return dcc.Dropdown(
        id=name, options=list(options), value=value, clearable=False, searchable=False
    )


def tiles(facts: Sequence[tuple[str, str]]) -> html.Div:
    """Facts as large numbers over their names."""
    return html.Div(
        [html.Div([html.B(value), html.Span(name)], className="tile") for value, name in facts],
        className="tiles",
    )


def badge(state: str) -> html.Span:
    return html.Span(state, className=f"badge {state}")
