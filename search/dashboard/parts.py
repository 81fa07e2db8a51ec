"""Small pieces that every view is made of. Dash escapes every text by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any
from urllib.parse import parse_qs, urlencode

import plotly.graph_objects as go
from dash import dcc, html

MOST_ROWS = 200
"""Rows of a table that are shown; a sentence says how many there are."""

_CHANGES = {"+": "added", "-": "removed"}

Child = Any
"""What Dash takes as a child: a component, a text, or a list of them."""

CONFIG: Any = {
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


def attributes(html: str = "", label: str = "", live: str = "") -> dict[str, Any]:
    """Attributes whose names hold a dash."""
    given = {"data-html": html, "aria-label": label, "aria-live": live}
    return {name: value for name, value in given.items() if value}


def link(text: Child, path: str, **query: object) -> dcc.Link:
    return dcc.Link(text, href=href(path, **query))


class Raw(str):
    """HTML that this module made, every text in it escaped. Only tables take it."""


def anchor(text: str, path: str, **query: object) -> Raw:
    """A link within the dashboard, as a cell of a table."""
    return Raw(f'<a data-inner href="{escape(href(path, **query))}">{escape(text)}</a>')


def trial_link(run: str, number: int, baseline: str | None = None) -> Raw:
    """A link to a trial's page, as a cell of a table."""
    text = f"{number} {baseline}" if baseline else str(number)
    return anchor(text, "/trial", run=run, trial=number)


def badge(state: str) -> Raw:
    """A state, as a cell of a table."""
    return Raw(f'<span class="badge {escape(state)}">{escape(state)}</span>')


def changes(found: Sequence[tuple[str, str]], most: int = 8) -> Raw:
    """Signs and texts of `designs.differences` as a list, as a cell of a table."""
    items = [
        f'<li class="{_CHANGES.get(sign, "")}">'
        f"<b>{escape(sign)}</b> <code>{escape(text)}</code></li>"
        for sign, text in found[:most]
    ]
    if len(found) > most:
        items.append(f"<li>and {len(found) - most} more</li>")
    return Raw(f'<ul class="changes">{"".join(items)}</ul>' if items else "")


def joined(cells: Sequence[Raw]) -> Raw:
    return Raw(" ".join(cells))


def note(text: Child) -> html.P:
    return html.P(text, className="note")


def sentence(text: str) -> html.P:
    """What stands in the place of a view that has nothing to show."""
    return html.P(text, className="sentence", role="status")


def table(
    caption: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    numbers: Sequence[str] = (),
    code: Sequence[str] = (),
    roles: Sequence[str] | None = None,
    most: int = MOST_ROWS,
) -> html.Div:
    """A table with a caption; `numbers` and `code` name columns, `roles` is a class per row. A cell
    is a text, which is escaped here, or a Raw. See assets/page.js for how it gets into the page."""
    kinds = ["n" if c in numbers else "code" if c in code else "" for c in columns]
    head = "".join(
        f'<th scope="col" class="{kind}">{escape(name)}</th>'
        for name, kind in zip(columns, kinds, strict=True)
    )
    body = []
    for i, row in enumerate(rows[:most]):
        cells = "".join(_cell(cell, kind) for cell, kind in zip(row, kinds, strict=True))
        body.append(f'<tr class="{escape(roles[i]) if roles else ""}">{cells}</tr>')
    more = f" (the first {most:,} of {len(rows):,})" if len(rows) > most else ""
    text = (
        f"<table><caption>{escape(caption + more)}</caption><thead><tr>{head}</tr></thead>"
        f"<tbody>{''.join(body)}</tbody></table>"
    )
    return html.Div(
        className="wrap",
        # A table that scrolls sideways must be reachable by keyboard.
        tabIndex=0,
        role="region",
        **attributes(html=text, label=caption),
    )


def _cell(cell: str, kind: str) -> str:
    inner = cell if isinstance(cell, Raw) else escape(cell)
    return (
        f'<td class="{kind}">{f"<code>{inner}</code>" if kind == "code" and cell else inner}</td>'
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
