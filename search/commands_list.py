"""Commands that list what there is: primitives, tasks, presets."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from ..genome import presets, published
from ..genome.cost import DEFAULT_CONTEXT, cost
from ..genome.notation import show as notation
from ..primitives.base import DTYPES, Axis, Gene, Point, Primitive, show_gene
from ..primitives.catalogue import CATALOGUE, find
from ..primitives.nearest import unknown
from ..proxies.tasks import TASKS, find_task
from .options import DEFAULT_DTYPE, AsJson, Context, examples
from .terminal import Mistake, print_hanging, print_json, print_table, say, say_wrapped
from .units import bytes_text, count_text

app = typer.Typer()


@app.command(
    epilog=examples("mendel primitives", "mendel primitives mamba2", "mendel primitives --json")
)
def primitives(
    name: Annotated[str | None, typer.Argument(help="A primitive or a named point.")] = None,
    as_json: AsJson = False,
) -> None:
    """List the operators that a genome can use, or everything about one of them."""
    if name is None:
        if as_json:
            print_json([_primitive_dict(p) for p in CATALOGUE])
            return
        longest = max(len(point.name) for p in CATALOGUE for point in p.points)
        rows = [
            [p.name, p.kind, p.summary, ", ".join(point.name for point in p.points)]
            for p in CATALOGUE
        ]
        print_table(
            ["primitive", "kind", "what it is", "named points"],
            rows,
            fold=["what it is", "named points"],
            narrow={"named points": 1 + longest},
        )
        return
    primitive, point = find(name)
    if as_json:
        print_json(_primitive_dict(primitive))
        return
    say_wrapped(f"{primitive.name} ({primitive.kind}): {primitive.summary}", "bold")
    say_wrapped(f"Source: {primitive.source}", "dim")
    chosen = primitive.defaults()
    if point is not None:
        genes = _genes_text(primitive, point) or "all defaults"
        say_wrapped(f"{point.name}: {genes}. {point.doc}".strip())
        say_wrapped(f"Source: {point.source}", "dim")
        chosen |= dict(point.genes)
    if point is not None and point.view is not None:
        say()
        say("As a state that is updated", "bold")
        print_hanging(list(vars(point.view).items()))
    say()
    say("As a linear input-varying system (STAR)", "bold")
    print_hanging([(k.replace("_", " "), v) for k, v in vars(primitive.liv).items()])
    say()
    say("Axes, with the value here", "bold")
    print_hanging([(axis.name, _axis_text(axis, chosen[axis.name])) for axis in primitive.axes])
    if primitive.points and point is None:
        say()
        say("Named points, with what differs from the axes' values above", "bold")
        print_hanging(
            [
                (p.name, f"{_genes_text(primitive, p) or 'nothing'}\n{p.source}")
                for p in primitive.points
            ]
        )


def _axis_text(axis: Axis, value: Gene) -> str:
    searched = ", ".join(show_gene(v) for v in axis.search)
    # Where every option is searched, once is enough.
    more = f"; searched {searched}" if searched and set(axis.search) != set(axis.options) else ""
    return f"{show_gene(value)}  ({axis.allowed()}{more})\n{axis.doc}"


def _genes_text(primitive: Primitive, point: Point) -> str:
    """The genes in which a point differs from the primitive's defaults."""
    defaults = primitive.defaults()
    return ", ".join(
        f"{k}={show_gene(v)}"
        for k, v in point.genes.items()
        if show_gene(defaults[k]) != show_gene(v)
    )


def _primitive_dict(primitive: Primitive) -> dict[str, Any]:
    return {
        "name": primitive.name,
        "kind": primitive.kind,
        "summary": primitive.summary,
        "source": primitive.source,
        "lends": primitive.lends,
        "liv": vars(primitive.liv),
        "axes": [_axis_dict(axis) for axis in primitive.axes],
        "points": [
            {
                "name": p.name,
                "genes": dict(p.genes),
                "source": p.source,
                "doc": p.doc,
                "view": None if p.view is None else vars(p.view),
            }
            for p in primitive.points
        ],
    }


def _axis_dict(axis: Axis) -> dict[str, Any]:
    return {
        "name": axis.name,
        "default": axis.default,
        "doc": axis.doc,
        "allowed": axis.allowed(),
        "options": list(axis.options),
        "low": axis.low,
        "high": axis.high,
        "search": list(axis.search),
    }


@app.command(
    epilog=examples("mendel tasks", "mendel tasks in-context-recall", "mendel tasks --json")
)
def tasks(
    name: Annotated[str | None, typer.Argument(help="A task.")] = None, as_json: AsJson = False
) -> None:
    """List the proxy tasks that judge a candidate, or the settings of one."""
    rows = list(TASKS.values()) if name is None else [find_task(name)]
    if as_json:
        found = [
            {
                "name": row.name,
                "summary": row.summary,
                "score": row.score,
                "source": row.source,
                "settings": {
                    key: {"default": field.default, "doc": field.description or ""}
                    for key, field in row.settings.model_fields.items()
                },
            }
            for row in rows
        ]
        print_json(found if name is None else found[0])
        return
    if name is None:
        print_table(
            ["task", "what it asks", "score (0..1)", "source"],
            [[r.name, r.summary, r.score, r.source] for r in rows],
            fold=["what it asks", "score (0..1)", "source"],
        )
        return
    row = rows[0]
    say_wrapped(f"{row.name}: {row.summary}", "bold")
    say_wrapped(f"Score: {row.score}. Source: {row.source}", "dim")
    say()
    print_table(
        ["setting", "default", "what it does"],
        [
            [key, json.dumps(field.default, default=str), field.description or ""]
            for key, field in row.settings.model_fields.items()
        ],
        fold=["default", "what it does"],
    )


@app.command(
    name="presets",
    epilog=examples(
        "mendel presets",
        "mendel presets jamba-like",
        "mendel presets jamba-v0.1",
        "mendel presets --context 262144 --json",
    ),
)
def list_presets(
    name: Annotated[str | None, typer.Argument(help="A preset.")] = None,
    context: Context = None,
    as_json: AsJson = False,
) -> None:
    """List the published designs, which baselines name at any size, and compare the published
    models, which have their own; or explain one."""
    at = context or DEFAULT_CONTEXT
    if name is not None and name not in (known := [*presets.names(), *published.names()]):
        sentence = f"no preset and no published model is named {name!r}"
        raise Mistake(unknown(sentence, name, known, "`mendel presets` lists them"))
    if name is not None and name not in presets.names():
        model = published.describe(name)
        if as_json:
            print_json(_published_dict(model, at))
        else:
            _print_published(model, at)
        return
    if name is not None:
        preset = presets.describe(name)
        if as_json:
            print_json(_preset_dict(preset))
        else:
            _print_preset(preset)
        return
    rows = [presets.describe(each) for each in presets.names()]
    if as_json:
        models = [_published_dict(published.describe(each), at) for each in published.names()]
        print_json([_preset_dict(preset) for preset in rows] + models)
        return
    print_hanging([(p.name, f"{_flat(p.summary)}\n{p.motif}\n{_flat(p.source)}") for p in rows])
    say()
    say("Published models at their size", "bold")
    _print_models([published.describe(each) for each in published.names()], at)


def _print_models(models: list[published.Published], context: int) -> None:
    found = [_published_dict(model, context) for model in models]
    numbers = ["params", "active", "cache", "FLOPs/token", "attention"]
    print_table(
        ["model", *numbers],
        [
            [
                d["name"],
                count_text(d["params"]),
                count_text(d["active_params"]),
                bytes_text(d["cache_bytes"]),
                count_text(d["flops_per_token"]),
                f"{d['attention']} of {d['mixers']}",
            ]
            for d in found
        ],
        right=numbers,
    )
    say_wrapped(
        "Parameters and active ones (those that a token uses) count embedding and head; published "
        "figures of active ones often leave the embedding out: --json has it apart. "
        f"Cache of one sequence of {context:,} tokens in {DEFAULT_DTYPE}; FLOPs are those of "
        "decoding, the mean over its positions; attention: how many of the mixers it is.",
        "dim",
    )


def _print_published(model: published.Published, context: int) -> None:
    say_wrapped(f"{model.name}: {_flat(model.summary)}", "bold")
    say_wrapped(f"Source: {_flat(model.source)}", "dim")
    say()
    counted = _published_dict(model, context)
    lines = [
        ("genome", notation(model.genome())),
        (
            "parameters",
            f"{counted['params']:,}, of which a token uses {counted['active_params']:,}",
        ),
        ("embedding", f"{counted['embedding_params']:,}, counted in both"),
        ("cache", f"{counted['cache_bytes']:,} bytes"),
    ]
    if model.differs:
        lines.append(("without", _flat(model.differs)))
    print_hanging(lines)
    _print_models([model], context)


def _published_dict(model: published.Published, context: int) -> dict[str, Any]:
    """As JSON; `params` and `active_params` count the embedding's table, `embedding_params`."""
    genome = model.genome()
    total = cost(genome, context, DTYPES[DEFAULT_DTYPE]).total
    attention, mixers = published.attention_count(genome)
    return {
        "name": model.name,
        "summary": model.summary,
        "source": model.source,
        "differs": model.differs,
        "genome": notation(genome),
        "params": total.params,
        "active_params": total.active_params,
        "embedding_params": genome.vocab * genome.width,
        "cache_bytes": total.state_bytes,
        "flops_per_token": total.flops_per_token,
        "attention": attention,
        "mixers": mixers,
        "context": context,
        "dtype": DEFAULT_DTYPE,
    }


def _print_preset(preset: presets.Preset) -> None:
    say_wrapped(f"{preset.name}: {_flat(preset.summary)}", "bold")
    say_wrapped(f"Source: {_flat(preset.source)}", "dim")
    say()
    genes = ", ".join(f"{k} {show_gene(v)}" for k, v in preset.header.items() if k != "width")
    lines = [
        ("motif", preset.motif),
        ("size", f"{preset.depth} slots of width {preset.header['width']}, where none is given"),
        ("header", genes),
        ("genome", notation(presets.load(preset.name))),
    ]
    if preset.small is not None:
        small = f"{_flat(preset.small['motif'])}\nat widths below {preset.small['below']}"
        lines.insert(1, ("small motif", small))
    print_hanging(lines)


def _preset_dict(preset: presets.Preset) -> dict[str, Any]:
    return {
        "name": preset.name,
        "summary": preset.summary,
        "source": preset.source,
        "motif": preset.motif,
        "small": preset.small,
        "depth": preset.depth,
        "header": preset.header,
        "genome": notation(presets.load(preset.name)),
    }


def _flat(text: str) -> str:
    return " ".join(text.split())
