"""The plots of a run as plotly figures: the report and any other page show the same ones.

Colours are Okabe and Ito's, which colour-blind people tell apart; every group has a marker shape of
its own as well. Figures have no background and take their ink from `INK`, which holds 3:1 on white
and on near-black pages.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from html import escape
from typing import Any

import plotly.graph_objects as go

from .front import Outcome, label_text, measurement, shown_value
from .objectives import Goal
from .records import TrialRecord
from .units import bytes_text, count_text, value_text

BLUE, ORANGE, GREEN, VERMILLION, PURPLE = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7"
INK = "#7b8494"
GRID = "rgba(123,132,148,0.22)"

LOG_SPAN = 12.0
"""An axis of counts, bytes or times is logarithmic where its values span at least this factor."""

_Rect = tuple[float, float, float, float]

_WIDTH, _HEIGHT = 820.0, 460.0
"""The plot's size in pixels that labels are placed for."""

_GROUPS: dict[str, dict[str, Any]] = {
    "found, on the front": {"color": BLUE, "symbol": "circle", "size": 12},
    "found, dominated": {"color": INK, "symbol": "circle-open", "size": 8},
    "baseline, on the front": {"color": VERMILLION, "symbol": "diamond", "size": 12},
    "baseline, dominated": {"color": VERMILLION, "symbol": "diamond-open", "size": 11},
    "stopped early": {"color": PURPLE, "symbol": "triangle-down-open", "size": 8},
    "infeasible": {"color": INK, "symbol": "x-thin-open", "size": 8},
}
"""The groups of the front's plot, in the order of the legend."""


def front_figure(found: Outcome, x: Goal, y: Goal) -> go.Figure:
    """The trials over two objectives; baselines carry their names, the knee is named too."""
    groups = _grouped(found)
    shown = {
        name: [t for t in trials if _is_shown(t, x) and _is_shown(t, y)]
        for name, trials in groups.items()
    }
    everyone = [t for trials in shown.values() for t in trials]
    figure = go.Figure(layout=_layout())
    _axis(figure, "x", x, [v for t in everyone for v in _extent(t, x)])
    _axis(figure, "y", y, [v for t in everyone for v in _extent(t, y)])
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
    for name in reversed(_GROUPS):
        if shown[name]:
            figure.add_trace(_points(name, shown[name], found, x, y))
    _labels(figure, found, everyone, x, y)
    return figure


def _grouped(found: Outcome) -> dict[str, list[TrialRecord]]:
    front = {t.number for t in found.front}
    groups: dict[str, list[TrialRecord]] = {name: [] for name in _GROUPS}
    for trial in found.complete:
        who = "found" if trial.baseline is None else "baseline"
        where = "on the front" if trial.number in front else "dominated"
        groups[f"{who}, {where}"].append(trial)
    groups["stopped early"] = list(found.stopped)
    groups["infeasible"] = list(found.infeasible)
    return groups


def _is_shown(trial: TrialRecord, goal: Goal) -> bool:
    return math.isfinite(trial.values.get(goal.label, math.nan))


def _extent(trial: TrialRecord, goal: Goal) -> list[float]:
    """The value and, where it was measured, the ends of its error bar."""
    found = measurement(trial, goal.label)
    return [trial.values[goal.label], *((found.low, found.high) if found else ())]


def _points(
    name: str, trials: Sequence[TrialRecord], found: Outcome, x: Goal, y: Goal
) -> go.Scatter:
    style = _GROUPS[name]
    return go.Scatter(
        name=name,
        x=[t.values[x.label] for t in trials],
        y=[t.values[y.label] for t in trials],
        error_x=_errors(trials, x),
        error_y=_errors(trials, y),
        mode="markers",
        marker={
            "color": style["color"],
            "symbol": style["symbol"],
            "size": style["size"],
            "line": {"width": 1.8, "color": style["color"]},
        },
        text=[_hover(t, found) for t in trials],
        customdata=[t.number for t in trials],
        hovertemplate="%{text}<extra></extra>",
        legendrank=list(_GROUPS).index(name) + 1,
    )


def _errors(trials: Sequence[TrialRecord], goal: Goal) -> dict[str, Any] | None:
    """The 10th to 90th percentile of what was measured; None where nothing was."""
    spreads = []
    for trial in trials:
        found = measurement(trial, goal.label)
        value = trial.values[goal.label]
        spreads.append((found.high - value, value - found.low) if found else (0.0, 0.0))
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
        if _is_shown(t, x) and _is_shown(t, y)
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

    taken = [(px - 7, py - 7, px + 7, py + 7) for px, py in map(pixel, everyone)]
    named = [(t, t.baseline or "") for t in everyone if t.baseline]
    named += [(t, "knee") for t in everyone if t.number == found.knee and not t.baseline]
    for trial, text in named:
        px, py = pixel(trial)
        half, tall = 3.6 * len(text) + 3, 8.0
        places: list[tuple[float, int, float, float, _Rect]] = []
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


def _overlap(a: _Rect, b: _Rect) -> float:
    wide = min(a[2], b[2]) - max(a[0], b[0])
    tall = min(a[3], b[3]) - max(a[1], b[1])
    return wide * tall if wide > 0 and tall > 0 else 0.0


def _outside(box: _Rect) -> bool:
    return box[0] < 0 or box[1] < 0 or box[2] > _WIDTH or box[3] > _HEIGHT


def _coordinate(axis: Any, value: float) -> float:
    return math.log10(value) if axis.type == "log" else value


def _scale(axis: Any, size: float) -> Any:
    low, high = axis.range
    return lambda value: (_coordinate(axis, value) - low) / (high - low) * size


def hypervolume_figure(found: Outcome) -> go.Figure:
    """The hypervolume after each complete trial, baselines marked."""
    figure = go.Figure(layout=_layout())
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
        style = _GROUPS[group]
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
    figure = go.Figure(layout=_layout())
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


def _layout() -> dict[str, Any]:
    axis = {
        "gridcolor": GRID,
        "zeroline": False,
        "linecolor": INK,
        "showline": True,
        "ticks": "outside",
        "tickcolor": INK,
    }
    return {
        "template": None,
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "system-ui, sans-serif", "size": 13, "color": INK},
        "margin": {"l": 70, "r": 20, "t": 60, "b": 60},
        "height": 560,
        "legend": {
            "orientation": "h",
            "y": 1.02,
            "yanchor": "bottom",
            "x": 0,
            "font": {"size": 12},
        },
        "modebar": {
            "bgcolor": "rgba(0,0,0,0)",
            "color": INK,
            "activecolor": BLUE,
            "orientation": "v",
        },
        "hoverlabel": {"align": "left"},
        "xaxis": dict(axis),
        "yaxis": dict(axis),
    }


def _axis(figure: go.Figure, which: str, goal: Goal, values: Sequence[float]) -> None:
    """Title, range and ticks of an axis, in the objective's own unit."""
    unit = goal.objective.unit
    title = escape(label_text(goal)) + (
        "" if unit in ("score", "bytes", "s") else f" ({escape(unit)})"
    )
    update: dict[str, Any] = {"title_text": title}
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    if unit != "score" and low > 0 and high / low >= LOG_SPAN:
        edge = 0.08 * math.log10(high / low)
        span = (math.log10(low) - edge, math.log10(high) + edge)
        update["type"] = "log"
        ticks = _log_ticks(10 ** span[0], 10 ** span[1], 2.0 if unit == "bytes" else 10.0)
    else:
        edge = 0.08 * (high - low) or abs(high) * 0.1 or 0.5
        span = (low - edge, high + edge)
        update["type"] = "linear"
        ticks = _even_ticks(*span, 1024.0 if unit == "bytes" else 1000.0)
    update["range"] = list(span)
    if unit == "bytes":
        update["tickvals"], update["ticktext"] = ticks, [bytes_text(v) for v in ticks]
    elif unit == "s":
        update["tickvals"], update["ticktext"] = ticks, [value_text(v, unit) for v in ticks]
    elif unit in ("parameters", "FLOPs", "tokens/s"):
        update["tickvals"], update["ticktext"] = ticks, [count_text(v) for v in ticks]
    figure.update_layout({f"{which}axis": update})


def _log_ticks(low: float, high: float, base: float) -> list[float]:
    first, last = math.ceil(math.log(low, base)), math.floor(math.log(high, base))
    powers = [base**k for k in range(first, last + 1)]
    if base == 10.0:
        # Between two tens stand 2 and 5.
        marks = [f * 10.0**k for k in range(first - 1, last + 1) for f in (1, 2, 5)]
        inside = [m for m in marks if low <= m <= high]
        return inside if len(inside) <= 8 else powers
    step = max(1, math.ceil(len(powers) / 7))
    return powers[::step]


def _even_ticks(low: float, high: float, kilo: float) -> list[float]:
    """About six round values; `kilo` is 1024 for bytes."""
    raw = (high - low) / 6
    unit = kilo ** math.floor(math.log(raw, kilo)) if raw > 1 else 1.0
    scale = 10 ** math.floor(math.log10(raw / unit))
    if kilo == 1024.0:
        scale, factors = 1.0, [2.0**k for k in range(11)]
    else:
        factors = [1.0, 2.0, 5.0, 10.0]
    step = next((f * scale * unit for f in factors if f * scale * unit >= raw), raw)
    first = math.ceil(low / step)
    return [k * step for k in range(first, math.floor(high / step) + 1) if k >= 0 or low < 0]
