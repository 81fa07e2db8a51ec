"""The plot of the front: trials over two objectives, groups by shape, baselines by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

import numpy as np
import plotly.graph_objects as go

from .front import Outcome, label_text, measurement, shown_value
from .objectives import Goal
from .plotting import (
    BLUE,
    GREEN,
    GRID,
    GROUPS,
    INK,
    VERMILLION,
    is_wide,
    layout,
    log_ticks,
    scale_axis,
)
from .records import TrialRecord
from .units import value_text

MANY, FEW = 1000, 400
"""Points of a group beyond which those that cover each other are drawn once; points up to which
each carries its genome as a text."""
OBSTACLES = 60
"""Points that labels keep away from, those of the front and the baselines first."""
CELL = 10.0
"""Pixels that count as one spot."""

Rect = tuple[float, float, float, float]

_WIDTH, _HEIGHT = 820.0, 460.0
"""The plot's size in pixels that labels are placed for."""

Spreads = Mapping[str, Mapping[str, tuple[float, float]]]
"""Per hash of a genome and per objective's label the least and most over several seeds."""


@dataclass(frozen=True)
class View:
    """What a plot of the front shows beside the trials' own values."""

    colour: Goal | None = None
    """A third objective as the points' colour; shapes keep telling the groups apart."""
    chosen: Collection[int] = ()
    """Trials with a ring around them."""
    spreads: Spreads = field(default_factory=dict)
    counted: Mapping[int, Mapping[str, float]] = field(default_factory=dict)
    """Values of trials that were never trained, per objective that is counted beforehand. Such a
    trial stands at the worse edge of an axis that it has no value on."""
    range_x: Sequence[float] | None = None
    """What of the axis is in sight, in the axis' coordinates; None for all. Of points that would
    cover each other there, one is drawn."""
    range_y: Sequence[float] | None = None


def front_figure(found: Outcome, x: Goal, y: Goal, view: View | None = None) -> go.Figure:
    """The trials over two objectives; baselines carry their names, the knee is named too."""
    view = View() if view is None else view
    groups = grouped(found)
    shown = {
        name: [t for t in trials if is_shown(t, x) and is_shown(t, y)]
        for name, trials in groups.items()
    }
    everyone = [t for trials in shown.values() for t in trials]
    figure = go.Figure(layout=layout())
    scale_axis(figure, "x", x, _extents(everyone, x, view), view.range_x)
    scale_axis(figure, "y", y, _extents(everyone, y, view), view.range_y)
    line = _staircase(list(found.front), x, y)
    if line:
        figure.add_trace(
            go.Scatter(
                x=[p[0] for p in line],
                y=[p[1] for p in line],
                mode="lines",
                line={"color": BLUE, "width": 1.5, "dash": "dot"},
                hoverinfo="skip",
                showlegend=False,
            )
        )
    for name in reversed(GROUPS):
        if shown[name]:
            figure.add_trace(_points(figure, name, shown[name], found, x, y, view))
    for name in ("infeasible", "failed"):
        placed = {t.number for t in shown[name]}
        _edge(figure, name, [t for t in groups[name] if t.number not in placed], x, y, view)
    _ring(figure, [t for t in everyone if t.number in view.chosen], x, y)
    if view.colour is not None:
        _colour_axis(figure, view.colour, everyone)
    _labels(figure, found, everyone, x, y)
    return figure


def grouped(found: Outcome) -> dict[str, list[TrialRecord]]:
    """The trials by the groups of the plot."""
    front = {t.number for t in found.front}
    groups: dict[str, list[TrialRecord]] = {name: [] for name in GROUPS}
    for trial in found.complete:
        who = "found" if trial.baseline is None else "baseline"
        where = "on the front" if trial.number in front else "dominated"
        groups[f"{who}, {where}"].append(trial)
    groups["stopped early"] = list(found.stopped)
    groups["infeasible"] = list(found.infeasible)
    groups["failed"] = list(found.failed)
    return groups


def is_shown(trial: TrialRecord, goal: Goal) -> bool:
    """Whether the trial has a finite value of that objective."""
    return math.isfinite(trial.values.get(goal.label, math.nan))


def _spread(trial: TrialRecord, goal: Goal, view: View) -> tuple[float, float] | None:
    """The error bar's ends: over several seeds, else over a measurement's repeats."""
    over_seeds = view.spreads.get(trial.hash, {}).get(goal.label)
    found = measurement(trial, goal.label)
    return over_seeds or ((found.low, found.high) if found else None)


def _extents(trials: Sequence[TrialRecord], goal: Goal, view: View) -> list[float]:
    """The values and, where there are any, the ends of their error bars."""
    values = [t.values[goal.label] for t in trials]
    if view.spreads or goal.objective.stage == "measured":
        values += [v for t in trials for v in _spread(t, goal, view) or ()]
    return values


def _points(
    figure: go.Figure,
    name: str,
    trials: Sequence[TrialRecord],
    found: Outcome,
    x: Goal,
    y: Goal,
    view: View,
) -> go.Scatter:
    style = GROUPS[name]
    drawn = trials if len(trials) <= MANY else _thinned(figure, trials, x, y)
    few = len(drawn) <= FEW
    marker: dict[str, Any] = {"symbol": style["symbol"], "size": style["size"]}
    if view.colour is None:
        marker |= {"color": style["color"], "line": {"width": 1.8, "color": style["color"]}}
    else:
        values = np.array([t.values.get(view.colour.label, math.nan) for t in drawn])
        wide = is_wide(view.colour, np.array([t.values[view.colour.label] for t in found.complete]))
        marker |= {"color": np.log10(values) if wide else values, "coloraxis": "coloraxis"}
        marker["line"] = {"width": 1.8}
    more = "" if len(drawn) == len(trials) else f" ({len(drawn):,} of {len(trials):,} drawn)"
    return go.Scatter(
        name=name + more,
        x=np.array([t.values[x.label] for t in drawn]),
        y=np.array([t.values[y.label] for t in drawn]),
        error_x=_errors(drawn, x, view),
        error_y=_errors(drawn, y, view),
        mode="markers",
        marker=marker,
        text=[_hover(t, found) for t in drawn] if few else None,
        # A list, because dcc.Graph leaves arrays out of what it tells of a click.
        customdata=[t.number for t in drawn],
        hovertemplate="%{text}<extra></extra>" if few else "trial %{customdata}<extra></extra>",
        legendrank=list(GROUPS).index(name) + 1,
    )


def _thinned(
    figure: go.Figure, trials: Sequence[TrialRecord], x: Goal, y: Goal
) -> list[TrialRecord]:
    """Of the trials in sight one for each spot of CELL pixels."""
    axes = figure.layout.xaxis, figure.layout.yaxis
    ends = np.array([axis.range for axis in axes], dtype=np.float64)
    places = np.array([[t.values[x.label], t.values[y.label]] for t in trials])
    for column, axis in enumerate(axes):
        if axis.type == "log":
            places[:, column] = np.log10(places[:, column])
    low = ends.min(1)
    span = ends.max(1) - low + 1e-300
    # Half a window around it stays drawn, so that a small move shows no hole.
    inside = np.flatnonzero((np.abs((places - low) / span - 0.5) < 1).all(1))
    cells = np.floor((places[inside] - low) / span * (_WIDTH, _HEIGHT) / CELL).astype(np.int64)
    _, first = np.unique(cells @ np.array([1, 1 << 20]), return_index=True)
    return [trials[i] for i in np.sort(inside[first])]


def _edge(
    figure: go.Figure, name: str, trials: Sequence[TrialRecord], x: Goal, y: Goal, view: View
) -> None:
    """Trials without a score, on the axis that they have a value on."""
    places: list[tuple[float, float, int]] = []
    worst = []
    for axis, goal in ((figure.layout.xaxis, x), (figure.layout.yaxis, y)):
        low, high = axis.range
        end = high if goal.objective.direction == "minimize" else low
        end += 0.015 * (low + high - 2 * end)
        worst.append(10**end if axis.type == "log" else end)
    for trial in trials[-FEW:]:
        known = {**view.counted.get(trial.number, {}), **trial.values}
        if x.label in known or y.label in known:
            at = known.get(x.label, worst[0]), known.get(y.label, worst[1])
            places.append((*at, trial.number))
    if not places:
        return
    style = GROUPS[name]
    figure.add_trace(
        go.Scatter(
            name=f"{name}, no score (at the edge)",
            x=[p[0] for p in places],
            y=[p[1] for p in places],
            customdata=[p[2] for p in places],
            mode="markers",
            marker={k: style[k] for k in ("color", "symbol", "size")} | {"line": {"width": 1.5}},
            hovertemplate="trial %{customdata}, " + name + "<extra></extra>",
            legendrank=list(GROUPS).index(name) + 1,
        )
    )


def _ring(figure: go.Figure, trials: Sequence[TrialRecord], x: Goal, y: Goal) -> None:
    if not trials:
        return
    figure.add_trace(
        go.Scatter(
            name="chosen",
            x=[t.values[x.label] for t in trials],
            y=[t.values[y.label] for t in trials],
            customdata=[t.number for t in trials],
            mode="markers",
            marker={"symbol": "circle-open", "size": 22, "color": GREEN, "line": {"width": 2.5}},
            hoverinfo="skip",
            legendrank=len(GROUPS) + 1,
        )
    )


def _colour_axis(figure: go.Figure, goal: Goal, trials: Sequence[TrialRecord]) -> None:
    values = np.array([t.values.get(goal.label, math.nan) for t in trials])
    known = values[np.isfinite(values)]
    low, high = (float(known.min()), float(known.max())) if len(known) else (0.0, 1.0)
    if is_wide(goal, known):
        ticks = log_ticks(low, high, 2.0 if goal.objective.unit == "bytes" else 10.0)
        places = [math.log10(v) for v in ticks]
        low, high = math.log10(low), math.log10(high)
    else:
        ticks = places = [low + (high - low) * k / 4 for k in range(5)]
    words = [value_text(v, goal.objective.unit) for v in ticks]
    bar = {"title": {"text": escape(label_text(goal)), "side": "right"}, "thickness": 14}
    bar |= {"tickvals": places, "ticktext": words, "outlinewidth": 0}
    # Cividis is made to look the same to people with any colour vision.
    axis = {"colorscale": "Cividis", "cmin": low, "cmax": high, "colorbar": bar}
    figure.update_layout(coloraxis=axis, margin={"r": 110})


def _errors(trials: Sequence[TrialRecord], goal: Goal, view: View) -> dict[str, Any] | None:
    """The spread over seeds or over a measurement's repeats; None where there is none."""
    if not view.spreads and goal.objective.stage != "measured":
        return None
    spreads = []
    for trial in trials:
        found = _spread(trial, goal, view)
        value = trial.values[goal.label]
        spreads.append((found[1] - value, value - found[0]) if found else (0.0, 0.0))
    if not any(up or down for up, down in spreads):
        return None
    return {
        "type": "data",
        "symmetric": False,
        "array": [max(up, 0.0) for up, _ in spreads],
        "arrayminus": [max(down, 0.0) for _, down in spreads],
        "thickness": 1,
        "width": 3,
        "color": INK,
    }


def _hover(trial: TrialRecord, found: Outcome) -> str:
    name = f"baseline {trial.baseline}" if trial.baseline else f"trial {trial.number}"
    lines = [f"<b>{escape(name)}</b> ({trial.state})"]
    lines += [
        f"{escape(goal.label)} = {escape(shown_value(trial, goal))}"
        for goal in found.goals
        if goal.label in trial.values
    ]
    if trial.state == "stopped" and trial.rungs:
        steps = ", ".join(f"{p} {n}" for p, n in trial.rungs[-1].steps.items())
        lines.append(f"stopped after steps: {escape(steps)}")
    lines += [escape(part) for part in _wrapped(trial.notation, 64)]
    return "<br>".join(lines)


def _wrapped(text: str, width: int) -> list[str]:
    words, lines = text.split(" "), [""]
    for word in words:
        if lines[-1] and len(lines[-1]) + len(word) >= width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines[:6]


def _staircase(front: Sequence[TrialRecord], x: Goal, y: Goal) -> list[tuple[float, float]]:
    """The edge of what the front dominates in the plane of the two objectives."""
    points = sorted(
        (x.loss(t.values[x.label]), y.loss(t.values[y.label]))
        for t in front
        if is_shown(t, x) and is_shown(t, y)
    )
    corners: list[tuple[float, float]] = []
    best = math.inf
    for px, py in points:
        if py < best:
            if corners:
                corners.append((px, best))
            corners.append((px, py))
            best = py
    if len(corners) < 2:
        return []
    # The sign that `loss` gives is its own inverse.
    return [(x.loss(px), y.loss(py)) for px, py in corners]


def _labels(
    figure: go.Figure, found: Outcome, everyone: Sequence[TrialRecord], x: Goal, y: Goal
) -> None:
    """Names of the baselines, and the knee, each in the free place nearest to its point."""
    if not everyone:
        return
    to_x = _scale(figure.layout.xaxis, _WIDTH)
    to_y = _scale(figure.layout.yaxis, _HEIGHT)

    def pixel(trial: TrialRecord) -> tuple[float, float]:
        return to_x(trial.values[x.label]), to_y(trial.values[y.label])

    taken = [(px - 7, py - 7, px + 7, py + 7) for px, py in map(pixel, everyone[:OBSTACLES])]
    named = [(t, t.baseline or "") for t in everyone if t.baseline]
    named += [(t, "knee") for t in everyone if t.number == found.knee and not t.baseline]
    for trial, text in named:
        px, py = pixel(trial)
        half, tall = 3.6 * len(text) + 3, 8.0
        places: list[tuple[float, int, float, float, Rect]] = []
        for distance in (0, 14, 30, 48):
            for dx, dy in ((0, 1), (0, -1), (1, 0), (-1, 0), (1, 1), (-1, 1), (1, -1), (-1, -1)):
                ax = dx * (half + 9 + distance)
                ay = dy * (tall + 9 + distance)
                box = (px + ax - half, py + ay - tall, px + ax + half, py + ay + tall)
                cost = distance / 4 + sum(_overlap(box, other) for other in taken)
                cost += 40 * _outside(box)
                places.append((cost, len(places), ax, ay, box))
        _, _, ax, ay, box = min(places)
        taken.append(box)
        colour = BLUE if text == "knee" else VERMILLION
        far = max(abs(ax) - half, abs(ay) - tall) > 12
        figure.add_annotation(
            x=_coordinate(figure.layout.xaxis, trial.values[x.label]),
            y=_coordinate(figure.layout.yaxis, trial.values[y.label]),
            ax=ax,
            # Pixels of an annotation's arrow count downwards.
            ay=-ay,
            text=escape(text),
            showarrow=True,
            arrowhead=0,
            arrowwidth=1,
            arrowcolor=GRID if far else "rgba(0,0,0,0)",
            standoff=6,
            font={"size": 12, "color": colour},
            captureevents=False,
        )


def _overlap(a: Rect, b: Rect) -> float:
    wide = min(a[2], b[2]) - max(a[0], b[0])
    tall = min(a[3], b[3]) - max(a[1], b[1])
    return wide * tall if wide > 0 and tall > 0 else 0.0


def _outside(box: Rect) -> bool:
    return box[0] < 0 or box[1] < 0 or box[2] > _WIDTH or box[3] > _HEIGHT


def _coordinate(axis: Any, value: float) -> float:
    return math.log10(value) if axis.type == "log" else value


def _scale(axis: Any, size: float) -> Callable[[float], float]:
    # Read once: each look into a figure's layout takes long.
    (low, high), log = axis.range, axis.type == "log"
    return lambda value: ((math.log10(value) if log else value) - low) / (high - low) * size


_SYMBOLS_3D = {
    "found, on the front": "circle",
    "found, dominated": "circle-open",
    "baseline, on the front": "diamond",
    "baseline, dominated": "diamond-open",
    "stopped early": "square-open",
    "infeasible": "x",
    "failed": "cross",
}
"""Plots in space have eight shapes only."""


def front_space_figure(
    found: Outcome, x: Goal, y: Goal, z: Goal, chosen: Collection[int] = ()
) -> go.Figure:
    """The trials over three objectives."""
    figure = go.Figure(layout=layout())
    goals = (x, y, z)
    scene: dict[str, Any] = {}
    for name, trials in grouped(found).items():
        shown = [t for t in trials if all(is_shown(t, g) for g in goals)][-MANY:]
        if not shown:
            continue
        points = [[t.values[g.label] for t in shown] for g in goals]
        style = GROUPS[name]
        figure.add_trace(
            go.Scatter3d(
                name=name,
                x=points[0],
                y=points[1],
                z=points[2],
                mode="markers",
                marker={
                    "symbol": _SYMBOLS_3D[name],
                    "color": style["color"],
                    "size": [16 if t.number in chosen else style["size"] - 2 for t in shown],
                    "line": {"width": 1, "color": style["color"]},
                },
                text=[_hover(t, found) for t in shown] if len(shown) <= FEW else None,
                customdata=[t.number for t in shown],
                hovertemplate=(
                    "%{text}<extra></extra>"
                    if len(shown) <= FEW
                    else "trial %{customdata}<extra></extra>"
                ),
            )
        )
    for which, goal in zip("xyz", goals, strict=True):
        values = np.array([t.values[goal.label] for t in found.complete if is_shown(t, goal)])
        axis: dict[str, Any] = {"title": {"text": escape(label_text(goal))}, "color": INK}
        # Lines in space are too thin to bear a transparent colour.
        axis |= {"gridcolor": "#aab1bd", "linecolor": INK, "showline": True}
        axis |= {"showbackground": False, "zeroline": False}
        if is_wide(goal, values):
            axis["type"] = "log"
        scene[f"{which}axis"] = axis
    scene |= {"aspectmode": "cube", "camera": {"eye": {"x": 1.5, "y": -1.6, "z": 0.9}}}
    figure.update_layout(scene=scene, margin={"l": 0, "r": 0, "b": 0})
    return figure
