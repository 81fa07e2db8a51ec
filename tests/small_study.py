"""A study that takes a second, and what two runs of it must have in common."""

import json
from pathlib import Path
from typing import Any

import yaml

from mendel.search.run import open_run

STUDY: dict[str, Any] = {
    "name": "small",
    "space": {
        "width": 16,
        "depth": [2, 4],
        "operators": {
            "gqa": {"heads": [2], "kv_heads": [1, 2]},
            "mamba2": {"heads": [2]},
            "swiglu": {"expansion": [1.0, 2.0]},
        },
    },
    "proxies": {
        "text": {"task": "byte-text", "steps": 6, "batch": 4, "length": 16, "test_bytes": 256}
    },
    "objectives": ["quality", {"cache_bytes": {"context": 64}}],
    "search": {"trials": 8, "population": 4, "rungs": [0.5, 1.0], "eta": 2},
    "baselines": ["transformer++"],
    "workers": {"executor": "serial", "device": "cpu"},
}


def write(folder: Path, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    text = folder / "text.txt"
    text.write_text("a small text about nothing in particular, said again. " * 100)
    data = json.loads(json.dumps(STUDY)) | {"runs": str(folder / "runs")}
    data["proxies"]["text"]["text"] = str(text)
    for dotted, value in changes.items():
        *parents, last = dotted.split("__")
        place = data
        for part in parents:
            place = place[part]
        place[last] = value
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


def story(folder: Path) -> list[tuple[Any, ...]]:
    """What must be equal between runs: everything but times."""
    return [
        (
            t.number,
            t.state,
            t.hash,
            t.parents,
            t.variation,
            [(r.rung, r.steps, r.scores, r.values, r.tokens) for r in t.rungs],
            t.failure and (t.failure.kind, t.failure.reason),
        )
        for t in open_run(folder).trials
    ]
