"""What commands share: argument types, and the examples that end their help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from ..genome.cost import DEFAULT_CONTEXT
from ..primitives.base import DTYPES
from .terminal import Mistake

DEFAULT_DTYPE = "bf16"


def _known(dtype: str | None) -> str | None:
    """Raises Mistake for a name that is no dtype."""
    if dtype is not None and dtype not in DTYPES:
        raise Mistake(f"--dtype is one of {', '.join(DTYPES)}, not {dtype!r}")
    return dtype


WHAT = "A notation, a genome file (.yaml, .json), a preset, RUN:TRIAL, or a folder of mendel train."
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Context = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Tokens of the sequence that costs are counted for; "
        f"{DEFAULT_CONTEXT}, or for RUN:TRIAL what its study counts.",
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        callback=_known,
        help=f"Type of the cached numbers: {', '.join(DTYPES)}; "
        f"{DEFAULT_DTYPE}, or for RUN:TRIAL what its study counts.",
    ),
]
Width = Annotated[int | None, typer.Option(min=1, help="Width of a preset or a notation.")]
NewGenome = Annotated[
    Path | None, typer.Option(help="Write the genome to this new .yaml or .json file.")
]
Depth = Annotated[int | None, typer.Option(min=1, help="Slots of a preset.")]


def examples(*lines: str) -> str:
    """The end of a command's help; each line stands alone and brackets stay as they are."""
    return "\n\n".join([escape(f"Example: {lines[0]}"), *(escape(line) for line in lines[1:])])
