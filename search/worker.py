"""What happens to one job on whichever worker it lands: limits around it, failures named."""

from __future__ import annotations

import gc
import importlib
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as functional

from ..proxies.train import Diverged, TimeLimit
from .records import FULL_DISK, Failure
from .units import bytes_text, duration_text

if sys.platform != "win32":
    import resource

Payload = dict[str, Any]
"""A job as JSON; `evaluate` says which keys it reads."""

STARTS = "starts"
"""A file in a trial's folder: one line `rung kind` for each time that a worker began."""


@dataclass(frozen=True)
class Limits:
    """Of one job. `seconds`: looked at between training steps, enforced a little later."""

    seconds: float | None = None
    memory: int | None = None
    """Bytes beside what the worker holds already."""

    @property
    def hard_seconds(self) -> float | None:
        """When a job that does not look at the clock is ended by force."""
        return None if self.seconds is None else self.seconds + min(5.0, self.seconds)


class _Hang(BaseException):
    """The alarm of a serial job. No Exception, so that a candidate's handlers let it through."""


def find(dotted: str) -> Callable[[Payload], dict[str, Any]]:
    """The function at `module:name`. Raises ImportError or AttributeError."""
    module, _, name = dotted.partition(":")
    function: Callable[[Payload], dict[str, Any]] = getattr(importlib.import_module(module), name)
    return function


def run_job(evaluate: str, payload: Payload, limits: Limits, *, alarm: bool) -> dict[str, Any]:
    """Run `evaluate(payload)` and return `{"content": ...}` or `{"failure": ...}`; never raises
    for what the candidate does. The payload gets `deadline`, a reading of `time.monotonic()`.

    `alarm` ends Python code that hangs by a signal; the main thread of a serial executor has no
    driver that could end it otherwise."""
    folder = Path(payload["folder"])
    began = time.monotonic()
    deadline = None if limits.seconds is None else began + limits.seconds
    try:
        with (folder / STARTS).open("a", encoding="utf-8") as handle:
            handle.write(f"{payload['rung']} {payload['kind']}\n")
        with _alarm(limits.hard_seconds if alarm else None), memory_limit(limits.memory):
            return {"content": find(evaluate)({**payload, "deadline": deadline})}
    except _Hang:
        failure = _late(limits)
    except TimeLimit as error:
        failure = Failure("timeout", f"{error}; the limit is {duration_text(limits.seconds or 0)}")
    except Diverged as error:
        failure = Failure("diverged", str(error))
    except KeyboardInterrupt:
        # In process this is the user; workers do not get it.
        raise
    except BaseException as error:
        # Also SystemExit: a candidate that leaves must not end the driver or the worker.
        failure = _classified(error, limits)
    # Frames of the traceback hold the candidate's tensors until here.
    gc.collect()
    return {"failure": asdict(failure)}


def warm_up(evaluate: str) -> None:
    """Load the evaluation and what a first training step loads, seconds of imports, so that no
    candidate's time pays for them."""
    find(evaluate)
    weight = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = torch.optim.AdamW([weight], fused=True)
    loss = functional.cross_entropy(weight, torch.zeros(2, dtype=torch.int64))
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()


def _late(limits: Limits) -> Failure:
    return Failure(
        "timeout", f"it hung: no step ended within {duration_text(limits.hard_seconds or 0)}"
    )


def hung(limits: Limits) -> Failure:
    """The failure of a job that the driver had to end with its worker."""
    return _late(limits)


def _classified(error: BaseException, limits: Limits) -> Failure:
    detail = "".join(traceback.format_exception(error))[-8000:]
    first = " ".join(str(error).split("\n", 1)[0].split())[:300]
    out_of_memory = isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )
    if out_of_memory:
        limit = f"the limit of {bytes_text(limits.memory)}" if limits.memory else "the memory"
        return Failure("memory", f"it needs more than {limit}: {first or 'MemoryError'}", detail)
    if isinstance(error, OSError) and error.errno in FULL_DISK:
        return Failure("disk", str(error.filename or ""), detail)
    return Failure("error", f"{type(error).__name__}: {first}", detail)


@contextmanager
def _alarm(seconds: float | None) -> Iterator[None]:
    if (
        seconds is None
        or not hasattr(signal, "setitimer")
        or threading.current_thread() is not threading.main_thread()
    ):
        yield
        return

    def ring(number: int, frame: FrameType | None) -> None:
        raise _Hang

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def memory_limit(limit: int | None) -> Iterator[None]:
    """Let the process allocate `limit` bytes more than it has, so that an oversized candidate gets
    an error and not the whole machine.

    Linux: the address space is bounded. A CUDA device: torch's share of its memory is; the address
    space is not, because CUDA reserves far more of it than it uses. Elsewhere there is no limit.
    """
    if limit is None:
        yield
    elif torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        held, total = torch.cuda.memory_reserved(), torch.cuda.mem_get_info()[1]
        torch.cuda.set_per_process_memory_fraction(min(1.0, (held + limit) / total))
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
    elif sys.platform == "linux":
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        wanted = _address_space() + limit
        bound = min(b for b in (wanted, soft, hard) if b != resource.RLIM_INFINITY)
        resource.setrlimit(resource.RLIMIT_AS, (bound, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    else:
        yield


def _address_space() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    return pages * resource.getpagesize()


def starts(folder: Path, rung: int, kind: str) -> int:
    """How often a worker began that job of the trial."""
    try:
        lines = (folder / STARTS).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return 0
    return lines.count(f"{rung} {kind}")


def forget_starts(folder: Path) -> None:
    """Count the starts of that trial's jobs anew."""
    (folder / STARTS).unlink(missing_ok=True)


def failure_of(answer: Mapping[str, Any]) -> Failure | None:
    """The failure in what `run_job` returned."""
    return Failure(**answer["failure"]) if "failure" in answer else None
