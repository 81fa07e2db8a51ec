"""Commands that look at designs: show and compare."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from ..genome import presets, published
from ..genome.cost import DEFAULT_CONTEXT, ModelCost, cost
from ..genome.files import from_dict, to_dict
from ..genome.genome import Genome
from ..genome.hash import canonical_hash
from ..genome.notation import show as notation
from ..genome.residual import norms_of
from ..primitives.base import DTYPES, Cost
from .draw import drawing
from .front import shown_value
from .objectives import CacheSettings
from .options import DEFAULT_DTYPE, WHAT, AsJson, Context, Depth, Dtype, Width, examples
from .outline import outline
from .picture import picture
from .run import RunView
from .source import Source, find_genome
from .store import write_text
from .terminal import (
    Mistake,
    console,
    plain,
    print_hanging,
    print_json,
    print_table,
    say_wrapped,
    unicode_works,
)
from .units import bytes_text, count_text

app = typer.Typer()


@dataclass(frozen=True)
class Counting:
    """At what context and in what type costs are counted, and who says so."""

    context: int
    dtype: str
    reason: str = ""


def _check_dtype(name: str | None) -> None:
    if name is not None and name not in DTYPES:
        raise Mistake(f"--dtype is one of {', '.join(DTYPES)}, not {name!r}")


def _counting(run: RunView | None, context: int | None, dtype: str | None) -> Counting:
    """As the options say; where there are none, as the objective of the run's study counts."""
    if run is not None and context is None and dtype is None:
        for goal in run.goals:
            if isinstance(goal.settings, CacheSettings):
                reason = f", as {run.study.name} counts {goal.label}"
                return Counting(goal.settings.context, goal.settings.dtype, reason)
    return Counting(context or DEFAULT_CONTEXT, dtype or DEFAULT_DTYPE)


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


def _stream(genome: Genome) -> str:
    """Norm, placement and residual form, as far as they have an effect and are not the default."""
    norm, placement = norms_of(genome)
    words = "no norm" if norm == "none" else f"{norm} ({placement})"
    if genome.residual == "ngpt":
        return "residual ngpt"
    return words if genome.residual == "plain" else f"{words} · residual {genome.residual}"


def _facts(genome: Genome) -> str:
    parts = [
        f"width {genome.width}",
        f"{len(genome.slots)} slots",
        f"position {genome.position}",
        _stream(genome),
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
    context: Context = None,
    dtype: Dtype = None,
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
    _check_dtype(dtype)
    found = find_genome(what, width, depth)
    at = _counting(found.run, context, dtype)
    counted = cost(found.genome, at.context, DTYPES[at.dtype])
    content = outline(found.genome, counted)
    if svg is not None:
        write_text(svg, picture(content, notation(found.genome)))
    if as_json:
        print_json(describe(found.genome, counted, at.context, at.dtype))
        return
    screen = console()
    screen.print(Text(plain(f"{found.name} · {_facts(found.genome)}"), style="bold"))
    screen.print(Text(plain(notation(found.genome))), style="dim")
    if found.trial is not None:
        screen.print(Text(plain(_trial_line(found))))
    if what in published.names():
        screen.print(Text(plain(_exact_line(counted.total))))
    screen.print()
    for line in drawing(content, screen.width, unicode_works()):
        screen.print(line, soft_wrap=True)
    screen.print(
        Text(
            plain(
                f"Cache of one sequence of {at.context:,} tokens in {at.dtype}{at.reason}; FLOPs "
                "per token are the mean over its positions. Numbers are of one slot, each time it "
                "stands."
            ),
            style="dim",
        )
    )


def _exact_line(total: Cost) -> str:
    """What is compared with a published model's own figures, to the last digit."""
    words = [
        f"{total.params:,} parameters",
        f"{total.active_params:,} active",
        f"cache {total.state_bytes:,} bytes",
    ]
    return " · ".join(words)


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
    context: Context = None,
    dtype: Dtype = None,
    width: Width = None,
    depth: Depth = None,
    as_json: AsJson = False,
) -> None:
    """Put two to four genomes side by side: costs, operators, and scores where they are trials.

    Beside a RUN:TRIAL, a preset is that run's baseline of this name, or has its size.
    """
    if not 2 <= len(what) <= 4:
        raise Mistake(f"compare takes two to four genomes, not {len(what)}")
    _check_dtype(dtype)
    sources, notes = _sources(what, width, depth)
    at = _counting(next((s.run for s in sources if s.run), None), context, dtype)
    counted = [cost(s.genome, at.context, DTYPES[at.dtype]) for s in sources]
    described = [
        describe(s.genome, c, at.context, at.dtype) for s, c in zip(sources, counted, strict=True)
    ]
    if as_json:
        print_json(
            [
                {
                    "name": s.name,
                    "source": s.text,
                    "note": note,
                    **d,
                    "scores": _scores(s),
                    "values": _values(s),
                }
                for s, note, d in zip(sources, notes, described, strict=True)
            ]
        )
        return
    rows = [
        ["width", *(str(s.genome.width) for s in sources)],
        ["slots", *(str(len(s.genome.slots)) for s in sources)],
        ["position, norm", *(f"{s.genome.position}, {_stream(s.genome)}" for s in sources)],
        ["parameters", *(count_text(d["params"]) for d in described)],
        ["active", *(count_text(d["active_params"]) for d in described)],
        ["FLOPs per token", *(count_text(d["flops_per_token"]) for d in described)],
        [f"cache at {at.context:,}", *(bytes_text(d["cache_bytes"]) for d in described)],
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
    print_hanging([(s.name, notation(s.genome)) for s in sources])
    say_wrapped(f"Costs of one sequence of {at.context:,} tokens in {at.dtype}{at.reason}.", "dim")
    for note in notes:
        if note is not None:
            say_wrapped(note, "dim")


def _sources(
    what: list[str], width: int | None, depth: int | None
) -> tuple[list[Source], list[str | None]]:
    """The genomes, and for a preset that was sized to the first trial what was done.

    Width and depth go to the presets among the genomes and leave the others alone.
    """
    found = {text: find_genome(text) for text in what if text not in presets.names()}
    trial = next((found[t] for t in what if t in found and found[t].run is not None), None)
    pairs = [
        (found[text], None) if text in found else _preset(text, trial, width, depth)
        for text in what
    ]
    return [source for source, _ in pairs], [note for _, note in pairs]


def _preset(
    name: str, beside: Source | None, width: int | None, depth: int | None
) -> tuple[Source, str | None]:
    """A preset to compare with a trial: the run's own baseline, or in the size of its baselines."""
    if beside is None or beside.run is None or (width is not None and depth is not None):
        return find_genome(name, width, depth), None
    run = beside.run
    if width is None and depth is None:
        for trial in run.trials:
            if trial.baseline == name:
                own = Source(name, name, from_dict(trial.genome), run, trial)
                return own, f"{name} is the baseline of {run.study.name}, trial {trial.number}."
    width = beside.genome.width if width is None else width
    depth = run.study.space.depth[1] if depth is None else depth
    note = f"{name} stands at width {width} with {depth} slots, to match {beside.name}; untrained."
    return find_genome(name, width, depth), note


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
