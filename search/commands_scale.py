"""The command that takes a design to a size: scale."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import typer

from ..genome import presets
from ..genome.files import text_of
from ..genome.header import HEADER
from ..genome.motif import WHOLE
from ..genome.notation import show as notation
from ..genome.scale import BOUND, GROWN, Scaled, scale_preset
from ..genome.scale import scale as scale_genome
from ..primitives.base import GeneError
from .describe import Counting, counting, describe, header_text, print_drawing
from .new_files import GENOMES, check_new, write_new
from .options import WHAT, AsJson, Context, Dtype, NewGenome, examples
from .source import find_genome
from .terminal import Mistake, print_json, say, say_wrapped
from .training_text import (
    DeviceName,
    Mfu,
    Ratio,
    Tokens,
    TrainingPlan,
    print_training,
    read_size,
    training_dict,
    training_plan,
)
from .units import count_text

app = typer.Typer()


@app.command(
    epilog=examples(
        "mendel scale quickstart:24 --params 1.3B --vocab 50k --out big.yaml",
        "mendel scale jamba-like --params 7B --aspect 100",
        "mendel scale '[mamba2 > swiglu]*3 > mha > swiglu' --params 350M --depth 32",
        "mendel scale deepseek-v2-lite --params 1B --active",
    )
)
def scale(
    what: Annotated[str, typer.Argument(help=WHAT)],
    params: Annotated[
        str, typer.Option(help=f"The size, such as 350M or 1.3B; met within {BOUND:.0%}.")
    ],
    active: Annotated[
        bool, typer.Option("--active", help="--params are those that a token uses.")
    ] = False,
    aspect: Annotated[
        float | None,
        typer.Option(
            help="Width over layers of two slots; without it that of published models of the size."
        ),
    ] = None,
    width: Annotated[
        int | None, typer.Option(min=1, help="Pin the width and choose the depth.")
    ] = None,
    depth: Annotated[
        int | None, typer.Option(min=1, help="Pin the number of slots and choose the width.")
    ] = None,
    repeat: Annotated[
        bool | None,
        typer.Option(
            "--repeat/--stretch",
            help="Of a genome in which no motif repeats: repeat it whole (the default up to "
            f"{WHOLE} slots), or stretch its blocks in their order.",
        ),
    ] = None,
    vocab: Annotated[
        str | None, typer.Option(help="Size of the vocabulary, such as 50k; the genome's own.")
    ] = None,
    context: Context = None,
    dtype: Dtype = None,
    tokens: Tokens = None,
    ratio: Ratio = None,
    mfu: Mfu = None,
    device: DeviceName = None,
    out: NewGenome = None,
    as_json: AsJson = False,
) -> None:
    """Take a genome to a size: repeat its motif or stretch its pattern, and set its width."""
    if out is not None:
        check_new(out, GENOMES)
    plan = training_plan(tokens, ratio, mfu, device)
    wanted = read_size("--params", params)
    alphabet = None if vocab is None else _vocab(vocab)
    source = find_genome(what)
    at = counting(source.run, context, dtype)
    if what in presets.names():
        if repeat is not None:
            raise Mistake("--repeat and --stretch are for genomes; a preset's motif is repeated")
        made = scale_preset(
            what, wanted, vocab=alphabet, active=active, aspect=aspect, width=width, depth=depth
        )
    else:
        genome = source.genome if alphabet is None else replace(source.genome, vocab=alphabet)
        made = scale_genome(
            genome,
            wanted,
            active=active,
            aspect=aspect,
            width=width,
            depth=depth,
            repeat=repeat,
        )
    if out is not None:
        write_new({out: text_of(made.genome, out)})
    if as_json:
        print_json(_described(made, wanted, active, at, plan))
        return
    say(f"{source.name} · {header_text(made.genome)}", "bold")
    say_wrapped(notation(made.genome), "dim")
    say_wrapped(_reached(made, params, active))
    for line in made.done:
        say_wrapped(f"  {line}")
    print_drawing(made.genome, at)
    print_training(made.genome, at.context, plan)
    if out is not None:
        say_wrapped(f"Written to {out}.")


def _vocab(text: str) -> int:
    value = read_size("--vocab", text)
    if not value.is_integer():
        raise Mistake(f"--vocab is a whole number, not {text!r}")
    axis = next(axis for axis in HEADER if axis.name == "vocab")
    try:
        axis.check(int(value))
    except GeneError as error:
        raise Mistake(f"--vocab: {error}") from None
    return int(value)


def _reached(made: Scaled, asked: str, active: bool) -> str:
    """The parameters that were reached, beside those that were asked for."""
    share = abs(made.deviation)
    side = "above" if made.deviation > 0 else "below"
    off = f"{share:.1%} {side}" if share >= 0.0005 else "as"
    reached = f"{count_text(made.params)} parameters"
    if made.active_params != made.params:
        reached += f", {count_text(made.active_params)} of them active"
    what = f"the {asked} active" if active else f"the {asked}"
    line = f"{reached}: {off} {what} that were asked for. Width over layers {made.aspect:.0f}"
    if made.active_params >= GROWN:
        line += f"; published models of the size have {made.usual_aspect:.0f}"
    return f"{line}."


def _described(
    made: Scaled, wanted: float, active: bool, at: Counting, plan: TrainingPlan
) -> dict[str, object]:
    return {
        **describe(made.genome, at),
        "asked": wanted,
        "asked_active": active,
        "deviation": made.deviation,
        "aspect": made.aspect,
        "usual_aspect": made.usual_aspect,
        "done": list(made.done),
        "training": training_dict(made.genome, at.context, plan),
    }
