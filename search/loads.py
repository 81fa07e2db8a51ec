"""What a trial's routers did: load, drops and entropy, slot by slot, as rows of a table."""

from __future__ import annotations

import re
from typing import Any

from .records import TrialRecord

COLUMNS = ["slot", "task", "parts", "most loaded", "least loaded", "dropped", "entropy"]
NUMBERS = COLUMNS[3:]
CAPTION = "Routers in the last training step of the last rung; 1.00 is an even share of the load"
_PLACE = re.compile(r"slot(\d+)(?:\.(\d+))?$")
"""A slot's own routers, or an operator in it."""


def load_rows(trial: TrialRecord) -> list[list[str]]:
    """One row per task and router; none where the trial has no router, or no rung.

    Of a slot that some tokens pass by, the share that its threshold lets in (as it does outside
    training) stands with the parts, beside the share that the design names and training takes.
    Loads are multiples of the mean, `dropped` is a share of the choices, the entropy of the
    router's scores is in nats. A cell is empty where an operator has no such number.
    """
    rows: list[list[str]] = []
    if not trial.rungs:
        return rows
    for task, said in trial.rungs[-1].statistics.items():
        if not isinstance(said, dict):
            continue
        for key, report in said.items():
            place = _PLACE.match(key)
            if place is not None and isinstance(report, dict):
                slot, branch = place.groups()
                name = slot if branch in (None, "0") else f"{slot}, branch {branch}"
                if "passed" in report:
                    meant = trial.genome["slots"][int(slot)]["tokens"]
                    entered = (
                        f"lets in {report['passed']:.1%} of the tokens; {meant:.1%} in training"
                    )
                    rows.append([name, task, entered, *[""] * len(NUMBERS)])
                nouns = ("branches", "") if branch is None else ("experts", "heads")
                rows += [[name, task, *cells] for cells in _cells(report, nouns)]
    return rows


def _cells(report: dict[str, Any], nouns: tuple[str, str]) -> list[list[str]]:
    found = []
    for key, noun in zip(("load", "head_load"), nouns, strict=True):
        loads = report.get(key)
        if not loads or not sum(loads):
            continue
        even = sum(loads) / len(loads)
        own = key == "load"
        dropped = f"{report['dropped']:.1%}" if own and "dropped" in report else ""
        entropy = f"{report['entropy']:.3f}" if own and "entropy" in report else ""
        most, least = (f"{pick(loads) / even:.2f}" for pick in (max, min))
        found.append([f"{len(loads)} {noun}", most, least, dropped, entropy])
    return found
