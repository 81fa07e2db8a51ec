"""Commands that look at a run or take a design along: front, report, export, verify."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from .exports.folder import export
from .exports.formats import DEFAULT, FORMATS
from .exports.order import Order
from .exports.proof import OWN, files_of, read_facts
from .exports.verify import verify
from .front import Outcome, label_text, outcome_dict, outcome_of, shown_value
from .options import WHAT, AsJson, examples
from .records import TrialRecord
from .report import FILE, broken, write_report
from .run import RunView
from .source import find_genome, find_run
from .terminal import Mistake, console, print_hanging, print_json, print_table, say

app = typer.Typer()

WIDE = 130
"""Columns from which genomes stand in the table; else they follow it, a line each."""

RUN = "A run's folder, or its name under ./runs."


@app.command(
    epilog=examples(
        "mendel front quickstart",
        "mendel front runs/quickstart --objectives score:recall,params --json",
    )
)
def front(
    run: Annotated[str, typer.Argument(help=RUN)],
    objectives: Annotated[
        str | None,
        typer.Option(help="Some of the study's objectives, with commas; the front is of these."),
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="List dominated, stopped and infeasible trials too.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Print the Pareto front of a run, with the baselines, and what failed and why."""
    view = find_run(run)
    labels = None if objectives is None else [part.strip() for part in objectives.split(",")]
    found = outcome_of(view, labels)
    if as_json:
        print_json(
            {"run": str(view.folder), "study": view.study.name, "state": view.state}
            | outcome_dict(found)
        )
        return
    print_outcome(view, found, everything)


def print_outcome(run: RunView, found: Outcome, everything: bool = False) -> None:
    """The tables that end a search and that `front` prints."""
    front_numbers = {t.number for t in found.front}
    if found.front:
        _table(found, found.front, f"The front of {run.study.name}")
    else:
        say(f"{run.study.name}: no trial was trained to the end yet.")
    behind = [t for t in found.baselines if t.number not in front_numbers]
    if behind:
        _table(found, behind, "Baselines off the front")
    if everything:
        others = [t for t in found.dominated if t.baseline is None]
        for trials, title in ((others, "Dominated"), (found.stopped, "Stopped early")):
            own = [t for t in trials if t.baseline is None]
            if own:
                _table(found, own, title)
        if found.infeasible:
            print_table(
                ["trial", "constraint exceeded by", "genome"],
                [[_name(t), broken(t), t.notation] for t in found.infeasible],
                fold=["constraint exceeded by", "genome"],
                title="Infeasible",
            )
    if found.failed:
        print_table(
            ["trial", "kind", "reason"],
            [
                [
                    _name(t),
                    t.failure.kind if t.failure else "",
                    t.failure.reason if t.failure else "",
                ]
                for t in found.failed
            ],
            fold=["reason"],
            title="Failed",
        )
    say(counts(found))
    for remark in run.remarks:
        say(remark)


def counts(found: Outcome) -> str:
    """How many trials ended how, and the hypervolume, in one line."""
    parts = [
        f"{len(found.complete)} complete",
        f"{len(found.stopped)} stopped early",
        f"{len(found.infeasible)} infeasible",
        f"{len(found.failed)} failed",
    ]
    if found.running:
        parts.append(f"{len(found.running)} running")
    return f"{', '.join(parts)}; hypervolume {found.hypervolume:.4f}"


def _name(trial: TrialRecord) -> str:
    return f"{trial.number} {trial.baseline}" if trial.baseline else str(trial.number)


def _table(found: Outcome, trials: Sequence[TrialRecord], title: str) -> None:
    labels = [label_text(g) for g in found.goals]
    wide = console().width >= WIDE
    rows, styles = [], []
    for t in trials:
        kind = f"baseline {t.baseline}" if t.baseline else "found"
        if t.number == found.knee:
            kind += ", knee"
        if not t.values:
            kind += f" ({t.state})"
        values = [shown_value(t, g) or "-" for g in found.goals]
        rows.append([str(t.number), kind, *values, *([t.notation] if wide else [])])
        styles.append("yellow" if t.baseline else "bold" if t.number == found.knee else None)
    print_table(
        ["trial", "design", *labels, *(["genome"] if wide else [])],
        rows,
        right=["trial", *labels],
        fold=["design", "genome"],
        styles=styles,
        title=title,
    )
    if not wide:
        print_hanging([(str(t.number), t.notation) for t in trials])
        say()


@app.command(
    epilog=examples("mendel report quickstart", "mendel report quickstart --out shared.html")
)
def report(
    run: Annotated[str, typer.Argument(help=RUN)],
    out: Annotated[
        Path | None, typer.Option(help=f"The file to write; {FILE} in the run if absent.")
    ] = None,
) -> None:
    """Write a run's report: one HTML page that needs nothing else."""
    view = find_run(run)
    if out is not None and not out.absolute().parent.is_dir():
        raise Mistake(f"--out: {out.parent} is no folder")
    if out is not None and out.is_dir():
        out = out / FILE
    say(f"Wrote {write_report(view, out)}")


@app.command(
    name="export",
    epilog=examples(
        "mendel export quickstart:12 --out winner",
        "mendel export quickstart:12 --format hf --out model",
        "mendel export '[mamba2 > swiglu]*4' --out plain --force",
    ),
)
def export_command(
    what: Annotated[str, typer.Argument(help=WHAT)],
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    to: Annotated[str, typer.Option("--format", help=f"One of: {', '.join(FORMATS)}.")] = DEFAULT,
    proxy: Annotated[
        str | None,
        typer.Option(help="Of a trial: the proxy whose weights go along; the text one if absent."),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of a training: the seed whose weights go along.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an exported design.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write a design as a folder: genome, costs, scores, provenance and a card.

    The format hf is a model for transformers, with the weights that a trial or a
    training left; it needs torch and transformers alone.
    """
    folder = export(Order(find_genome(what), proxy, seed), out, to, force=force)
    files = [p.relative_to(folder).as_posix() for p in files_of(folder)]
    sealed = read_facts(folder)[OWN]
    if as_json:
        print_json({"folder": str(folder), "files": files, "seal": sealed})
    else:
        code = [name for name in files if name.endswith(".py")]
        named = [name for name in files if name not in code]
        more = f" and {len(code)} files of code" if code else ""
        say(f"Wrote {folder}: {', '.join(named)}{more}; all read back and compared.")
        say(f"Seal {sealed}: give it along; mendel verify prints that of the folder it reads.")


@app.command(
    name="verify",
    epilog=examples("mendel verify my-design", "mendel verify model --json"),
)
def verify_command(
    folder: Annotated[Path, typer.Argument(help="A folder that mendel export wrote.")],
    as_json: AsJson = False,
) -> int:
    """Prove an export: its files, its genome, and of a model that it is the one that was trained.

    A model's own code is run unless a file was changed, so verify folders that you
    trust. Who changes a file on purpose can seal the folder anew: compare the seal
    with the one that its author's export printed. The exit code is 1 where a check
    failed.
    """
    found = list(verify(folder))
    failed = [r.name for r in found if r.state == "failed"]
    sealed = read_facts(folder).get(OWN)
    if as_json:
        print_json(
            {
                "folder": str(folder),
                "verified": not failed,
                "seal": sealed,
                "checks": [asdict(r) for r in found],
            }
        )
    else:
        rows = [[r.name, r.state, r.said] for r in found]
        styles = ["bold red" if r.state == "failed" else None for r in found]
        print_table(["check", "", "found"], rows, fold=["found"], styles=styles)
        if failed:
            say(f"{folder}: failed: {', '.join(failed)}")
        else:
            skipped = [r.name for r in found if r.state == "skipped"]
            but = f" but for what was skipped ({', '.join(skipped)})" if skipped else ""
            say(f"{folder} is verified{but}; its seal is {sealed}")
    return 1 if failed else 0
