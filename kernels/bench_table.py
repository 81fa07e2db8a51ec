"""The page of results, `benchmarks/RESULTS.md`, made of the JSON files and of nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"

HEAD = """\
# Operators: checked, then timed

Made by `python -m mendel.kernels.bench --table` from `results/kernels-*.json`; not to be edited.
Every row passed its check against the definition first. Times are medians in milliseconds with the
10th and 90th percentiles. The share is the floor's time over the median: the floor is the bytes and
operations that the operator must at least move and multiply (`kernels/bench_floor.py`), at the
copy bandwidth and the rate of a large matrix product measured in the same run.
"""
NO_GPU = """
**No figure has been taken on a GPU yet.** What stands here says how the torch forms do on a CPU; of
the Triton kernels it says nothing.
"""
WARM = """
A CPU keeps small inputs in its caches from one repeat to the next, so that a share can pass 100 %.
"""
COLUMNS = (
    "| operator | B x T x H x K | dtype | backend | forward ms | share | forward + backward ms "
    "| share | peak MiB | error |\n"
    "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |\n"
)


def write_table(results: Path) -> Path:
    """Write the page of a folder of results and return its path."""
    path = results.parent / "RESULTS.md"
    path.write_text(page(results))
    return path


def page(results: Path) -> str:
    records = [json.loads(path.read_text()) for path in sorted(results.glob("kernels-*.json"))]
    text = HEAD
    if not any(record["conditions"]["kind"] == "cuda" for record in records):
        text += NO_GPU
    records.sort(key=lambda record: record["conditions"]["kind"] != "cuda")
    return text + "".join("\n" + "".join(_section(record)) for record in records)


def _section(record: dict[str, Any]) -> Iterator[str]:
    about, ceilings = record["conditions"], record["ceilings"]["measured"]
    yield f"## {about['device']}\n\n"
    versions = f"torch {about['torch']}, Triton {about['triton']}, Python {about['python']}"
    load = " to ".join(map(str, record["load"]))
    threads = f"{about['threads']} thread" + ("s" if about["threads"] != 1 else "")
    yield f"{versions}; {threads}; load of the machine {load}; {record['minutes']} minutes"
    yield f"; launches: {about['tuning']}.\n"
    rates = ", ".join(
        f"{rate / 1e12:.3g} TFLOP/s in {name[7:-6]}"
        for name, rate in ceilings.items()
        if name.startswith("matmul_")
    )
    yield f"Measured ceilings: copy {ceilings['copy_bytes_per_s'] / 1e9:.3g} GB/s, {rates}."
    stated = record["ceilings"]["stated"]
    if stated is not None:
        yield f" Stated by the maker: {stated['copy_bytes_per_s'] / 1e9:.4g} GB/s, "
        yield f"{stated['matmul_bfloat16_per_s'] / 1e12:.4g} TFLOP/s in bfloat16."
    yield "\n" + (WARM if about["kind"] == "cpu" else "") + "\n" + COLUMNS
    timed = [row for row in record["rows"] if "refused" not in row]
    yield from (_row(row) for row in timed)
    refused = [row for row in record["rows"] if "refused" in row]
    if refused:
        yield "\nNot timed:\n\n"
        yield from (
            f"- {_name(row)}, {_shape(row)}, {row['backend']}: {row['refused']}\n"
            for row in refused
        )
    if record["skipped"]:
        yield f"\nLeft out for want of time: {len(record['skipped'])} of "
        yield f"{len(record['skipped']) + len(record['rows'])} rows; the JSON names them.\n"


def _row(row: dict[str, Any]) -> str:
    cells = [_name(row), _shape(row), row["dtype"], row["backend"]]
    for part in ("forward", "both"):
        cells += [_time(row.get(part)), f"{row['share'][part]:.1%}" if part in row else ""]
    peak = max(row[part].get("peak_bytes", 0) for part in ("forward", "both") if part in row)
    cells += [f"{peak / 2**20:.0f}" if peak else "", f"{max(row['errors'].values()):.0e}"]
    return "| " + " | ".join(cells) + " |\n"


def _name(row: dict[str, Any]) -> str:
    return str(row["op"] + (f", {row['form']}" if row["form"] else ""))


def _shape(row: dict[str, Any]) -> str:
    shape = " x ".join(str(row[axis]) for axis in ("batch", "tokens", "heads", "width"))
    return shape + (f", {row['size']}" if row["size"] else "")


def _time(found: dict[str, Any] | None) -> str:
    if found is None:
        return ""
    return f"{found['median_ms']:.4g} ({found['low_ms']:.4g} to {found['high_ms']:.4g})"
