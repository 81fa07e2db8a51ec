"""What every benchmark shares: the environment beside the figures, the JSON file, the table."""

from __future__ import annotations

import json
import os
import platform
import statistics
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"


def environment() -> dict[str, Any]:
    """The device and the versions that a figure holds for."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [
            r.split(":")[1].strip() for r in info.read_text().splitlines() if "model name" in r
        ]
        cpu = models[0] if models else cpu
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "optuna", "ray", "numpy", "moocore")},
    }


def spread(values: list[float]) -> dict[str, float]:
    """The median, the 10th and the 90th percentile, and the number of values."""
    ordered = sorted(values)
    cuts = (
        statistics.quantiles(ordered, n=10, method="inclusive") if len(ordered) > 1 else ordered * 9
    )
    return {"median": statistics.median(ordered), "p10": cuts[0], "p90": cuts[-1], "n": len(values)}


def save(name: str, question: str, rows: list[dict[str, Any]], **notes: Any) -> None:
    """Write `results/<name>.json` and print the rows as a table."""
    RESULTS.mkdir(exist_ok=True)
    record = {"question": question, "environment": environment(), **notes, "rows": rows}
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    table = Table(title=question)
    for column in rows[0]:
        table.add_column(column)
    for row in rows:
        table.add_row(*(_cell(value) for value in row.values()))
    Console().print(table)
    print(f"written: {path}")


def _cell(value: Any) -> str:
    if isinstance(value, dict) and "median" in value:
        return f"{value['median']:.4g} ({value['p10']:.4g} to {value['p90']:.4g}, n={value['n']})"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
