"""The format `genome`: a small folder with the design, what it costs and what it scored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...genome.files import text_of
from .card import card
from .facts import costs, scores
from .order import Order
from .proof import write

FILES = (
    "`genome.yaml` and `genome.json` hold the design, `costs.json` what it costs, `scores.json` "
    "what it and the baselines of the same budget scored, `provenance.json` how that came about "
    "and the sha256 of each file."
)

WEIGHTLESS = "No weights are in this folder."


def write_genome(order: Order, folder: Path) -> dict[str, Any]:
    """Write genome, costs, scores and card."""
    write_design(order, folder)
    uses = (
        "mendel show genome.yaml",
        "mendel train genome.yaml --proxy byte-text --steps 1000 --out trained",
    )
    text = card(order.source, weights=WEIGHTLESS, files=FILES, uses=uses)
    (folder / "README.md").write_text(text, encoding="utf-8")
    return {}


def write_design(order: Order, folder: Path, vocab: int | None = None) -> None:
    """What every format with a genome holds: genome, costs and scores. `vocab` is that of the
    weights in the folder; None where there are none."""
    genome = order.source.genome
    for path in (folder / "genome.yaml", folder / "genome.json"):
        path.write_text(text_of(genome, path), encoding="utf-8")
    write(folder / "costs.json", costs(genome, vocab))
    write(folder / "scores.json", scores(order.source))
