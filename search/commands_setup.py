"""Commands that prepare and prove: doctor, init, verify-genomes."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from ..genome.check import TOLERANCE, Disagreement, disagreements
from .doctor import examine
from .options import AsJson, examples
from .template import write_template
from .terminal import console, print_json, print_table, say, warn

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
        print_json(
            {
                "ready": not missing,
                "executable": sys.executable,
                "findings": [f.as_dict() for f in findings],
            }
        )
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
        # Not in the table, whose narrow columns would break a long path.
        say(f"Python is {sys.executable}")
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


TIES = ("tie", "a router's choice between tied experts")


@app.command(
    name="verify-genomes",
    epilog=examples("mendel verify-genomes", "mendel verify-genomes --count 10000 --seed 1"),
)
def verify_genomes(
    count: Annotated[int, typer.Option(min=1, help="Random genomes to try.")] = 300,
    seed: Annotated[int, typer.Option(min=0, help="Where the genomes are drawn from.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Check that random genomes give the same logits in parallel and step by step.

    They agree where float32 logits differ by at most 1e-5 of their scale.
    What differs more, but agrees in float64, is counted apart: as rounding up to
    1e-4, and beyond it as a router's tie where the genome holds experts.
    All else is a fault.

    Exit code 1 where there is a fault.
    """
    wrong: list[Disagreement] = []
    explained: list[Disagreement] = []
    screen = console(stderr=True)
    with screen.status("", spinner="line") as status:
        for i, found in enumerate(disagreements(count, seed)):
            if found is not None and found.cause != "fault":
                explained.append(found)
            elif found is not None:
                wrong.append(found)
                warn(f"{found.notation}: differs by {found.difference:.3g} (seed {found.seed})")
            status.update(f"{i + 1} of {count} genomes, {len(wrong)} disagree")
    if as_json:
        print_json(
            {
                "count": count,
                "seed": seed,
                "tolerance": TOLERANCE,
                "explained": [{**asdict(found), "cause": found.cause} for found in explained],
                "disagree": [asdict(found) for found in wrong],
            }
        )
    else:
        agree = count - len(wrong) - len(explained)
        say(f"{agree} of {count} genomes agree to {TOLERANCE:g} in float32")
        for cause, words in (("rounding", "float32 rounding that the depth amplified"), TIES):
            some = [found.difference for found in explained if found.cause == cause]
            if some:
                say(f"{len(some)} differ by {words}, at most {max(some):.2g}; equal in float64")
    if wrong:
        raise typer.Exit(1)
