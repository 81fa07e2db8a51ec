"""Clocks of the bench: seconds of repeated calls after warm-up, their spread, peak memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from .autotune import untimed_launches

REPEATS = 20
CYCLES_PER_SECOND = 2e9
"""More than the clock of a GPU has."""
LONGEST_WAIT = 0.02
"""Of a GPU for launches, in seconds."""
MOST_SECONDS = {"cpu": 0.4, "cuda": 0.5}
"""Per time that is taken, at most, once there are three."""


def times(
    work: Callable[[], object], device: str, most_seconds: float | None = None
) -> list[float]:
    """Sorted seconds of up to REPEATS calls; on a GPU with a cold cache, by events.

    What is to be tuned is tuned in the warm-up, and never inside the clock. Nor is Python: a GPU
    waits before each call for as long as its launches took to be queued.
    """
    limit = MOST_SECONDS[device] if most_seconds is None else most_seconds
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    wait = min(1.5 * (time.perf_counter() - began), LONGEST_WAIT)
    found: list[float] = []
    with untimed_launches():
        began = time.perf_counter()
        # Larger than any L2 cache, so that a repeat does not find its inputs there.
        flush = torch.empty(2**28, dtype=torch.uint8, device=device) if device == "cuda" else None
        while len(found) < 3 or (len(found) < REPEATS and time.perf_counter() - began < limit):
            if flush is None:
                start = time.perf_counter()
                work()
                found.append(time.perf_counter() - start)
            else:
                first = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
                second = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
                flush.zero_()
                torch.cuda._sleep(int(wait * CYCLES_PER_SECOND))  # type: ignore[no-untyped-call]
                first.record()
                work()
                second.record()
                torch.cuda.synchronize()
                found.append(first.elapsed_time(second) / 1000)
    return sorted(found)


def timed(work: Callable[[], object], device: str) -> dict[str, Any]:
    """Median, 10th and 90th percentile in milliseconds; on a GPU the bytes beyond those before."""
    peak: dict[str, int] = {}
    if device == "cuda":
        work()  # what is tuned once needs more
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        peak = {"peak_bytes": torch.cuda.max_memory_allocated() - before}
    found = times(work, device)
    ninth = statistics.quantiles(found, n=10, method="inclusive")
    return {
        "median_ms": 1000 * statistics.median(found),
        "low_ms": 1000 * ninth[0],
        "high_ms": 1000 * ninth[-1],
        "repeats": len(found),
        **peak,
    }
