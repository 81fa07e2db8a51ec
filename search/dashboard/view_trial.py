"""One trial: picture, notation, curves, costs per slot, lineage, failure, downloads."""

from __future__ import annotations

from collections.abc import Mapping

import yaml
from dash import Dash, Input, Output, State, ctx, dcc, html
from dash.exceptions import PreventUpdate

from ...genome.hash import canonical_hash
from ...primitives.base import Cost
from .. import loads
from ..exports.formats import FORMATS
from ..figures import curves_figure
from ..front import label_text, shown_value
from ..records import Measurement, TrialRecord
from ..units import bytes_text, count_text, duration_text, value_text
from .designs import UNREADABLE, Design, context_of, design, lineage, outline_of, slots_of
from .downloads import export_files
from .parts import (
    Child,
    changes,
    control,
    fold,
    href,
    joined,
    note,
    plot,
    sentence,
    table,
    trial_link,
)
from .watch import Watch, Watched


def make(watch: Watch, watched: Watched, query: Mapping[str, str]) -> list[Child]:
    """The page of one trial; the best one where the address names none."""
    number = _asked(watched, query)
    trial = watched.trial(number) if number is not None else None
    last = len(watched.run.trials) - 1
    way = html.Div(
        [
            control(
                "Trial",
                dcc.Input(
                    id="trial-number",
                    type="number",
                    min=0,
                    step=1,
                    value=number,
                    debounce=True,
                ),
                f"0 to {last}",
            )
        ],
        className="controls",
    )
    if trial is None:
        return [
            html.H1("No such trial"),
            way,
            sentence(f"The run has no trial {query.get('trial', '')}; it has 0 to {last}."),
        ]
    return [
        html.H1(_title(watched, trial)),
        way,
        html.Div(_body(watch, watched, trial), id="trial-body"),
    ]


def register(app: Dash, watch: Watch) -> None:
    @app.callback(
        Output("url", "search", allow_duplicate=True),
        Input("trial-number", "value"),
        State("url", "search"),
        State("shown", "data"),
        prevent_initial_call=True,
    )
    def _go(number: int | None, search: str, shown: dict[str, str]) -> str:
        wanted = href("", run=shown["run"], trial=number)
        if number is None or wanted == (search or ""):
            raise PreventUpdate
        return wanted

    @app.callback(
        Output("trial-body", "children"),
        Input("version", "data"),
        State("trial-number", "value"),
        State("shown", "data"),
        prevent_initial_call=True,
    )
    def _update(version: str, number: int | None, shown: dict[str, str]) -> Child:
        with watch.lock:
            watched = watch.get(shown.get("run") if shown else None)
            if watched is None or watched.view is None or number is None:
                raise PreventUpdate
            trial = watched.trial(number)
            # A trial that has ended does not change; its open folds should stay open.
            if trial is None or trial.state != "running" or not ctx.triggered_id:
                raise PreventUpdate
            return _body(watch, watched, trial)

    app.clientside_callback(  # type: ignore[no-untyped-call]
        "function(n, text) {"
        "  if (!n) { return window.dash_clientside.no_update; }"
        "  return navigator.clipboard.writeText(text)"
        "    .then(() => 'Copied.', () => 'The browser does not allow copying here.');"
        "}",
        Output("copy-said", "children"),
        Input("copy", "n_clicks"),
        State("copy-text", "children"),
        prevent_initial_call=True,
    )


def _asked(watched: Watched, query: Mapping[str, str]) -> int | None:
    text = query.get("trial")
    if text is not None:
        return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else None
    found = watched.outcome()
    if found.knee is not None:
        return found.knee
    return watched.run.trials[-1].number if watched.run.trials else None


def _title(watched: Watched, trial: TrialRecord) -> list[Child]:
    name = f"Trial {trial.number}"
    if trial.baseline:
        name += f", baseline {trial.baseline}"
    return [name, " ", html.Span(trial.state, className=f"badge {trial.state}")]


def _body(watch: Watch, watched: Watched, trial: TrialRecord) -> Child:
    parts: list[Child] = []
    if trial.failure is not None:
        parts.append(
            html.Section(
                [
                    html.H2("Why it failed"),
                    sentence(f"{trial.failure.kind}: {trial.failure.reason}"),
                    *(
                        [fold("Details", html.Pre(trial.failure.detail, tabIndex=0))]
                        if trial.failure.detail
                        else []
                    ),
                ]
            )
        )
    try:
        found = design(watched, str(trial.number))
        assert found is not None
        parts += _architecture(watched, found, trial)
    except UNREADABLE as error:
        parts += [
            html.H2("Architecture"),
            sentence(f"This genome cannot be drawn: {error}."),
            html.P(html.Code(trial.notation, id="copy-text")),
        ]
    parts += _results(watched, trial)
    parts += _curves(watch, watched, trial)
    parts += _lineage(watched, trial)
    return parts


def _architecture(watched: Watched, found: Design, trial: TrialRecord) -> list[Child]:
    context, dtype = context_of(watched)
    content = outline_of(watched, found)
    counted = content.cost
    slots = slots_of(found.genome)
    clocks = _clocks(trial, len(slots))
    rows = [
        [str(i), slots[i], *_costs(cost), *(value_text(m.slots[i], "s") for m in clocks.values())]
        for i, cost in enumerate(counted.slots)
    ]
    rest = [""] * len(clocks)
    rows.append(["", "embedding", *_costs(counted.embedding), *rest])
    rows.append(["", "head", *_costs(counted.head), *rest])
    whole = [value_text(m.median, m.unit) for m in clocks.values()]
    rows.append(["", "whole model", *_costs(counted.total), *whole])
    columns = ["slot", "operators", "parameters", "active", "cache", "FLOPs per token", *clocks]
    downloads: list[Child] = []
    for kind in FORMATS:
        address = href("/export", run=watched.key, trial=trial.number, format=kind)
        downloads.append(
            html.A(f"Download {kind} (zip)", href=address, download="", className="button")
        )
    for name in export_files():
        address = href("/export", run=watched.key, trial=trial.number, file=name)
        downloads.append(html.A(name, href=address, download="", className="button plain"))
    return [
        html.H2("Architecture"),
        html.Div(
            [
                html.Img(
                    src=href("/picture", run=watched.key, trial=trial.number),
                    alt=f"Architecture of {found.name}: {trial.notation}",
                    className="picture",
                ),
                html.Div(
                    [
                        html.H3("Notation"),
                        html.P(html.Code(trial.notation, id="copy-text")),
                        html.P(
                            [
                                html.Button("Copy the notation", id="copy", n_clicks=0),
                                html.Span(id="copy-said", className="note", role="status"),
                            ]
                        ),
                        html.H3("Take it along"),
                        html.Div(downloads, className="buttons"),
                        fold(
                            "The genome as YAML",
                            html.Pre(yaml.safe_dump(trial.genome, sort_keys=False), tabIndex=0),
                        ),
                        note(f"hash {canonical_hash(found.genome)[:16]}"),
                    ],
                    className="grow",
                ),
            ],
            className="split",
        ),
        html.H2("Costs per slot"),
        table(
            f"Costs; cache of one sequence of {context:,} tokens in {dtype}",
            columns,
            rows,
            columns[2:],
            ["operators"],
        ),
        note(
            "Latency of a slot: the median within whole calls, by clocks that cost a little "
            "themselves; the whole model is timed without them."
            if clocks
            else "No latency was measured in this trial; a study with an objective "
            "latency_decode or latency_prefill measures it for every slot."
        ),
    ]


def _clocks(trial: TrialRecord, slots: int) -> dict[str, Measurement]:
    """The latencies of the last rung whose time is known slot by slot, by objective."""
    found = trial.rungs[-1].measurements if trial.rungs else {}
    return {label: m for label, m in found.items() if len(m.slots) == slots}


def _costs(cost: Cost) -> list[str]:
    return [
        count_text(cost.params),
        count_text(cost.active_params),
        bytes_text(cost.state_bytes),
        count_text(cost.flops_per_token),
    ]


def _results(watched: Watched, trial: TrialRecord) -> list[Child]:
    rows: list[list[str]] = []
    for rung in trial.rungs:
        for proxy, scores in rung.scores.items():
            others = ", ".join(f"{k} {v:.4g}" for k, v in scores.items() if k != "score")
            score = scores.get("score")
            steps = f"{rung.steps.get(proxy, 0):,}"
            shown = "" if score is None else f"{score:.4f}"
            rows.append([str(rung.rung), proxy, steps, shown, others])
    facts: list[list[str]] = [
        [label_text(g), shown_value(trial, g)] for g in watched.run.goals if g.label in trial.values
    ]
    if trial.rungs:
        facts.append(["trained for", duration_text(sum(r.seconds for r in trial.rungs))])
        for name, m in trial.rungs[-1].measurements.items():
            conditions = ", ".join(f"{k} {v}" for k, v in m.conditions.items() if k != "versions")
            facts.append([f"{name} was measured with", f"{m.repeats} repeats; {conditions}"])
    for name, excess in trial.constraints.items():
        state = "kept" if excess <= 0 else f"exceeded by {excess:.4g}"
        facts.append([f"constraint {name}", state])
    parts: list[Child] = [html.H2("Results")]
    if facts:
        parts.append(
            table("Objectives at the last rung, and constraints", ["what", "value"], facts)
        )
    if rows:
        columns = ["rung", "task", "steps", "score", "beside it"]
        parts.append(table("Scores per rung", columns, rows, ["rung", "steps", "score"]))
    else:
        parts.append(sentence("No rung of its training has ended, so there is no score."))
    routed = loads.load_rows(trial)
    if routed:
        parts.append(table(loads.CAPTION, loads.COLUMNS, routed, loads.NUMBERS))
    return parts


def _curves(watch: Watch, watched: Watched, trial: TrialRecord) -> list[Child]:
    curves = watch.curves(watched, trial.number)
    parts: list[Child] = [html.H2("Learning curves")]
    if not curves:
        return [*parts, sentence("This trial has no learning curves.")]
    plots = []
    for i, (proxy, rows) in enumerate(curves.items()):
        figure = curves_figure({proxy: rows}, "loss", "training loss")
        ends = [r.steps[proxy] for r in trial.rungs if proxy in r.steps]
        for rung, step in enumerate(ends):
            figure.add_vline(x=step, line={"dash": "dot", "width": 1})
            figure.add_annotation(
                x=step, y=1, yref="paper", yanchor="bottom", text=f"rung {rung}", showarrow=False
            )
        figure.update_layout(height=300, showlegend=False, margin={"t": 40})
        losses = [row for row in rows if "loss" in row]
        said = f"{proxy}: no loss was recorded."
        if losses:
            said = (
                f"{proxy}: the training loss goes from {losses[0]['loss']:.3f} at step "
                f"{losses[0]['step']:,} to {losses[-1]['loss']:.3f} at step "
                f"{losses[-1]['step']:,}; dotted lines end the rungs."
            )
        every = losses[:: max(1, len(losses) // 20)]
        numbers = table(
            f"Training loss on {proxy}",
            ["step", "loss"],
            [[f"{r['step']:,}", f"{r['loss']:.4f}"] for r in every],
            ["step", "loss"],
        )
        plots.append(plot(f"trial-curve-{i}", figure, said, numbers))
    return [*parts, html.Div(plots, className="two")]


def _lineage(watched: Watched, trial: TrialRecord) -> list[Child]:
    steps = lineage(watched, trial)
    rows: list[list[str]] = []
    for step in steps:
        t = step.trial
        parents = joined([trial_link(watched.key, n) for n in t.parents])
        start = "baseline" if t.baseline else "random start" if not t.parents else ""
        rows.append(
            [
                str(step.generation),
                trial_link(watched.key, t.number, t.baseline),
                parents or start,
                t.variation if not t.baseline else "",
                changes(step.changes),
            ]
        )
    last = steps[-1].trial
    roots = [s.trial for s in steps if not s.trial.parents]
    ends = ", ".join(t.baseline or f"trial {t.number} (random)" for t in roots)
    words = (
        f"{len(steps)} designs; it goes back to {ends}."
        if roots
        else f"The nearest {len(steps)} designs, back to trial {last.number}."
    )
    if len(steps) == 1:
        words = "It has no parents: it is a " + ("baseline." if trial.baseline else "random start.")
    return [
        html.H2("Lineage"),
        html.P(words),
        table(
            "The trial and its ancestors; changes are against the first parent",
            ["back", "trial", "parents", "variation", "what it changed"],
            rows,
            ["back"],
        ),
    ]
