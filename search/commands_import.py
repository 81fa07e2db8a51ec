"""The command that reads another library's configuration: import."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.text import Text

from ..genome import imported
from ..genome.cost import cost
from ..genome.files import to_dict
from ..genome.imported import Imported
from ..genome.notation import show as notation
from ..primitives.base import DTYPES
from .describe import check_dtype, counting, describe, exact_text, header_text
from .options import AsJson, Context, Dtype, examples
from .store import write_text
from .terminal import Mistake, console, plain, print_hanging, print_json, say, say_wrapped

app = typer.Typer()

SUFFIXES = (".yaml", ".yml", ".json")


@app.command(
    name="import",
    epilog=examples(
        "mendel import models/llama-3.1-8b",
        "mendel import config.json --out mine.yaml",
        "mendel import config.json --context 262144 --json",
    ),
)
def import_(
    model: Annotated[
        Path, typer.Argument(help="A config.json of transformers, or the folder that has one.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="Write the genome to this .yaml or .json file.")
    ] = None,
    context: Context = None,
    dtype: Dtype = None,
    as_json: AsJson = False,
) -> None:
    """Read the configuration of a model that you have as a genome; its weights stay where they are.

    Says what of the model the genome does not have. What has parameters or is cached is never left
    out in silence: a configuration with such a part is refused.
    """
    check_dtype(dtype)
    found = imported.load(model)
    if out is not None:
        check_new(out, SUFFIXES)
    at = counting(None, context, dtype)
    counted = cost(found.genome, at.context, DTYPES[at.dtype])
    if out is not None:
        write_text(out, _file(model, out, found))
    if as_json:
        described = describe(found.genome, counted, at.context, at.dtype)
        more = {"family": found.family, "differs": found.differs, "unread": found.unread}
        print_json({**more, **described})
        return
    screen = console()
    screen.print(Text(plain(f"{found.family} · {header_text(found.genome)}"), style="bold"))
    screen.print(Text(plain(notation(found.genome))), style="dim")
    screen.print(Text(plain(exact_text(counted.total))))
    say_wrapped(f"Cache of one sequence of {at.context:,} tokens in {at.dtype}.", "dim")
    lines = [("differs", sentence) for sentence in found.differs]
    if found.unread:
        lines.append(("not read", ", ".join(found.unread)))
    if lines:
        print_hanging(lines)
    if out is None:
        say_wrapped("--out FILE.yaml keeps the genome, for mendel show, compare and scale.", "dim")
    else:
        say(f"Wrote {out}. Look at it: mendel show {out}")


def check_new(path: Path, suffixes: tuple[str, ...]) -> None:
    """Raises Mistake unless a file of one of these kinds can be made there."""
    if path.suffix not in suffixes:
        raise Mistake(f"{path}: the file's name ends in {', '.join(suffixes)}")
    if path.exists():
        raise Mistake(f"{path} exists already; choose another name")
    if not path.absolute().parent.is_dir():
        raise Mistake(f"{path.parent} is no folder")


def _file(model: Path, out: Path, found: Imported) -> str:
    """The genome's file: in YAML with what it is and what it has not in comments."""
    data: dict[str, Any] = to_dict(found.genome)
    if out.suffix == ".json":
        return json.dumps(data, indent=2) + "\n"
    head = [f"A {found.family} model, read from {model.name}."]
    head += [f"Not in the genome: {sentence}." for sentence in found.differs]
    comments = "".join(f"# {' '.join(line.split())}\n" for line in head)
    return comments + yaml.safe_dump(data, sort_keys=False)
