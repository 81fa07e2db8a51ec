"""Commands that prepare: doctor and init."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .commands_look import AsJson, examples
from .doctor import examine
from .template import write_template
from .terminal import print_json, print_table, say

app = typer.Typer()


@app.command(epilog=examples("mendel doctor", "mendel doctor --runs /scratch/runs --json"))
def doctor(
    runs: Annotated[Path, typer.Option(help="Where runs would go.")] = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """Say what this machine has, what is missing and how to get it. Exit code 1 if it is needed."""
    findings = examine(runs)
    missing = [f for f in findings if f.state == "missing"]
    if as_json:
        print_json({"ready": not missing, "findings": [f.as_dict() for f in findings]})
    else:
        marks = {"ok": "ok", "note": "note", "missing": "MISSING"}
        print_table(
            ["", "what", "found", "how to get it"],
            [[marks[f.state], f.name, f.found, f.hint] for f in findings],
            fold=["found", "how to get it"],
            styles=[
                {"ok": None, "note": "yellow", "missing": "bold red"}[f.state] for f in findings
            ],
        )
        say(
            "This machine can search."
            if not missing
            else f"Missing: {', '.join(f.name for f in missing)}."
        )
    if missing:
        raise typer.Exit(1)


@app.command(epilog=examples("mendel init", "mendel init studies/mine.yaml"))
def init(
    path: Annotated[Path, typer.Argument(help="The file to write, or a folder.")] = Path(
        "study.yaml"
    ),
) -> None:
    """Write a commented study to start from; nothing is overwritten."""
    written = write_template(path)
    say(f"Wrote {written}. Look at it, then: mendel search {written} --dry-run")
