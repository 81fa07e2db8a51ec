"""The card: README.md, for people who find the folder without knowing Mendel."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ...genome.cost import DEFAULT_CONTEXT, cost
from ...genome.notation import show as notation
from ..records import TrialRecord
from ..run import RunView
from ..source import Source
from ..units import bytes_text, count_text
from .facts import VERSION
from .order import Order

SCORES = "Scores lie in 0..1, higher is better; the baselines had the same budget."

LIMITS = (
    "Scores come from small proxy tasks in short trainings, not from a language model: they rank "
    "designs at this size and budget."
)

CAUTION = (
    "Ranks can change with size, data and training length; train the design yourself before you "
    "rely on it."
)


def write_card(order: Order, folder: Path) -> None:
    """The format `card`: README.md alone."""
    files = "`provenance.json` says how the scores came about and holds the sha256 of this page."
    text = card(order.source, weights="Neither weights nor code are in this folder.", files=files)
    (folder / "README.md").write_text(text, encoding="utf-8")


def card(source: Source, *, weights: str, files: str, uses: Sequence[str] = ()) -> str:
    """README.md: what this is, what it costs, what it scored, what it is not.

    `weights` says whose weights are in the folder, `files` what its files hold; `uses` are commands
    to begin with.
    """
    genome = source.genome
    counted = cost(genome)
    total = counted.total
    lines = [
        f"# {source.name}",
        "",
        "```",
        notation(genome),
        "```",
        "",
        f"{len(genome.slots)} slots, width {genome.width}; written by mendel {VERSION}.",
        "",
        "| cost | |",
        "| --- | --- |",
        f"| parameters | {count_text(total.params)} |",
        f"| active for one token | {count_text(total.active_params)} |",
        f"| FLOPs per token at {DEFAULT_CONTEXT} | {count_text(total.flops_per_token)} |",
        f"| cache at {DEFAULT_CONTEXT} tokens, bf16 | {bytes_text(total.state_bytes)} |",
        "",
    ]
    if source.trial is not None and source.run is not None:
        lines += _card_scores(source.run, source.trial)
    lines += [
        "## Limits",
        "",
        f"{LIMITS} {weights} {CAUTION}",
        "",
        "## Files",
        "",
        files,
        "",
        *(f"    {use}" for use in uses),
        *([""] if uses else []),
    ]
    return "\n".join(lines)


def _card_scores(run: RunView, trial: TrialRecord) -> list[str]:
    proxies = list(run.study.proxies)
    lines = [
        "## Scores",
        "",
        f"Run {run.study.name}, trial {trial.number}, {trial.state}. {SCORES}",
        "",
        "| design | " + " | ".join(proxies) + " |",
        "| --- |" + " ---: |" * len(proxies),
    ]
    rows = [("this design", trial)]
    rows += [
        (str(t.baseline), t)
        for t in run.trials
        if t.baseline is not None and t.number != trial.number
    ]
    for name, row in rows:
        found = row.rungs[-1].scores if row.rungs else {}
        cells = [f"{found[p]['score']:.4f}" if p in found else "-" for p in proxies]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return [*lines, ""]
