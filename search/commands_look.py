"""Commands that look at designs: show and compare."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from ..genome import presets
from ..genome.cost import DEFAULT_CONTEXT, ModelCost, cost
from ..genome.files import to_dict
from ..genome.genome import Genome
from ..genome.hash import canonical_hash
from ..genome.notation import show as notation
from ..primitives.base import DTYPES, Cost
from .draw import drawing
from .front import shown_value
from .options import WHAT, AsJson, Context, Depth, Dtype, Width, examples
from .outline import outline
from .picture import picture
from .source import Source, find_genome
from .store import write_text
from .terminal import (
    Mistake,
    console,
    plain,
    print_json,
    print_table,
    say,
    unicode_works,
)
from .units import bytes_text, count_text

app = typer.Typer()


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
