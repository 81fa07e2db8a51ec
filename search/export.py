"""Take a design along: a folder with the genome, its costs and scores, and where they came from."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..genome.cost import DEFAULT_CONTEXT, cost
from ..genome.files import dump, load
from ..genome.genome import GRAMMAR_VERSION, Genome
from ..genome.hash import canonical_hash
from ..genome.notation import parse
from ..genome.notation import show as notation
from ..primitives.base import DTYPES
from .records import TrialRecord
from .run import RunView
from .source import Source
from .store import now
from .terminal import Mistake, clean
from .units import bytes_text, count_text

FORMATS = ("files",)
"""What `export` can write; `files` is the folder that this module describes."""

CONTEXTS = (DEFAULT_CONTEXT, 65_536)
COST_DTYPES = ("bf16", "fp32")

VERSION = version("mendel")

SCORES = "Scores lie in 0..1, higher is better; the baselines had the same budget."

FILES = (
    "`genome.yaml` and `genome.json` hold the design, `costs.json` what it costs, `scores.json` "
    "what it and the baselines of the same budget scored, `provenance.json` how that came about "
    "and the sha256 of each file."
)

LIMITS = (
    "Scores come from small proxy tasks in short trainings, not from a language model: they rank "
    "designs at this size and budget. No weights are in this folder. Ranks can change with size, "
    "data and training length; train the design yourself before you rely on it."
)


def export(source: Source, out: Path, *, force: bool = False) -> Path:
    """Write the folder, read it back, compare, and only then put it in its place.

    Raises Mistake where `out` exists and `force` is not given, or is no folder of ours.
    """
    if out.exists():
        if not force:
            raise Mistake(f"{out} exists already; choose another folder or add --force")
        if not (out / "genome.json").is_file():
            raise Mistake(f"{out} exists and is no exported design; --force replaces only those")
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = out.with_name(f".{out.name}.{os.getpid()}.part")
    scratch.mkdir()
    try:
        write_files(source, scratch)
        check(source, scratch)
        if out.exists():
            shutil.rmtree(out)
        scratch.rename(out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return out


def write_files(source: Source, folder: Path) -> None:
    """Write every file of the export into a folder that exists."""
    genome = source.genome
    dump(genome, folder / "genome.yaml")
    dump(genome, folder / "genome.json")
    write(folder / "costs.json", costs(genome))
    write(folder / "scores.json", scores(source))
    (folder / "README.md").write_text(card(source), encoding="utf-8")
    named = {p.name: p for p in sorted(folder.iterdir())}
    hashes = {name: hashlib.sha256(p.read_bytes()).hexdigest() for name, p in named.items()}
    write(folder / "provenance.json", provenance(source, hashes))


def write(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(clean(value), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def check(source: Source, folder: Path) -> None:
    """Read everything back; raises RuntimeError where it is not what was meant."""
    genome = source.genome
    if any(load(folder / name) != genome for name in ("genome.yaml", "genome.json")):
        raise RuntimeError(
            f"{folder}: the genome that was written is not the genome that was meant"
        )
    if parse(notation(genome)) != genome:
        raise RuntimeError(f"{folder}: the notation does not give the genome back")
    proof = json.loads((folder / "provenance.json").read_text(encoding="utf-8"))
    for name, digest in proof["files"].items():
        if hashlib.sha256((folder / name).read_bytes()).hexdigest() != digest:
            raise RuntimeError(f"{folder / name}: changed while it was written")


def costs(genome: Genome) -> dict[str, Any]:
    """Counted costs, per context and dtype, whole and per slot."""
    first = cost(genome)
    return {
        "params": first.total.params,
        "active_params": first.total.active_params,
        "vocab": genome.vocab,
        "at": [_costs_at(genome, c, d) for c in CONTEXTS for d in COST_DTYPES],
    }


def _costs_at(genome: Genome, context: int, dtype: str) -> dict[str, Any]:
    counted = cost(genome, context, DTYPES[dtype])
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
    """Per proxy the scores and steps of every rung, and the baselines of the same budget."""
    if source.trial is None or source.run is None:
        return {
            "proxies": {},
            "seeds": [],
            "rungs": [],
            "baselines": {},
            "note": "the design was exported without a run, so nothing was trained",
        }
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


def _rungs(trial: TrialRecord) -> list[dict[str, Any]]:
    return [dict(rung) for rung in trial.as_dict()["rungs"]]


def provenance(source: Source, hashes: Mapping[str, str]) -> dict[str, Any]:
    """Where the design came from, and the sha256 of every other file of the folder."""
    facts: dict[str, Any] = {
        "exported": now(),
        "mendel": VERSION,
        "genome": {
            "grammar": GRAMMAR_VERSION,
            "hash": canonical_hash(source.genome),
            "notation": notation(source.genome),
        },
        "source": source.text,
        "files": dict(hashes),
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


def card(source: Source) -> str:
    """README.md: what this is, what it costs, what it scored, what it is not."""
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
        LIMITS,
        "",
        "## Files",
        "",
        FILES,
        "",
        "    mendel show genome.yaml",
        "    mendel train genome.yaml --proxy byte-text --steps 1000 --out trained",
        "",
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
