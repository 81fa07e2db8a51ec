"""Plots of what matters: importances, a trait against an objective, parallel coordinates; and of
where the time went."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np
import plotly.graph_objects as go

from .budget import Occupancy, RungTime
from .effects import Effect
from .figures_front import grouped, is_shown
from .front import Outcome, label_text
from .objectives import Goal
from .plotting import (
    BLUE,
    GREEN,
    GROUPS,
    INK,
    ORANGE,
    VERMILLION,
    is_wide,
    layout,
    scale_axis,
    time_unit,
)
from .records import TrialRecord
from .units import duration_text, value_text

MOST_BARS = 14
MOST_LINES = 150
_TRAINED = tuple(GROUPS)[:4]


def importance_figure(found: Sequence[Effect], goal: Goal) -> go.Figure:
    """The most important traits as bars; hatched where more of the trait goes with worse values."""
    shown = list(found[:MOST_BARS])[::-1]
    figure = go.Figure(layout=layout())
    sign = -1 if goal.objective.direction == "minimize" else 1
    kinds = (
        ("more goes with better", BLUE, ""),
        ("more goes with worse", VERMILLION, "/"),
        ("no order (a choice)", INK, "."),
    )
    for number, (name, colour, hatch) in enumerate(kinds):
        chosen = [e for e in shown if number == (2 if e.rank is None else int(sign * e.rank < 0))]
        if chosen:
            figure.add_trace(
                go.Bar(
                    name=name,
                    orientation="h",
                    y=[escape(e.trait) for e in chosen],
                    x=[e.importance for e in chosen],
                    marker={"color": colour, "pattern": {"shape": hatch, "solidity": 0.3}},
                    hovertemplate="%{y}: %{x:.1%}<extra></extra>",
                )
            )
    figure.update_yaxes(categoryorder="array", categoryarray=[escape(e.trait) for e in shown])
    figure.update_yaxes(automargin=True, showgrid=False)
    figure.update_xaxes(title_text=f"importance for {escape(goal.label)}", tickformat=".0%")
    figure.update_layout(height=120 + 26 * max(3, len(shown)), showlegend=True, bargap=0.35)
    return figure


def trait_figure(found: Outcome, values: Mapping[int, float], trait: str, goal: Goal) -> go.Figure:
    """A numeric trait against an objective; `values` maps trials to the trait's value."""
    groups = grouped(found)
    figure = go.Figure(layout=layout())
    shown = {
        name: [t for t in groups[name] if t.number in values and is_shown(t, goal)]
        for name in _TRAINED
    }
    everyone = [t for trials in shown.values() for t in trials]
    scale_axis(figure, "y", goal, [t.values[goal.label] for t in everyone])
    for name in reversed(_TRAINED):
        if not shown[name]:
            continue
        style = GROUPS[name]
        # Equal values of a trait would hide one another: a fixed jitter by the trial's number.
        spread = max(values.values(), default=1.0) - min(values.values(), default=0.0)
        figure.add_trace(
            go.Scatter(
                name=name,
                x=np.array([values[t.number] + _jitter(t) * (spread or 1.0) for t in shown[name]]),
                y=np.array([t.values[goal.label] for t in shown[name]]),
                mode="markers",
                marker={
                    "color": style["color"],
                    "symbol": style["symbol"],
                    "size": style["size"] * 0.8,
                    "line": {"width": 1.5, "color": style["color"]},
                },
                customdata=[t.number for t in shown[name]],
                hovertemplate="trial %{customdata}<extra></extra>",
                legendrank=_TRAINED.index(name) + 1,
            )
        )
    figure.update_xaxes(title_text=escape(trait))
    figure.update_layout(height=380, showlegend=True)
    return figure


def _jitter(trial: TrialRecord) -> float:
    return ((trial.number * 0.618034) % 1.0 - 0.5) * 0.02


def parallel_figure(
    found: Outcome, rows: Mapping[int, Mapping[str, float]], names: Sequence[str]
) -> go.Figure:
    """Parallel coordinates over traits and objectives; better is up on an objective's axis.

    Drawn as lines, because plotly's own kind needs WebGL and has neither shapes nor a legend."""
    columns = [*names, *(goal.label for goal in found.goals)]
    goals = {goal.label: goal for goal in found.goals}
    groups = {name: [t for t in grouped(found)[name] if t.number in rows] for name in _TRAINED}
    everyone = [t for trials in groups.values() for t in trials]
    figure = go.Figure(layout=layout())
    if not everyone:
        return figure

    def value(trial: TrialRecord, column: str) -> float:
        if column in goals:
            return float(trial.values[column])
        return float(rows[trial.number][column])

    places: dict[str, tuple[float, float, bool]] = {}
    for column in columns:
        numbers = np.array([value(t, column) for t in everyone])
        wide = column in goals and is_wide(goals[column], numbers)
        numbers = np.log10(numbers) if wide else numbers
        places[column] = (float(numbers.min()), float(numbers.max()), wide)

    def height(trial: TrialRecord, column: str) -> float:
        low, high, wide = places[column]
        number = value(trial, column)
        number = math.log10(number) if wide else number
        share = (number - low) / (high - low) if high > low else 0.5
        turned = column in goals and goals[column].objective.direction == "minimize"
        return 1 - share if turned else share

    styles = {
        "found, on the front": (BLUE, "solid", 2.2, 1.0),
        "found, dominated": (INK, "solid", 0.8, 0.35),
        "baseline, on the front": (VERMILLION, "dash", 2.2, 1.0),
        "baseline, dominated": (VERMILLION, "dot", 1.6, 0.9),
    }
    for name in reversed(_TRAINED):
        trials = groups[name][:: max(1, len(groups[name]) // MOST_LINES)]
        if not trials:
            continue
        colour, dash, width, opacity = styles[name]
        xs: list[float | None] = []
        ys: list[float | None] = []
        for trial in trials:
            xs += [*range(len(columns)), None]
            ys += [*(height(trial, column) for column in columns), None]
        figure.add_trace(
            go.Scatter(
                name=name,
                x=xs,
                y=ys,
                mode="lines",
                line={"color": colour, "dash": dash, "width": width},
                opacity=opacity,
                hoverinfo="skip",
                legendrank=_TRAINED.index(name) + 1,
            )
        )
    for i, column in enumerate(columns):
        low, high, wide = places[column]
        unit = goals[column].objective.unit if column in goals else ""
        ends = [value_text(10**v if wide else v, unit) for v in (low, high)]
        if column in goals and goals[column].objective.direction == "minimize":
            ends.reverse()
        for y, text, anchor in ((0, ends[0], "top"), (1, ends[1], "bottom")):
            figure.add_annotation(
                x=i, y=y, text=escape(text), showarrow=False, yanchor=anchor, font={"size": 12}
            )
        figure.add_vline(x=i, line={"color": INK, "width": 1})
    labels = [label_text(goals[c]) if c in goals else c for c in columns]
    figure.update_xaxes(
        tickvals=list(range(len(columns))),
        ticktext=[escape(label) for label in labels],
        # Upright where they do not fit; askew the last ones would be cut.
        autotickangles=[0, 90],
        showgrid=False,
        showline=False,
        ticks="",
        range=[-0.3, len(columns) - 0.7],
    )
    figure.update_yaxes(visible=False, range=[-0.12, 1.12])
    figure.update_layout(height=420, margin={"l": 30})
    return figure


def rung_figure(found: Sequence[RungTime]) -> go.Figure:
    """Worker time per rung."""
    figure = go.Figure(layout=layout())
    scale, word = time_unit(max((r.seconds for r in found), default=0.0))
    figure.add_trace(
        go.Bar(
            x=[f"rung {r.rung}" for r in found],
            y=[r.seconds / scale for r in found],
            text=[f"{duration_text(r.seconds)}, {r.trials:,} trials" for r in found],
            textposition="outside",
            cliponaxis=False,
            marker={"color": BLUE},
            width=0.5,
            hoverinfo="skip",
        )
    )
    figure.update_yaxes(title_text=f"worker {word}", rangemode="tozero")
    figure.update_layout(height=340)
    return figure


def occupancy_figure(found: Occupancy) -> go.Figure:
    """The share of the workers that trained, over the time at work."""
    figure = go.Figure(layout=layout())
    scale, word = time_unit(found.edges[-1])
    figure.add_trace(
        go.Scatter(
            x=[edge / scale for edge in found.edges],
            y=[*found.shares, found.shares[-1]],
            mode="lines",
            line={"shape": "hv", "color": GREEN, "width": 2},
            fill="tozeroy",
            fillcolor="rgba(0,158,115,0.18)",
            name="busy",
            showlegend=False,
            hovertemplate="%{y:.0%} at %{x:.1f} " + word + "<extra></extra>",
        )
    )
    figure.add_hline(y=found.mean, line={"color": ORANGE, "dash": "dash", "width": 1.5})
    figure.add_annotation(
        x=0.5,
        xref="paper",
        xanchor="center",
        # Under the line, where the filled area is and no curve runs.
        y=found.mean - 0.01,
        yanchor="top",
        showarrow=False,
        text=f"mean {found.mean:.0%}",
    )
    figure.update_xaxes(title_text=f"{word} at work", rangemode="tozero")
    figure.update_yaxes(title_text="workers that train", tickformat=".0%", range=[0, 1.08])
    figure.update_layout(height=340)
    return figure
