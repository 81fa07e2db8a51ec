"""The times that the bench takes, in order of weight, and their checks side by side."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from .backend import Backend, Unsupported, backends
from .bench_cases import FORMS, STATELESS, TOLERANCE, Call, Case, check, function_of, pinned
from .bench_peers import peers
from .bench_processes import side_by_side

MAIN = {"cpu": (4, 128, 4, 32), "cuda": (4, 2048, 16, 128)}
"""(B, T, H, K = V) at which everything is timed, peers and all dtypes included."""
LONGER = {
    "cpu": ((1, 512, 4, 64),),
    "cuda": (
        (4, 4096, 64, 128),
        (2, 16384, 16, 128),
        (1, 8192, 96, 128),
        (8, 2048, 32, 256),
        (8, 1024, 8, 64),
    ),
}
DECODED = {"cpu": (1, 16), "cuda": (1, 4, 16, 64, 256)}
"""Sequences that decode one token each, at the heads of `MAIN`."""
SIZES = {
    "cpu": {"linear_cross_entropy": 8192, "selective_scan": 16, "moe_permute": 4},
    "cuda": {"linear_cross_entropy": 131072, "selective_scan": 16, "moe_permute": 8},
}
DTYPES = {"cpu": (torch.float32,), "cuda": (torch.bfloat16, torch.float32)}


class OutOfTime(BaseException):
    """The minutes are over. No Exception: compilers turn those into errors of a kernel."""


@dataclass(frozen=True)
class Job:
    """One time to be taken: a case on a backend, or on a peer."""

    case: Case
    backend: str
    peer: bool = False

    def key(self) -> str:
        return json.dumps([self.case.facts(), self.backend], sort_keys=True)

    def check_key(self) -> str:
        """Jobs that differ only in size share a check."""
        return json.dumps([self.case.small().facts(), self.backend], sort_keys=True)

    def call(self, device: str) -> Call:
        if self.peer:
            return next(p for p in peers(self.case, device) if p.name == self.backend).make()
        return pinned(function_of(self.case), as_backend(self.backend))


def as_backend(name: str) -> Backend:
    """One of `Backend`'s names."""
    return name  # type: ignore[return-value]


def jobs(device: str) -> Iterator[Job]:
    """All jobs, the most important first.

    The main shape in the device's first dtype, with the peers that need no compiler; decoding;
    longer shapes; the main shape in other dtypes; what torch compiles, for long, before a time.
    """
    sizes, main = SIZES[device], MAIN[device]
    first, *others = DTYPES[device]
    own: Backend = "triton" if device == "cuda" else "chunked"
    compiled = []

    def case(op: str, form: str | None, shape: tuple[int, ...], dtype: torch.dtype) -> Case:
        return Case(op, form, shape[0], shape[1], shape[2], shape[3], dtype, sizes.get(op, 0))

    for op, form in (*FORMS, ("attention", None)):
        at = case(op, form, main, first)
        if op != "attention":
            yield from (Job(at, b) for b in _backends(op, form, device))
        for peer in peers(at, device):
            if peer.compiles:
                compiled.append(Job(at, peer.name, peer=True))
            else:
                yield Job(at, peer.name, peer=True)
    for op, form in FORMS:
        if op not in STATELESS:
            for batch in DECODED[device]:
                at = case(op, form, (batch, 1, *main[2:]), first)
                yield from (Job(at, b) for b in _backends(op, form, device))
    for shape in LONGER[device]:
        for op, form in FORMS:
            if own in _backends(op, form, device):
                yield Job(case(op, form, shape, first), own)
        at = case("attention", None, shape, first)
        yield from (Job(at, p.name, peer=True) for p in peers(at, device) if not p.compiles)
    for dtype in others:
        for op, form in FORMS:
            yield from (Job(case(op, form, main, dtype), b) for b in _backends(op, form, device))
    # FlexAttention, of one product, before whole operators.
    yield from sorted(compiled, key=lambda job: job.case.op != "attention")


def _backends(op: str, form: str | None, device: str) -> tuple[str, ...]:
    """No kernel runs on a CPU; on a GPU a loop over thousands of tokens says nothing."""
    skipped = "triton" if device == "cpu" else "definition"
    return tuple(b for b in reversed(backends(op, form)) if b != skipped)


def check_job(job: Job, device: str) -> dict[str, Any]:
    """`errors`, and `refused` where the job is not to be timed."""
    try:
        errors = check(job.case, job.call(device), device)
    except Unsupported as error:
        return {"refused": str(error)}
    except Exception as error:
        # Whatever a compiler, a device or another library raises: a row, and not the end.
        return {"refused": failure(error)}
    found: dict[str, Any] = {"errors": errors}
    if not all(error <= TOLERANCE[job.case.dtype] for error in errors.values()):
        found["refused"] = "differs from the definition"
    return found


def _check_remote(facts: dict[str, Any], backend: str, peer: bool, device: str) -> dict[str, Any]:
    """`check_job` in a process of its own."""
    torch.set_num_threads(1)
    return check_job(Job(Case.of(facts), backend, peer), device)


def failure(error: Exception) -> str:
    """An error in one line: its kind, and the last line of what it says."""
    said = str(error).strip().splitlines()
    return f"failed: {type(error).__name__}: {said[-1][:200] if said else ''}"


def checks(
    wanted: list[Job], device: str, workers: int, deadline: float
) -> dict[str, dict[str, Any]]:
    """The check of every job by `check_key`, begun in the order of `wanted`; what the deadline cuts
    off has none."""
    first: dict[str, Job] = {}
    for job in wanted:
        first.setdefault(job.check_key(), job)
    found: dict[str, dict[str, Any]] = {}
    if workers == 0:
        for key, job in first.items():
            if time.monotonic() > deadline:
                break
            found[key] = check_job(job, device)
        return found
    given = {key: (job.case.facts(), job.backend, job.peer, device) for key, job in first.items()}
    return dict(
        side_by_side(
            _check_remote, given, workers, deadline,
            ended=lambda _, why: {"refused": f"failed: {why}"},
        )
    )  # fmt: skip
