"""Commands that look at designs: show, compare, primitives, tasks, presets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.text import Text

from ..genome import presets
from ..genome.cost import DEFAULT_CONTEXT, ModelCost, cost
from ..genome.files import to_dict
from ..genome.genome import Genome
from ..genome.hash import canonical_hash
from ..genome.notation import show as notation
from ..primitives.base import DTYPES, Axis, Cost, Primitive, show_gene
from ..primitives.catalogue import CATALOGUE, find
from ..proxies.tasks import TASKS, find_task
from .draw import drawing
from .front import shown_value
from .outline import outline
from .picture import picture
from .source import Source, find_genome
from .store import write_text
from .terminal import Mistake, console, plain, print_json, print_table, say, unicode_works
from .units import bytes_text, count_text

app = typer.Typer()

WHAT = "A notation, a genome file (.yaml, .json), a preset, or RUN:TRIAL."
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Context = Annotated[
    int, typer.Option(min=1, help="Tokens of the sequence that costs are counted for.")
]
Dtype = Annotated[str, typer.Option(help="Type of the cached numbers: " + ", ".join(DTYPES) + ".")]
Width = Annotated[int | None, typer.Option(min=1, help="Width of a preset or a notation.")]
Depth = Annotated[int | None, typer.Option(min=1, help="Slots of a preset.")]


def examples(*lines: str) -> str:
    """The end of a command's help; each line stands alone and brackets stay as they are."""
    return "\n\n".join([escape(f"Example: {lines[0]}"), *(escape(line) for line in lines[1:])])


def _dtype(name: str) -> str:
    if name not in DTYPES:
        raise Mistake(f"--dtype is one of {', '.join(DTYPES)}, not {name!r}")
    return name


def _costs(costs: Cost) -> dict[str, Any]:
    return {
        "params": costs.params,
        "active_params": costs.active_params,
        "flops_per_token": costs.flops_per_token,
        "cache_bytes": costs.state_bytes,
    }


def describe(genome: Genome, counted: ModelCost, context: int, dtype: str) -> dict[str, Any]:
    """What `show --json` prints; its keys are fixed."""
    written = to_dict(genome)
    return {
        "genome": written,
        "notation": notation(genome),
        "hash": canonical_hash(genome),
        **_costs(counted.total),
        "context": context,
        "dtype": dtype,
        "slots": [
            {"slot": i, **slot, **_costs(part)}
            for i, (slot, part) in enumerate(zip(written["slots"], counted.slots, strict=True))
        ],
    }


def _facts(genome: Genome) -> str:
    parts = [
        f"width {genome.width}",
        f"{len(genome.slots)} slots",
        f"position {genome.position}",
        f"{genome.norm} ({genome.placement})",
        "tied" if genome.tied else "untied",
    ]
    return " · ".join(parts)


@app.command(
    epilog=examples(
        "mendel show transformer++ --width 256 --depth 12",
        "mendel show '[mamba2 > swiglu]*3 > [gqa(kv_heads=2) | mamba2] > moe(experts=8, top_k=2)'",
        "mendel show runs/quickstart:12 --context 65536 --json",
        "mendel show striped --svg striped.svg",
    )
)
def show(
    what: Annotated[str, typer.Argument(help=WHAT)],
    context: Context = DEFAULT_CONTEXT,
    dtype: Dtype = "bf16",
    width: Width = None,
    depth: Depth = None,
    svg: Annotated[
        Path | None, typer.Option(help="Write the drawing to this .svg file too.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Draw a genome in the terminal, with its costs per slot and whole."""
    if svg is not None and (svg.suffix != ".svg" or not svg.absolute().parent.is_dir()):
        raise Mistake(f"--svg names a file that ends in .svg, in a folder that exists, not {svg}")
    kind = _dtype(dtype)
    found = find_genome(what, width, depth)
    counted = cost(found.genome, context, DTYPES[kind])
    content = outline(found.genome, counted)
    if svg is not None:
        write_text(svg, picture(content, notation(found.genome)))
    if as_json:
        print_json(describe(found.genome, counted, context, kind))
        return
    screen = console()
    screen.print(Text(plain(f"{found.name} · {_facts(found.genome)}"), style="bold"))
    screen.print(Text(plain(notation(found.genome))), style="dim")
    if found.trial is not None:
        screen.print(Text(plain(_trial_line(found))))
    screen.print()
    for line in drawing(content, screen.width, unicode_works()):
        screen.print(line, soft_wrap=True)
    screen.print(
        Text(
            plain(
                f"Cache of one sequence of {context:,} tokens in {kind}; numbers are of one slot, "
                "each time it stands."
            ),
            style="dim",
        )
    )


def _trial_line(source: Source) -> str:
    """What became of a trial, in one line."""
    assert source.trial is not None
    assert source.run is not None
    values = [
        f"{goal.label} {shown_value(source.trial, goal)}"
        for goal in source.run.goals
        if goal.label in source.trial.values
    ]
    return " · ".join([f"trial {source.trial.number}, {source.trial.state}", *values])


@app.command(
    epilog=examples(
        "mendel compare transformer++ mamba2 striped",
        "mendel compare runs/quickstart:12 transformer++ --context 65536",
    )
)
def compare(
    what: Annotated[list[str], typer.Argument(help="Two to four of: " + WHAT)],
    context: Context = DEFAULT_CONTEXT,
    dtype: Dtype = "bf16",
    width: Width = None,
    depth: Depth = None,
    as_json: AsJson = False,
) -> None:
    """Put two to four genomes side by side: costs, operators, and scores where they are trials."""
    if not 2 <= len(what) <= 4:
        raise Mistake(f"compare takes two to four genomes, not {len(what)}")
    kind = _dtype(dtype)
    sources = [_scaled(text, width, depth) for text in what]
    counted = [cost(s.genome, context, DTYPES[kind]) for s in sources]
    described = [
        describe(s.genome, c, context, kind) for s, c in zip(sources, counted, strict=True)
    ]
    if as_json:
        print_json(
            [
                {"name": s.name, "source": s.text, **d, "scores": _scores(s), "values": _values(s)}
                for s, d in zip(sources, described, strict=True)
            ]
        )
        return
    rows = [
        ["width", *(str(s.genome.width) for s in sources)],
        ["slots", *(str(len(s.genome.slots)) for s in sources)],
        ["position, norm", *(f"{s.genome.position}, {s.genome.norm}" for s in sources)],
        ["parameters", *(count_text(d["params"]) for d in described)],
        ["active", *(count_text(d["active_params"]) for d in described)],
        ["FLOPs per token", *(count_text(d["flops_per_token"]) for d in described)],
        [f"cache at {context:,}", *(bytes_text(d["cache_bytes"]) for d in described)],
        ["operators", *(_operators(s.genome) for s in sources)],
    ]
    rows += [
        [f"score, {proxy}", *(_score(s, proxy) for s in sources)]
        for proxy in sorted({p for s in sources for p in _scores(s)})
    ]
    rows.append(["hash", *(d["hash"][:12] for d in described)])
    names = [s.name if s.trial is None or s.trial.baseline is None else s.text for s in sources]
    columns = ["", *_distinct(names)]
    print_table(columns, rows, fold=columns[1:])
    for source in sources:
        say(f"{source.name}: {notation(source.genome)}", "dim")


def _scaled(text: str, width: int | None, depth: int | None) -> Source:
    """Width and depth go to the presets among the genomes and leave the others alone."""
    if text in presets.names():
        return find_genome(text, width, depth)
    return find_genome(text)


def _distinct(names: list[str]) -> list[str]:
    return [f"{n} ({names[:i].count(n) + 1})" if n in names[:i] else n for i, n in enumerate(names)]


def _scores(source: Source) -> dict[str, dict[str, float]]:
    rungs = source.trial.rungs if source.trial is not None else []
    return rungs[-1].scores if rungs else {}


def _values(source: Source) -> dict[str, float]:
    return source.trial.values if source.trial is not None else {}


def _score(source: Source, proxy: str) -> str:
    scores = _scores(source)
    return f"{scores[proxy]['score']:.3f}" if proxy in scores else "-"


def _operators(genome: Genome) -> str:
    counts: dict[str, int] = {}
    for _, _, op in genome.ops():
        counts[op.name] = counts.get(op.name, 0) + 1
    return ", ".join(f"{n} {name}" for name, n in counts.items())


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
        rows = [
            [p.name, p.kind, p.summary, ", ".join(point.name for point in p.points)]
            for p in CATALOGUE
        ]
        print_table(
            ["primitive", "kind", "what it is", "named points"],
            rows,
            fold=["what it is", "named points"],
        )
        return
    primitive, point = find(name)
    if as_json:
        print_json(_primitive_dict(primitive))
        return
    say(f"{primitive.name} ({primitive.kind}): {primitive.summary}", "bold")
    say(f"Source: {primitive.source}", "dim")
    if point is not None:
        genes = ", ".join(f"{k}={show_gene(v)}" for k, v in point.genes.items()) or "all defaults"
        say(f"{point.name} is the point with {genes}. {point.doc} Source: {point.source}")
    say()
    chosen = {**primitive.defaults(), **(point.genes if point else {})}
    print_table(
        ["axis", name, "allowed", "searched", "what it does"],
        [
            [
                axis.name,
                show_gene(chosen[axis.name]),
                axis.allowed(),
                ", ".join(show_gene(v) for v in axis.search),
                axis.doc,
            ]
            for axis in primitive.axes
        ],
        fold=["allowed", "searched", "what it does"],
    )
    if primitive.points:
        print_table(
            ["point", "genes", "source"],
            [
                [
                    p.name,
                    ", ".join(f"{k}={show_gene(v)}" for k, v in p.genes.items()),
                    p.source,
                ]
                for p in primitive.points
            ],
            fold=["genes", "source"],
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
            {"name": p.name, "genes": dict(p.genes), "source": p.source, "doc": p.doc}
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
    say(f"{row.name}: {row.summary}", "bold")
    say(f"Score: {row.score}. Source: {row.source}", "dim")
    say()
    print_table(
        ["setting", "default", "what it does"],
        [
            [key, json.dumps(field.default, default=str), field.description or ""]
            for key, field in row.settings.model_fields.items()
        ],
        fold=["default", "what it does"],
    )


@app.command(name="presets", epilog=examples("mendel presets", "mendel presets --json"))
def list_presets(as_json: AsJson = False) -> None:
    """List the published designs that ship with mendel; they are the baselines of searches."""
    rows = [presets.describe(name) for name in presets.names()]
    if as_json:
        print_json(
            [
                {
                    "name": p.name,
                    "summary": p.summary,
                    "source": p.source,
                    "motif": p.motif,
                    "depth": p.depth,
                    "header": p.header,
                }
                for p in rows
            ]
        )
        return
    print_table(
        ["preset", "what it is", "motif", "source"],
        [[p.name, p.summary.strip(), p.motif, p.source.strip()] for p in rows],
        fold=["what it is", "motif", "source"],
    )
