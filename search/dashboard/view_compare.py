"""Two to four designs side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dash import Dash, Input, Output, State, dcc, html
from dash.exceptions import PreventUpdate

from ...primitives.base import show_gene
from ..figures import curves_figure
from ..front import label_text, shown_value
from ..units import bytes_text, count_text, ratio_text, value_text
from .designs import (
    UNREADABLE,
    Design,
    choices,
    context_of,
    design,
    differences,
    outline_of,
    slots_of,
)
from .parts import Child, control, href, note, plot, sentence, table
from .watch import Watch, Watched

LEAST, MOST = 2, 4


def make(watch: Watch, watched: Watched, query: Mapping[str, str]) -> list[Child]:
    """The page; the address may name the designs: `with=3,17,preset:mamba2`."""
    keys = [k for k in query.get("with", "").split(",") if k] or _first(watched)
    return [
        html.H1("Compare"),
        html.Div(
            [
                html.Div(
                    control(
                        "Two to four designs of the front, baselines or presets",
                        dcc.Dropdown(
                            id="compare-with",
                            options=_options(watched, keys),
                            value=keys[:MOST],
                            multi=True,
                            clearable=True,
                        ),
                    ),
                    className="wide-control",
                ),
                control(
                    "Add any trial by number",
                    dcc.Input(id="compare-add", type="number", min=0, step=1, debounce=True),
                ),
            ],
            className="controls",
        ),
        html.Div(_side_by_side(watch, watched, keys), id="compare-body"),
    ]


def register(app: Dash, watch: Watch) -> None:
    @app.callback(
        Output("compare-body", "children"),
        Input("compare-with", "value"),
        State("shown", "data"),
        prevent_initial_call=True,
    )
    def _update(keys: list[str] | None, shown: dict[str, str]) -> Child:
        with watch.lock:
            watched = watch.get(shown.get("run"))
            if watched is None or watched.view is None:
                raise PreventUpdate
            return _side_by_side(watch, watched, keys or [])

    @app.callback(
        Output("compare-with", "options"),
        Output("compare-with", "value"),
        Input("compare-add", "value"),
        State("compare-with", "value"),
        State("shown", "data"),
        prevent_initial_call=True,
    )
    def _add(number: int | None, keys: list[str] | None, shown: dict[str, str]) -> tuple[Any, Any]:
        with watch.lock:
            watched = watch.get(shown.get("run"))
            kept = list(keys or [])
            if number is None or watched is None or watched.view is None:
                raise PreventUpdate
            if watched.trial(number) is None or str(number) in kept or len(kept) >= MOST:
                raise PreventUpdate
            kept.append(str(number))
            return _options(watched, kept), kept


def _first(watched: Watched) -> list[str]:
    """The knee and the first baseline, or what there is."""
    found = watched.outcome()
    keys = [str(found.knee)] if found.knee is not None else []
    keys += [str(t.number) for t in found.baselines if str(t.number) not in keys][:1]
    return keys + ["preset:transformer++", "preset:mamba2"][: LEAST - len(keys)]


def _options(watched: Watched, keys: Sequence[str]) -> list[dict[str, str]]:
    also = {}
    for key in keys:
        if key.isdigit() and watched.trial(int(key)) is not None:
            also[key] = f"trial {key}"
    known = {o["value"] for o in choices(watched, {})}
    return choices(watched, {k: v for k, v in also.items() if k not in known})


def _side_by_side(watch: Watch, watched: Watched, keys: Sequence[str]) -> list[Child]:
    designs: list[Design] = []
    troubles: list[Child] = []
    for key in dict.fromkeys(keys):
        try:
            found = design(watched, key)
        except UNREADABLE as error:
            troubles.append(sentence(f"{key} cannot be shown: {error}."))
            continue
        if found is None:
            troubles.append(sentence(f"There is no design {key} in this run."))
        else:
            designs.append(found)
    if not LEAST <= len(designs) <= MOST:
        count = len(designs)
        return [*troubles, sentence(f"Choose two to four designs; {count} can be shown now.")]
    return [
        *troubles,
        *_numbers(watched, designs),
        *_pictures(watched, designs),
        *_genomes(designs),
        *_curves(watch, watched, designs),
    ]


def _numbers(watched: Watched, designs: Sequence[Design]) -> list[Child]:
    """Costs with their ratios to the first design, and objectives of those that were trained."""
    context, dtype = context_of(watched)
    totals = [outline_of(watched, d).cost.total for d in designs]
    rows: list[list[str]] = []
    counts = (
        ("parameters", [t.params for t in totals], count_text),
        ("active for one token", [t.active_params for t in totals], count_text),
        ("FLOPs per token", [t.flops_per_token for t in totals], count_text),
        (f"cache at {context:,} tokens, {dtype}", [t.state_bytes for t in totals], bytes_text),
    )
    for name, values, show in counts:
        rows.append([name, *(_ratio(show(v), v, values[0], i) for i, v in enumerate(values))])
    for goal in watched.run.goals:
        cells = []
        first = _value(designs[0], goal.label)
        for i, d in enumerate(designs):
            value = _value(d, goal.label)
            if value is None or d.trial is None:
                cells.append("not trained")
            elif goal.objective.unit == "score":
                difference = "" if i == 0 or first is None else f" ({value - first:+.3f})"
                cells.append(f"{value_text(value, 'score')}{difference}")
            else:
                cells.append(_ratio(shown_value(d.trial, goal), value, first, i))
        rows.append([label_text(goal), *cells])
    for proxy in watched.run.study.proxies:
        cells = []
        for d in designs:
            scores = d.trial.rungs[-1].scores if d.trial and d.trial.rungs else {}
            score = scores.get(proxy, {}).get("score")
            cells.append("" if score is None else f"{score:.4f}")
        rows.append([f"score, {proxy}", *cells])
    names = [d.name for d in designs]
    states = ["state", *((d.trial.state if d.trial else "preset") for d in designs)]
    return [
        html.H2("Costs and results"),
        table(
            f"In parentheses: against {names[0]}",
            ["what", *_distinct(names)],
            [states, *rows],
            _distinct(names),
        ),
    ]


def _ratio(text: str, value: float, first: float | None, index: int) -> str:
    return f"{text} (×{ratio_text(value / first)})" if index and first else text


def _value(found: Design, label: str) -> float | None:
    return found.trial.values.get(label) if found.trial is not None else None


def _distinct(names: Sequence[str]) -> list[str]:
    return [f"{n} ({i + 1})" if names.count(n) > 1 else n for i, n in enumerate(names)]


def _pictures(watched: Watched, designs: Sequence[Design]) -> list[Child]:
    cards = []
    for d in designs:
        which = {"preset": d.name} if d.trial is None else {"trial": d.key}
        cards.append(
            html.Figure(
                [
                    html.Figcaption(d.name),
                    html.Img(
                        src=href("/picture", run=watched.key, **which),
                        alt=f"Architecture of {d.name}: {' > '.join(slots_of(d.genome))}",
                        className="picture",
                    ),
                ]
            )
        )
    return [html.H2("Architectures"), html.Div(cards, className="pictures")]


def _genomes(designs: Sequence[Design]) -> list[Child]:
    names = _distinct([d.name for d in designs])
    columns = [slots_of(d.genome) for d in designs]
    rows: list[list[str]] = []
    roles = []
    for name in ("width", "position", "norm", "placement", "residual", "embedding_norm", "tied"):
        values = [show_gene(getattr(d.genome, name)) for d in designs]
        rows.append([name, *values, "same" if len(set(values)) == 1 else "differs"])
        roles.append("" if len(set(values)) == 1 else "differs")
    for i in range(max(len(c) for c in columns)):
        cells = [c[i] if i < len(c) else "" for c in columns]
        rows.append([f"slot {i}", *cells])
        rows[-1].append("same" if len(set(cells)) == 1 else "differs")
        roles.append("" if len(set(cells)) == 1 else "differs")
    parts: list[Child] = [
        html.H2("Genomes"),
        table("Gene by gene", ["gene", *names, "all"], rows, code=names, roles=roles),
    ]
    for name, other in zip(names[1:], designs[1:], strict=True):
        changes = differences(designs[0].genome, other.genome)
        items = [
            html.Li(
                [html.B(f"{sign} "), html.Code(text)],
                className={"+": "added", "-": "removed"}.get(sign, ""),
            )
            for sign, text in changes
        ]
        parts.append(html.H3(f"From {names[0]} to {name}"))
        parts.append(html.Ul(items, className="changes") if items else note("No difference."))
    return parts


def _curves(watch: Watch, watched: Watched, designs: Sequence[Design]) -> list[Child]:
    curves = {d.name: watch.curves(watched, d.trial.number) for d in designs if d.trial is not None}
    parts: list[Child] = [html.H2("Learning curves")]
    plots = []
    for i, proxy in enumerate(watched.run.study.proxies):
        lines = {name: rows[proxy] for name, rows in curves.items() if proxy in rows}
        if not lines:
            continue
        dashed = {d.name for d in designs if d.trial is not None and d.trial.baseline}
        figure = curves_figure(lines, "loss", "training loss", dashed)
        figure.update_layout(showlegend=True)
        ends = [
            f"{name} {last[-1]['loss']:.3f} at step {last[-1]['step']:,}"
            for name, rows in lines.items()
            if (last := [r for r in rows if "loss" in r])
        ]
        said = f"{proxy}: last training losses: {'; '.join(ends)}. Dashed: baselines."
        plots.append(plot(f"compare-curve-{i}", figure, said, _losses(proxy, lines)))
    if not plots:
        return [*parts, sentence("None of these designs has learning curves in this run.")]
    return [*parts, html.Div(plots, className="two")]


def _losses(proxy: str, lines: Mapping[str, Sequence[Mapping[str, float]]]) -> Child:
    """The curves of a proxy as numbers, at up to twenty of the steps."""
    losses = {
        name: {int(row["step"]): row["loss"] for row in rows if "loss" in row}
        for name, rows in lines.items()
    }
    steps = sorted({step for by_step in losses.values() for step in by_step})
    chosen = steps[:: max(1, len(steps) // 20)]
    body = [
        [
            f"{step:,}",
            *(f"{by[step]:.4f}" if step in by else "" for by in losses.values()),
        ]
        for step in chosen
    ]
    return table(f"Training loss on {proxy}", ["step", *losses], body, ["step", *losses])
