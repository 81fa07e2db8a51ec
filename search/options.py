"""What commands share: argument types, and the examples that end their help."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.markup import escape

from ..primitives.base import DTYPES

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
