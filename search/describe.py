"""A genome and its costs as the commands print them: the keys of JSON, and facts in words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..genome.cost import DEFAULT_CONTEXT, ModelCost, cost
from ..genome.files import to_dict
from ..genome.genome import Genome
from ..genome.hash import canonical_hash
from ..genome.notation import show as notation
from ..genome.residual import entry_norm, norms_of
from ..primitives.base import DTYPES, Cost
from .draw import drawing
from .objectives import CacheSettings
from .options import DEFAULT_DTYPE
from .outline import outline
from .run import RunView
from .terminal import console, say_wrapped, unicode_works


@dataclass(frozen=True)
class Counting:
    """At what context and in what type costs are counted, and who says so."""

    context: int
    dtype: str
    reason: str = ""

    def cost(self, genome: Genome) -> ModelCost:
        return cost(genome, self.context, DTYPES[self.dtype])


def counting(run: RunView | None, context: int | None, dtype: str | None) -> Counting:
    """As the options say; where there are none, as the objective of the run's study counts."""
    if run is not None and context is None and dtype is None:
        for goal in run.goals:
            if isinstance(goal.settings, CacheSettings):
                reason = f", as {run.study.name} counts {goal.label}"
                return Counting(goal.settings.context, goal.settings.dtype, reason)
    return Counting(context or DEFAULT_CONTEXT, dtype or DEFAULT_DTYPE)


def _costs(costs: Cost) -> dict[str, Any]:
    return {
        "params": costs.params,
        "active_params": costs.active_params,
        "flops_per_token": costs.flops_per_token,
        "cache_bytes": costs.state_bytes,
    }


def describe(genome: Genome, at: Counting) -> dict[str, Any]:
    """What `show --json` prints; its keys are fixed."""
    written, counted = to_dict(genome), at.cost(genome)
    return {
        "genome": written,
        "notation": notation(genome),
        "hash": canonical_hash(genome),
        **_costs(counted.total),
        "context": at.context,
        "dtype": at.dtype,
        "slots": [
            {"slot": i, **slot, **_costs(part)}
            for i, (slot, part) in enumerate(zip(written["slots"], counted.slots, strict=True))
        ],
    }


def stream_text(genome: Genome) -> str:
    """Norm, placement and residual form, as far as they have an effect and are not the default."""
    norm, placement = norms_of(genome)
    places = placement if entry_norm(genome) == "none" else f"{placement}, embedding"
    words = "no norm" if norm == "none" else f"{norm} ({places})"
    if genome.residual == "ngpt":
        return "residual ngpt"
    return words if genome.residual == "plain" else f"{words} · residual {genome.residual}"


def header_text(genome: Genome) -> str:
    """Width, slots, position, norm, residual form and tying in one line."""
    parts = [
        f"width {genome.width}",
        f"{len(genome.slots)} slots",
        f"position {genome.position}",
        stream_text(genome),
        "tied" if genome.tied else "untied",
    ]
    return " · ".join(parts)


def exact_text(genome: Genome, total: Cost) -> str:
    """What is compared with a published model's own figures, to the last digit."""
    words = [
        f"{total.params:,} parameters",
        f"{total.active_params:,} active",
        f"embedding {genome.vocab * genome.width:,} in both",
        f"cache {total.state_bytes:,} bytes",
    ]
    return " · ".join(words)


def print_drawing(genome: Genome, at: Counting) -> None:
    """The drawing of a genome to stdout, and under it what its numbers mean."""
    content, screen = outline(genome, at.cost(genome)), console()
    screen.print()
    for line in drawing(content, screen.width, unicode_works()):
        screen.print(line, soft_wrap=True)
    say_wrapped(
        f"Cache of one sequence of {at.context:,} tokens in {at.dtype}{at.reason}; FLOPs per token "
        "are the mean over its positions. Numbers are of one slot, each time it stands.",
        "dim",
    )
