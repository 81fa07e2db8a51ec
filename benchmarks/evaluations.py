"""Stand-ins for training, for benchmarks of the search itself (`evaluate:` in a study)."""

from __future__ import annotations

import json
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

from mendel.genome.files import from_dict
from mendel.genome.hash import canonical_hash
from mendel.genome.notation import parse

BEGAN: list[float] = []
"""When each `noop` began, in this process: with a serial executor, the driver's time is between."""

TABLE = Path(__file__).parent / "data" / "table.jsonl"


@lru_cache(1)
def table() -> dict[str, dict[str, Any]]:
    """The rows of the table by canonical hash, which is this version's: a hash covers all numbers
    of a config, and a later version may have more of them."""
    rows = [json.loads(line) for line in TABLE.read_text().splitlines()[1:]]
    return {canonical_hash(parse(row["notation"])): row for row in rows}


def _result(job: dict[str, Any], score: float, seconds: float) -> dict[str, Any]:
    return {
        "scores": {name: {"score": score} for name in job["proxies"]},
        "steps": job["steps"],
        "seconds": seconds,
        "tokens": 0,
        "statistics": {},
    }


def noop(job: dict[str, Any]) -> dict[str, Any]:
    """No work: a score that the genome's hash decides."""
    BEGAN.append(time.perf_counter())
    label = canonical_hash(from_dict(job["genome"]))
    return _result(job, int(label, 16) / 16 ** len(label), 0.0)


def ten_seconds(job: dict[str, Any]) -> dict[str, Any]:
    """Ten seconds of nothing, for the occupancy of workers."""
    began = time.perf_counter()
    result = noop(job)
    time.sleep(10 - (time.perf_counter() - began))
    return {**result, "seconds": time.perf_counter() - began}


def lookup(job: dict[str, Any]) -> dict[str, Any]:
    """The score that the table holds for the genome."""
    return _result(job, table()[canonical_hash(from_dict(job["genome"]))]["score"], 0.0)
