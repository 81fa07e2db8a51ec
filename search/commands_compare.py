"""The command that puts designs side by side: compare."""

from __future__ import annotations

from typing import Annotated

import typer

from ..genome import presets
from ..genome.genome import Genome
from ..genome.notation import show as notation
from .describe import counting, describe, stream_text
from .options import WHAT, AsJson, Context, Depth, Dtype, Width, examples
from .source import Source, find_genome, genome_of
from .terminal import Mistake, print_hanging, print_json, print_table, say_wrapped
from .units import bytes_text, count_text

app = typer.Typer()


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
    sources, notes = _sources(what, width, depth)
    at = counting(next((s.run for s in sources if s.run), None), context, dtype)
    described = [describe(s.genome, at) for s in sources]
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
        ["position, norm", *(f"{s.genome.position}, {stream_text(s.genome)}" for s in sources)],
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
                genome = genome_of(trial, f"{run.study.name}:{trial.number}")
                own = Source(name, name, genome, run, trial)
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
    return "\n".join(f"{n} {name}" for name, n in counts.items())
