"""The plots of a run beside its front, as plotly figures: progress and learning curves."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from html import escape

import plotly.graph_objects as go

from .front import Outcome
from .plotting import BLUE, GREEN, GROUPS, INK, ORANGE, PURPLE, VERMILLION, layout


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
