"""Evaluations for the tests of search: quick ones, and ones that go wrong for real.

Workers find this file by PYTHONPATH; a study names a function of it as `chaos:name`.
"""

import errno
import hashlib
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

from mendel.search.evaluate import evaluate as real

Job = dict[str, Any]

DIVERGES, EXCEEDS, HANGS, RAISES, DIES, DIES_ONCE = 1, 2, 3, 4, 5, 6


def quick(job: Job) -> dict[str, Any]:
    """Scores that look random and depend on the genome and the rung alone."""
    if job["kind"] == "measure":
        keys = {"low": 1.0, "high": 1.0, "unit": "s", "repeats": 1, "conditions": {}}
        return {"measurements": {g["label"]: {"median": 1.0, **keys} for g in job["goals"]}}
    text = f"{sorted(job['genome'].items())}"
    digest = hashlib.sha256(text.encode()).digest()
    score = 0.5 * digest[0] / 255 + 0.1 * job["rung"] + 0.2 * digest[job["rung"] + 1] / 255
    return {
        "scores": {name: {"score": score} for name in job["proxies"]},
        "steps": job["steps"],
        "seconds": 0.0,
        "tokens": 1,
    }


def full_once(job: Job) -> dict[str, Any]:
    """The disk is full when the third trial is trained for the first time."""
    marker = Path(job["folder"]).parent.parent / "was-full"
    if job["trial"] == 3 and not marker.exists():
        marker.touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "checkpoint")
    return quick(job)


def logged(job: Job) -> dict[str, Any]:
    """The real evaluation; a line is kept of each that ended."""
    content = real(job)
    time.sleep(0.1)
    log = Path(job["folder"]).parent.parent / "evaluations"
    with log.open("a") as handle:
        handle.write(f"{job['trial']} {job['rung']}\n")
    return content


def faulty(job: Job) -> dict[str, Any]:
    """The real evaluation, but some trials go wrong."""
    trial = job["trial"]
    if trial == DIVERGES:
        return real({**job, "train": {**job["train"], "lr": 1e9, "clip": 1e9, "warmup": 0.0}})
    if trial == EXCEEDS:
        torch.zeros(1 << 40, dtype=torch.uint8)
    if trial == HANGS:
        while True:
            time.sleep(0.05)
    if trial == RAISES:
        raise ZeroDivisionError("the candidate raises\nand says more")
    return real(job)


def deadly(job: Job) -> dict[str, Any]:
    """Workers that are killed as the kernel would kill them: for a pool of actors only."""
    marker = Path(job["folder"]) / "died"
    if job["trial"] == DIES or (job["trial"] == DIES_ONCE and not marker.exists()):
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return faulty(job)


def leaving(job: Job) -> dict[str, Any]:
    """Trial 2 ends the program, as a script does that judges itself done."""
    if job["trial"] == 2:
        sys.exit("the candidate leaves")
    return quick(job)


def nonsense(job: Job) -> dict[str, Any]:
    """Not what an evaluation answers."""
    return {"scores": {name: {"score": float("nan")} for name in job["proxies"]}, "steps": {}}


def sleepy(job: Job) -> dict[str, Any]:
    """Who did it, after a while."""
    time.sleep(job["seconds"])
    return {"pid": os.getpid()}


def crashing(job: Job) -> dict[str, Any]:
    """Trial 2 takes its process with it."""
    if job["trial"] == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return quick(job)
