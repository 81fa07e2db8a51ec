"""What every plot shares: colours, marker shapes, the layout, axes in an objective's own unit.

Colours are Okabe and Ito's, which colour-blind people tell apart; every group has a marker shape of
its own as well. Figures have no background and take their ink from `INK`, which holds 3:1 on white
and on near-black pages.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from .front import label_text
from .objectives import Goal
from .units import bytes_text, count_text, value_text

BLUE, ORANGE, GREEN, VERMILLION, PURPLE = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7"
INK = "#7b8494"
GRID = "rgba(123,132,148,0.22)"

LOG_SPAN = 12.0
"""An axis of counts, bytes or times is logarithmic where its values span at least this factor."""

GROUPS: dict[str, dict[str, Any]] = {
    "found, on the front": {"color": BLUE, "symbol": "circle", "size": 12},
    "found, dominated": {"color": INK, "symbol": "circle-open", "size": 8},
    "baseline, on the front": {"color": VERMILLION, "symbol": "diamond", "size": 12},
    "baseline, dominated": {"color": VERMILLION, "symbol": "diamond-open", "size": 11},
    "stopped early": {"color": PURPLE, "symbol": "triangle-down-open", "size": 8},
    "infeasible": {"color": INK, "symbol": "x-thin-open", "size": 8},
    "failed": {"color": ORANGE, "symbol": "hourglass-open", "size": 9},
}
"""The groups of the front's plot, in the order of the legend."""


def layout() -> dict[str, Any]:
    """The layout that every plot begins with."""
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


def scale_axis(
    figure: go.Figure,
    which: str,
    goal: Goal,
    values: Sequence[float],
    window: Sequence[float] | None = None,
) -> None:
    """Title, range and ticks of an axis, in the objective's own unit. `window` is a range in the
    axis' coordinates that is in sight instead of all values."""
    unit = goal.objective.unit
    title = escape(label_text(goal)) + (
        "" if unit in ("score", "bytes", "s") else f" ({escape(unit)})"
    )
    update: dict[str, Any] = {"title_text": title}
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    if is_wide(goal, np.array([low, high])):
        edge = 0.08 * math.log10(high / low)
        span = (math.log10(low) - edge, math.log10(high) + edge)
        span = span if window is None else (min(window), max(window))
        update["type"] = "log"
        ticks = log_ticks(10 ** span[0], 10 ** span[1], 2.0 if unit == "bytes" else 10.0)
    else:
        edge = 0.08 * (high - low) or abs(high) * 0.1 or 0.5
        span = (low - edge, high + edge)
        span = span if window is None else (min(window), max(window))
        update["type"] = "linear"
        ticks = even_ticks(*span, 1024.0 if unit == "bytes" else 1000.0)
    update["range"] = list(span)
    if unit == "bytes":
        update["tickvals"], update["ticktext"] = ticks, [bytes_text(v) for v in ticks]
    elif unit == "s":
        update["tickvals"], update["ticktext"] = ticks, [value_text(v, unit) for v in ticks]
    elif unit in ("parameters", "FLOPs", "tokens/s"):
        update["tickvals"], update["ticktext"] = ticks, [count_text(v) for v in ticks]
    figure.update_layout({f"{which}axis": update})


def is_wide(goal: Goal, values: NDArray[np.float64]) -> bool:
    """Whether finite values of an objective want a logarithmic scale."""
    if goal.objective.unit == "score" or not len(values):
        return False
    return bool(values.min() > 0 and values.max() / values.min() >= LOG_SPAN)


def time_unit(longest: float) -> tuple[float, str]:
    """Seconds of the unit that times up to `longest` seconds read best in, and its name."""
    if longest >= 7200:
        return 3600.0, "hours"
    return (60.0, "minutes") if longest >= 120 else (1.0, "seconds")


def log_ticks(low: float, high: float, base: float) -> list[float]:
    """A few round values between two that are above 0."""
    first, last = math.ceil(math.log(low, base)), math.floor(math.log(high, base))
    powers = [base**k for k in range(first, last + 1)]
    if base == 10.0:
        # Between two tens stand 2 and 5.
        marks = [f * 10.0**k for k in range(first - 1, last + 1) for f in (1, 2, 5)]
        inside = [m for m in marks if low <= m <= high]
        return inside if len(inside) <= 8 else powers
    step = max(1, math.ceil(len(powers) / 7))
    return powers[::step]


def even_ticks(low: float, high: float, kilo: float) -> list[float]:
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
