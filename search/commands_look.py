"""The command that looks at a design: show."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from ..genome import published
from ..genome.notation import show as notation
from .describe import counting, describe, exact_text, header_text, print_drawing
from .front import shown_value
from .options import WHAT, AsJson, Context, Depth, Dtype, Width, examples
from .outline import outline
from .picture import picture
from .source import Source, find_genome
from .store import write_text
from .terminal import Mistake, console, plain, print_json
from .training_text import (
    DeviceName,
    Mfu,
    Ratio,
    Tokens,
    print_training,
    training_dict,
    training_plan,
)

app = typer.Typer()


@app.command(
    epilog=examples(
        "mendel show transformer++ --width 256 --depth 12",
        "mendel show '[mamba2 > swiglu]*3 > [gqa(kv_heads=2) | mamba2] > moe(experts=8, top_k=2)'",
        "mendel show runs/quickstart:12 --context 65536 --json",
        "mendel show striped --svg striped.svg",
        "mendel show llama-3.1-8b --tokens 15T --device H100 --context 8192",
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
    tokens: Tokens = None,
    ratio: Ratio = None,
    mfu: Mfu = None,
    device: DeviceName = None,
    as_json: AsJson = False,
) -> None:
    """Draw a genome in the terminal, with its costs per slot and whole, and what training costs."""
    if svg is not None and (svg.suffix != ".svg" or not svg.absolute().parent.is_dir()):
        raise Mistake(f"--svg names a file that ends in .svg, in a folder that exists, not {svg}")
    plan = training_plan(tokens, ratio, mfu, device)
    found = find_genome(what, width, depth)
    at = counting(found.run, context, dtype)
    genome = found.genome
    if svg is not None:
        write_text(svg, picture(outline(genome, at.cost(genome)), notation(genome)))
    if as_json:
        training = training_dict(genome, at.context, plan)
        print_json({**describe(genome, at), "training": training})
        return
    screen = console()
    screen.print(Text(plain(f"{found.name} · {header_text(genome)}"), style="bold"))
    screen.print(Text(plain(notation(genome))), style="dim")
    if found.trial is not None:
        screen.print(Text(plain(_trial_line(found))))
    if what in published.names():
        screen.print(Text(plain(exact_text(genome, at.cost(genome).total))))
    print_drawing(genome, at)
    print_training(genome, at.context, plan)


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
