"""The command that reads another library's configuration: import."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from ..genome import imported
from ..genome.files import text_of
from ..genome.imported import Imported
from ..genome.notation import show as notation
from .describe import counting, describe, exact_text, header_text
from .exports.proof import is_export
from .new_files import GENOMES, check_new, write_new
from .options import AsJson, Context, Dtype, NewGenome, examples
from .source import other_than_genome
from .study_around import study_around
from .terminal import Mistake, console, plain, print_hanging, print_json, say, say_wrapped

app = typer.Typer()

STUDY_SUFFIXES = (".yaml", ".yml")


@app.command(
    name="import",
    epilog=examples(
        "mendel import models/llama-3.1-8b",
        "mendel import config.json --out mine.yaml",
        "mendel import config.json --study mine-study.yaml",
        "mendel import config.json --context 262144 --json",
    ),
)
def import_(
    model: Annotated[
        Path, typer.Argument(help="A config.json of transformers, or the folder that has one.")
    ],
    out: NewGenome = None,
    study: Annotated[
        Path | None,
        typer.Option(help="Write a study to this .yaml file: a search around the model in small."),
    ] = None,
    context: Context = None,
    dtype: Dtype = None,
    as_json: AsJson = False,
) -> None:
    """Read the configuration of a model that you have as a genome.

    Its weights stay where they are. Says what of the model the genome has not;
    a part with parameters or a cache is never left out: it is refused by name.
    """
    if is_export(model):
        raise Mistake(f"{model} is {other_than_genome(model)}")
    found = imported.load(model)
    source = model.resolve().name
    files: dict[Path, str] = {}
    if out is not None:
        check_new(out, GENOMES)
        files[out] = _file(source, out, found)
    if study is not None:
        check_new(study, STUDY_SUFFIXES)
        if study in files:
            raise Mistake(f"--out and --study both name {study}")
        files[study] = study_around(found.genome, found.family, source, study)
    at = counting(None, context, dtype)
    write_new(files)
    if as_json:
        more = {"family": found.family, "differs": found.differs, "unread": found.unread}
        print_json({**more, **describe(found.genome, at)})
        return
    screen = console()
    screen.print(Text(plain(f"{found.family} · {header_text(found.genome)}"), style="bold"))
    screen.print(Text(plain(notation(found.genome))), style="dim")
    screen.print(Text(plain(exact_text(found.genome, at.cost(found.genome).total))))
    say_wrapped(f"Cache of one sequence of {at.context:,} tokens in {at.dtype}.", "dim")
    lines = [("differs", sentence) for sentence in found.differs]
    if found.unread:
        lines.append(("not read", ", ".join(found.unread)))
    if lines:
        print_hanging(lines)
    if not files:
        say_wrapped("--out FILE.yaml keeps the genome; --study FILE.yaml starts a search.", "dim")
    if out is not None:
        say(f"Wrote {out}. Look at it: mendel show {out}")
    if study is not None:
        say(f"Wrote {study}. Look at it, then: mendel search {study} --dry-run")


def _file(source: str, out: Path, found: Imported) -> str:
    """The genome's file: in YAML with what it is and what it has not in comments."""
    text = text_of(found.genome, out)
    if out.suffix == ".json":
        return text
    head = [f"A {found.family} model, read from {source}."]
    head += [f"Not in the genome: {sentence}." for sentence in found.differs]
    return "".join(f"# {' '.join(line.split())}\n" for line in head) + text
