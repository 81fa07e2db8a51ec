"""Check, then time, every operator on every backend of a device.

    python -m mendel.kernels.bench --device cuda --out benchmarks/results/kernels-h100.json
    python -m mendel.kernels.bench --table

Needs torch, and Triton for its backend. Every backend and peer is first compared with the
definition at an odd length, outputs, state and gradients; one that differs is not timed. The checks
of a GPU run in several processes, which compile the kernels side by side; then one process takes
the times alone, the most important shapes first, until the minutes are over. What was left out is
named in the JSON. `--table` writes `benchmarks/RESULTS.md` from the JSON files beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import torch

from . import bench_floor
from .autotune import use_tuning
from .backend import HAS_TRITON, OPS, Backend, Unsupported
from .bench_cases import Case, differentiable, upstream
from .bench_jobs import DTYPES, MAIN, Job, OutOfTime, checks, failure, jobs
from .bench_processes import device_is_lost
from .bench_table import RESULTS, write_table
from .bench_timing import timed

CHECK_SHARE = 0.45
"""Of the minutes, at most, for the checks."""
WORKERS = 14
SAVE_SECONDS = 10.0
"""Between two writings of the results, which a machine may cut off."""
RED = ("differs", "failed")
"""How a refusal begins that is a fault and not a limit."""


def measure(
    job: Job, checked: dict[str, Any], device: str, ceilings: dict[str, float]
) -> dict[str, Any]:
    """A row of the results."""
    case = job.case
    row: dict[str, Any] = {**case.facts(), "backend": job.backend, **checked}
    if "refused" in row:
        return row
    try:
        call, inputs = job.call(device), case.inputs(device)
        with torch.no_grad():
            outputs = call(**inputs)
            # Of the outputs' dtypes before the clock: a cast would move as much as a norm does.
            grads = [d.to(o.dtype) for d, o in zip(upstream(outputs), outputs, strict=True)]
            del outputs
            row["forward"] = timed(lambda: call(**inputs), device)
        least = row["floor"] = bench_floor.floor(case)
        parts = ["forward"]
        if case.tokens > 1:
            leaves = differentiable(inputs)
            wanted = [t for t in leaves.values() if t is not None and t.requires_grad]

            def both() -> None:
                outputs = call(**leaves)
                torch.autograd.grad(outputs, wanted, grads, allow_unused=True)

            row["both"] = timed(both, device)
            parts.append("both")
        row["share"] = {
            part: 1000
            * bench_floor.seconds(part, least, ceilings, row["dtype"])
            / row[part]["median_ms"]
            for part in parts
        }
    except Unsupported as error:
        return {**row, "refused": str(error)}
    except torch.OutOfMemoryError:
        return {**row, "refused": "out of memory"}
    except Exception as error:
        return {**row, "refused": failure(error)}
    return row


def line(row: dict[str, Any]) -> str:
    name = row["op"] + (f" {row['form']}" if row["form"] else "")
    shape = "x".join(str(row[axis]) for axis in ("batch", "tokens", "heads", "width"))
    text = f"{name:28} {shape:14} {row['dtype']:9} {row['backend']:22}"
    if "refused" in row:
        return f"{text} not timed: {row['refused']}"
    for part in ("forward", "both"):
        if part in row:
            found = row[part]
            text += f" {found['median_ms']:9.3f} ({found['low_ms']:.3f}-{found['high_ms']:.3f}) ms"
            text += f" {row['share'][part]:6.1%}"
    return f"{text}  error {max(row['errors'].values()):.0e}"


@contextmanager
def until(deadline: float) -> Iterator[None]:
    """Raise OutOfTime inside the block once the deadline is over, every second: a library may
    take it for its own."""

    def stop(*_: object) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(0.001, deadline - time.monotonic()), 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def conditions(device: str, tune: bool) -> dict[str, Any]:
    """The device and the versions that a figure holds for."""
    found: dict[str, Any] = {
        "device": cpu_name(),
        "kind": device,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": None,
        "tuning": "on" if tune else "stored",
    }
    if HAS_TRITON:
        from importlib.metadata import version

        found["triton"] = version("triton")
    if device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        found |= {"device": torch.cuda.get_device_name(), "capability": f"{major}.{minor}"}
    return found


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for row in info.read_text().splitlines():
            if row.startswith("model name"):
                return row.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def main() -> None:
    given = _arguments()
    if given.table:
        print(f"written: {write_table(RESULTS)}")
        return
    began = time.monotonic()
    deadline = began + 60 * given.minutes
    device: str = given.device
    about = conditions(device, given.tune)
    rows = _rows_before(given.out, about) if given.resume else []
    done = {json.dumps([_facts(row), row["backend"]], sort_keys=True) for row in rows}
    wanted = [
        job for job in jobs(device) if given.op in (None, job.case.op) and job.key() not in done
    ]
    checked = checks(wanted, device, given.workers, began + CHECK_SHARE * (deadline - began))
    ceilings = bench_floor.measured_ceilings(device, DTYPES[device])
    record: dict[str, Any] = {
        "conditions": about,
        "ceilings": {
            "measured": ceilings,
            "stated": bench_floor.stated_ceilings(about["device"]),
        },
        "load": [round(os.getloadavg()[0], 1)],
        "rows": rows,
    }
    print("operator, BxTxHxK, dtype, backend, forward, share of the floor; forward and backward")
    left = wanted

    def save() -> None:
        record["skipped"] = [{**job.case.facts(), "backend": job.backend} for job in left]
        record["minutes"] = round((time.monotonic() - began) / 60, 2)
        record["load"][1:] = [round(os.getloadavg()[0], 1)]
        if given.out is not None:
            given.out.write_text(json.dumps(record, indent=1) + "\n")

    saved = time.monotonic()
    try:
        with until(deadline), use_tuning("on" if given.tune else None):
            for i, job in enumerate(wanted):
                left = wanted[i:]
                check_row = checked.get(job.check_key())
                if check_row is None:
                    check_row = {"refused": "its check did not end in time"}
                rows.append(measure(job, check_row, device, ceilings))
                print(line(rows[-1]), flush=True)
                if time.monotonic() - saved > SAVE_SECONDS:
                    saved = time.monotonic()
                    left = wanted[i + 1 :]
                    save()
                if device_is_lost():
                    left = wanted[i + 1 :]
                    print(f"the device is lost: {len(left)} left", file=sys.stderr)
                    break
            else:
                left = []
    except OutOfTime:
        print(f"out of time: {len(left)} left", file=sys.stderr)
    save()
    if any(_is_red(row) for row in rows):
        sys.exit("bench: a check is red, see the rows that were not timed")


def _is_red(row: dict[str, Any]) -> bool:
    """Whether one of our own backends failed; what another library does is its own affair."""
    ours = row["backend"] in get_args(Backend)
    return ours and str(row.get("refused", "")).startswith(RED)


def _facts(row: dict[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in Case.__dataclass_fields__}


def _rows_before(out: Path | None, about: dict[str, Any]) -> list[dict[str, Any]]:
    """What an earlier run under the same conditions has timed; what it has not is tried again."""
    if out is None or not out.exists():
        return []
    record = json.loads(out.read_text())
    if record["conditions"] != about:
        raise SystemExit(f"bench: --resume: {out} was taken under other conditions")
    return [row for row in record["rows"] if "refused" not in row]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m mendel.kernels.bench", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--device", choices=sorted(MAIN), default="cpu")
    parser.add_argument("--out", type=Path, help="write the results to this JSON file")
    parser.add_argument("--op", choices=sorted({*OPS, "attention"}), help="only this operator")
    parser.add_argument("--minutes", type=float, default=8.0, help="end within so many")
    parser.add_argument("--resume", action="store_true", help="keep what --out has timed")
    parser.add_argument("--tune", action="store_true", help="choose launches by time first")
    parser.add_argument(
        "--workers", type=int, help="processes that check (0: this one; the rule without a GPU)"
    )
    parser.add_argument("--table", action="store_true", help="write benchmarks/RESULTS.md and end")
    given = parser.parse_args()
    if given.workers is None:
        cores = os.cpu_count() or 1
        given.workers = 0 if given.device == "cpu" else max(1, min(WORKERS, cores - 2))
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device here")
    if given.out is not None and not given.out.parent.is_dir():
        parser.error(f"--out {given.out}: there is no folder {given.out.parent}")
    if given.resume and given.out is None:
        parser.error("--resume needs --out, the file to go on with")
    return given


if __name__ == "__main__":
    main()
