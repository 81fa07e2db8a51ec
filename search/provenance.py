"""Where a run's results come from: versions, commit, device, seed, data."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..proxies.tasks import make_task
from .evaluate import resolve_device
from .measure import device_name
from .store import RunError, difference, now
from .study import Study

PACKAGES = ("mendel", "torch", "triton", "optuna", "ray", "numpy", "moocore", "pydantic")


def versions() -> dict[str, str]:
    """Of Python and of every package that a result depends on and that is installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """The commit of the source tree, with `+` where it has changes; None without git."""
    folder = Path(__file__).parent
    try:
        head = _git(folder, "rev-parse", "HEAD")
        changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return head + ("+" if changed else "")


def _git(folder: Path, *words: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=10, check=True
    )
    return done.stdout.strip()


def provenance(study: Study, earlier: dict[str, Any]) -> dict[str, Any]:
    """The content of provenance.json. `earlier` is that of the run's earlier lives, or empty; one
    entry is added to `lives`.

    Raises RunError where the data of a proxy is not what the run began with."""
    proxies = {k: make_task(p, study.search.seed).describe() for k, p in study.proxies.items()}
    if earlier and (changed := difference(earlier.get("proxies"), proxies, "proxies")) is not None:
        raise RunError(
            f"{study.folder}: the data has changed since the run began: {changed} differs; "
            "give the study a new name"
        )
    life = {
        "at": now(),
        "versions": versions(),
        "commit": commit(),
        "system": platform.platform(),
        "cpus": os.cpu_count(),
        "threads": study.workers.threads,
        "device": device_name(resolve_device(study.workers.device)),
    }
    first = earlier or {"seed": study.search.seed, "proxies": proxies, **life}
    return {**first, "lives": [*earlier.get("lives", []), life]}
