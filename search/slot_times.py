"""The time that every slot of a model takes within whole calls of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from ..genome.model import LanguageModel

REPEATS = 10


def slot_times(
    model: LanguageModel, call: Callable[[], object], device: torch.device
) -> list[float]:
    """Seconds of each slot in order (norm, operators, join), the median over repeats of `call`; of
    a slot that some tokens pass by the mean, because a call may leave it out.

    `call` runs the model once and has been warmed up. The clocks between the slots cost time
    themselves, so the sum says where a call's time goes and not how long it takes; embedding, head
    and the additions to the stream are outside.
    """
    readings: list[list[Any]] = []
    plain: Any = model._slot

    def timed(i: int, *rest: Any) -> Any:
        began = _now(device)
        out = plain(i, *rest)
        readings[-1].append((began, _now(device)))
        return out

    model._slot = timed  # type: ignore[method-assign, assignment]
    try:
        for _ in range(REPEATS):
            readings.append([])
            call()
    finally:
        del model._slot
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        seconds = [[a.elapsed_time(b) / 1e3 for a, b in row] for row in readings]
    else:
        seconds = [[b - a for a, b in row] for row in readings]
    found = torch.tensor(seconds, dtype=torch.float64)
    partly = torch.tensor([slot.tokens != 1 for slot in model.genome.slots])
    return torch.where(partly, found.mean(0), found.quantile(0.5, 0)).tolist()


def _now(device: torch.device) -> Any:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event
