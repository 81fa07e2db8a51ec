"""The card: README.md, for people who find the folder without knowing Mendel."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...genome.cost import DEFAULT_CONTEXT, cost
from ...genome.genome import GRAMMAR_VERSION
from ...genome.hash import canonical_hash
from ...genome.notation import show as notation
from ..records import TrialRecord
from ..run import RunView
from ..source import Source
from ..units import bytes_text, count_text, value_text
from .facts import VERSION, limits, scores
from .order import Order

SCORES = "Scores lie in 0..1, higher is better; the baselines had the same budget."

CAUTION = (
    "Ranks can change with size, data and training length; train the design yourself before you "
    "rely on it."
)


def write_card(order: Order, folder: Path) -> dict[str, Any]:
    """The format `card`: README.md alone."""
    files = "`provenance.json` says how the scores came about and holds the sha256 of this page."
    text = card(order.source, weights="Neither weights nor code are in this folder.", files=files)
    (folder / "README.md").write_text(text, encoding="utf-8")
    return {}


def card(
    source: Source,
    *,
    weights: str,
    files: str,
    vocab: int | None = None,
    uses: Sequence[str] = (),
    before: Sequence[str] = (),
    more: Sequence[str] = (),
) -> str:
    """README.md: what this is, what it costs, what it scored, what it is not.

    `weights` says whose weights are in the folder, `files` what its files hold; `vocab` is those
    weights' (None: the genome's), `uses` are commands to begin with. Lines `before` stand above
    everything, lines `more` before the limits.
    """
    genome = source.genome
    alphabet = genome.vocab if vocab is None else vocab
    total = cost(genome, vocab=alphabet).total
    lines = [
        *before,
        f"# {source.name}",
        "",
        "```",
        notation(genome),
        "```",
        "",
        f"{len(genome.slots)} slots, width {genome.width}; written by mendel {VERSION}.",
        "",
        f"Grammar {GRAMMAR_VERSION}, genome hash `{canonical_hash(genome)}`.",
        "",
        "| cost | |",
        "| --- | --- |",
        f"| vocabulary | {alphabet:,} tokens |",
        f"| parameters | {count_text(total.params)} |",
        f"| active for one token | {count_text(total.active_params)} |",
        f"| FLOPs per token at {DEFAULT_CONTEXT} | {count_text(total.flops_per_token)} |",
        f"| cache at {DEFAULT_CONTEXT} tokens, bf16 | {bytes_text(total.state_bytes)} |",
        "",
    ]
    if source.trial is not None and source.run is not None:
        lines += _trial_scores(source.run, source.trial) + _measured(source.trial)
    elif source.training is not None:
        lines += _training_scores(source)
    lines += [
        *more,
        "## Limits",
        "",
        f"{limits(source)} {weights} {CAUTION}",
        "",
        "## Files",
        "",
        files,
        "",
        *(f"    {use}" for use in uses),
        *([""] if uses else []),
    ]
    return "\n".join(lines)


def _trial_scores(run: RunView, trial: TrialRecord) -> list[str]:
    proxies = list(run.study.proxies)
    lines = [
        "## Scores",
        "",
        f"Run {run.study.name}, trial {trial.number}, {trial.state}. {SCORES}",
        f"One seed ({run.study.search.seed}), so there is no spread over seeds.",
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


def _measured(trial: TrialRecord) -> list[str]:
    """What was measured and under which conditions; nothing where nothing was."""
    measured = trial.rungs[-1].measurements if trial.rungs else {}
    if not measured:
        return []
    lines = ["| measured | median | 10 % to 90 % | conditions |", "| --- | ---: | --- | --- |"]
    for name, m in measured.items():
        told = ", ".join(f"{k} {v}" for k, v in m.conditions.items() if not isinstance(v, dict))
        span = f"{value_text(m.low, m.unit)} to {value_text(m.high, m.unit)}"
        lines.append(
            f"| {name} | {value_text(m.median, m.unit)} | {span} | {told}, {m.repeats} repeats |"
        )
    return [*lines, ""]


def _training_scores(source: Source) -> list[str]:
    """The scores of a training, with their spread over its seeds."""
    found = scores(source)
    seeds = ", ".join(map(str, found["seeds"])) or "none yet"
    proxy = ", ".join(found["proxies"])
    lines = [
        "## Scores",
        "",
        f"Trained on {proxy}, seeds {seeds}; {found['note']}.",
        "",
        "| metric | mean | standard deviation | least | most |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name, s in found["summary"].items():
        spread = "-" if s["std"] is None else f"{s['std']:.4f}"
        lines.append(f"| {name} | {s['mean']:.4f} | {spread} | {s['min']:.4f} | {s['max']:.4f} |")
    return [*lines, ""]
