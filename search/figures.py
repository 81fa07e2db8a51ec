"""The plots of a run beside its front, as plotly figures: progress and learning curves."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from html import escape
from typing import Literal

import plotly.graph_objects as go

from .front import Outcome
from .objectives import Goal
from .plotting import (
    BLUE,
    GREEN,
    GROUPS,
    INK,
    ORANGE,
    PURPLE,
    VERMILLION,
    layout,
    scale_axis,
    time_unit,
)
from .records import TrialRecord


def hypervolume_figure(found: Outcome) -> go.Figure:
    """The hypervolume after each complete trial, baselines marked."""
    figure = go.Figure(layout=layout())
    counts = list(range(1, len(found.history) + 1))
    volumes = [volume for _, volume in found.history]
    names = {t.number: t.baseline for t in found.baselines}
    figure.add_trace(
        go.Scatter(
            name="hypervolume",
            x=counts,
            y=volumes,
            mode="lines",
            line={"shape": "hv", "color": BLUE, "width": 2},
            hovertemplate="after %{x} trials: %{y:.4f}<extra></extra>",
        )
    )
    for is_baseline, group in ((False, "found, on the front"), (True, "baseline, on the front")):
        chosen = [
            i for i, (n, _) in enumerate(found.history) if (names.get(n) is not None) == is_baseline
        ]
        style = GROUPS[group]
        figure.add_trace(
            go.Scatter(
                name="baseline" if is_baseline else "found",
                x=[counts[i] for i in chosen],
                y=[volumes[i] for i in chosen],
                mode="markers",
                marker={"color": style["color"], "symbol": style["symbol"], "size": 8},
                text=[
                    escape(names.get(found.history[i][0]) or f"trial {found.history[i][0]}")
                    for i in chosen
                ],
                hovertemplate="%{text}: %{y:.4f}<extra></extra>",
            )
        )
    figure.update_xaxes(title_text="complete trials", rangemode="tozero")
    figure.update_yaxes(title_text="hypervolume ↑", rangemode="tozero")
    figure.update_layout(height=320)
    return figure


def curves_figure(
    curves: Mapping[str, Sequence[Mapping[str, float]]],
    key: str,
    label: str,
    dashed: Collection[str] = (),
) -> go.Figure:
    """One line per name over training steps; rows hold `step` and maybe `key`."""
    figure = go.Figure(layout=layout())
    palette = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, "#56B4E9", INK)
    for i, (name, rows) in enumerate(curves.items()):
        kept = [row for row in rows if key in row]
        figure.add_trace(
            go.Scatter(
                name=escape(name),
                x=[row["step"] for row in kept],
                y=[row[key] for row in kept],
                mode="lines",
                line={
                    "color": palette[i % len(palette)],
                    "dash": "dash" if name in dashed else "solid",
                    "width": 1.8,
                },
            )
        )
    figure.update_xaxes(title_text="training steps", rangemode="tozero")
    figure.update_yaxes(title_text=escape(label))
    figure.update_layout(height=360)
    return figure


LINES = (
    (BLUE, "solid", "circle"),
    (VERMILLION, "dash", "diamond"),
    (GREEN, "dot", "square"),
    (PURPLE, "dashdot", "triangle-up"),
    (ORANGE, "longdash", "cross"),
    (INK, "longdashdot", "x"),
)
"""Colour, dash and marker of the first, second, ... of several runs or designs."""


def histories_figure(
    histories: Mapping[str, Sequence[tuple[float, float]]], over: Literal["trials", "time"]
) -> go.Figure:
    """Hypervolume of several runs: rows hold complete trials or seconds, and the volume."""
    figure = go.Figure(layout=layout())
    longest = max((rows[-1][0] for rows in histories.values() if rows), default=0.0)
    scale, word = (1.0, "complete trials") if over == "trials" else time_unit(longest)
    for i, (name, rows) in enumerate(histories.items()):
        colour, dash, _ = LINES[i % len(LINES)]
        figure.add_trace(
            go.Scatter(
                name=escape(name),
                x=[row[0] / scale for row in rows],
                y=[row[1] for row in rows],
                mode="lines",
                line={"shape": "hv", "color": colour, "dash": dash, "width": 2},
            )
        )
    words = word if over == "trials" else f"{word} at work"
    figure.update_xaxes(title_text=words, rangemode="tozero")
    figure.update_yaxes(title_text="hypervolume ↑", rangemode="tozero")
    figure.update_layout(height=340, showlegend=True)
    return figure


def fronts_figure(fronts: Mapping[str, Sequence[TrialRecord]], x: Goal, y: Goal) -> go.Figure:
    """The fronts of several runs over one another; baselines are hollow."""
    figure = go.Figure(layout=layout())
    everyone = [t for trials in fronts.values() for t in trials]
    for which, goal in (("x", x), ("y", y)):
        scale_axis(figure, which, goal, [t.values[goal.label] for t in everyone])
    for i, (name, trials) in enumerate(fronts.items()):
        colour, _, symbol = LINES[i % len(LINES)]
        symbols = [symbol if t.baseline is None else f"{symbol}-open" for t in trials]
        figure.add_trace(
            go.Scatter(
                name=escape(name),
                x=[t.values[x.label] for t in trials],
                y=[t.values[y.label] for t in trials],
                mode="markers",
                marker={
                    "color": colour,
                    "symbol": symbols,
                    "size": 11,
                    "line": {"width": 2, "color": colour},
                },
                text=[escape(t.baseline or f"trial {t.number}") for t in trials],
                hovertemplate=f"{escape(name)}<br>%{{text}}<extra></extra>",
            )
        )
    figure.update_layout(height=460, showlegend=True)
    return figure
