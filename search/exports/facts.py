"""What an export says of a design as JSON: its costs, its scores, where it came from."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

from ...genome.cost import DEFAULT_CONTEXT, cost
from ...genome.genome import GRAMMAR_VERSION, Genome
from ...genome.hash import canonical_hash
from ...genome.notation import show as notation
from ...primitives.base import DTYPES
from ..provenance import commit, versions
from ..records import TrialRecord
from ..source import PLAN, Source
from ..store import now, read_json
from .order import Order

CONTEXTS = (DEFAULT_CONTEXT, 65_536)
COST_DTYPES = ("bf16", "fp32")

VERSION = version("mendel")

LIMITS = (
    "Trained on proxies, not a language model: scores come from small proxy tasks in short "
    "trainings and rank designs at this size and budget."
)
UNTRAINED = "A design, not a language model: nothing was trained, so there are no scores."


def limits(source: Source) -> str:
    """What the design has not shown."""
    return UNTRAINED if source.trial is None and source.training is None else LIMITS


def costs(genome: Genome, vocab: int | None = None) -> dict[str, Any]:
    """Counted costs, per context and dtype, whole and per slot; `vocab` is that of the exported
    model's weights, the genome's where it is None."""
    alphabet = genome.vocab if vocab is None else vocab
    first = cost(genome, vocab=alphabet)
    return {
        "params": first.total.params,
        "active_params": first.total.active_params,
        "vocab": alphabet,
        "at": [_costs_at(genome, alphabet, c, d) for c in CONTEXTS for d in COST_DTYPES],
    }


def _costs_at(genome: Genome, vocab: int, context: int, dtype: str) -> dict[str, Any]:
    counted = cost(genome, context, DTYPES[dtype], vocab)
    return {
        "context": context,
        "dtype": dtype,
        "cache_bytes": counted.total.state_bytes,
        "flops_per_token": counted.total.flops_per_token,
        "slots": [
            {"params": c.params, "cache_bytes": c.state_bytes, "flops_per_token": c.flops_per_token}
            for c in counted.slots
        ],
    }


def scores(source: Source) -> dict[str, Any]:
    """Per proxy the scores and steps of every rung with the conditions of what was measured, and
    the baselines of the same budget; of a training the spread over its seeds."""
    found: dict[str, Any] = {"proxies": {}, "seeds": [], "rungs": [], "baselines": {}}
    if source.training is not None:
        return {**found, **_training_scores(source.training)}
    if source.trial is None or source.run is None:
        note = "the design was exported without a run, so nothing was trained"
        return {**found, "note": note}
    study = source.run.study
    return {
        "proxies": {name: p.model_dump(mode="json") for name, p in study.proxies.items()},
        "seeds": [study.search.seed],
        "note": "one seed per trial: the scores carry no spread over seeds",
        "state": source.trial.state,
        "values": source.trial.values,
        "rungs": _rungs(source.trial),
        "baselines": {
            str(t.baseline): {"state": t.state, "values": t.values, "rungs": _rungs(t)}
            for t in source.run.trials
            if t.baseline is not None
        },
    }


def _training_scores(folder: Path) -> dict[str, Any]:
    """What `mendel train` wrote; empty scores where it has not ended."""
    held = read_json(folder / "scores.json")
    proxy = read_json(folder / PLAN).get("proxy", {})
    note = "spread over the seeds; no baselines were trained beside it"
    return {
        "proxies": {str(proxy.get("task")): proxy},
        "seeds": [row.get("seed") for row in held.get("seeds", [])],
        "note": note if held else "the training has not ended",
        "summary": held.get("summary", {}),
        "trainings": held.get("seeds", []),
    }


def _rungs(trial: TrialRecord) -> list[dict[str, Any]]:
    return [dict(rung) for rung in trial.as_dict()["rungs"]]


def provenance(order: Order, to: str) -> dict[str, Any]:
    """Where the design came from, in a format of that name."""
    source = order.source
    facts: dict[str, Any] = {
        "exported": now(),
        "mendel": VERSION,
        "format": to,
        "genome": {
            "grammar": GRAMMAR_VERSION,
            "hash": canonical_hash(source.genome),
            "notation": notation(source.genome),
        },
        "source": source.text,
        "versions": versions(),
        "commit": commit(),
        "limits": limits(source),
    }
    if source.trial is not None and source.run is not None:
        trial = source.trial
        facts |= {
            "run": source.run.provenance,
            "study": source.run.study.text,
            "trial": {
                "number": trial.number,
                "baseline": trial.baseline,
                "parents": trial.parents,
                "variation": trial.variation,
                "started": trial.started,
                "finished": trial.finished,
                "hash": trial.hash,
            },
        }
    return facts
