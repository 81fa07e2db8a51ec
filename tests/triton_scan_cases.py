"""The cases of `test_kernels_triton_scans.py`: diagonal, complex and selective scans, interpreted.

Run by it in a process of its own, as `triton_cases.py` is. Prints one JSON object: per case, the
relative error of the states or outputs, the last state and every gradient against the definition.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

import torch
from interpreter import quick_calls
from poison import poisoned
from torch import Tensor
from torch.nn import functional as F
from triton_layer_cases import error, run

from mendel.kernels import triton_selective_scan
from mendel.kernels.autotune import Config, use_tuning
from mendel.kernels.backend import use_backend
from mendel.kernels.complex_scan import complex_scan
from mendel.kernels.diagonal_scan import diagonal_scan
from mendel.kernels.selective_scan import selective_scan

B = 2
Given = dict[str, Tensor | None]
Call = Callable[..., tuple[Tensor, Tensor]]

ONLY = sys.argv[1] if len(sys.argv) > 1 else ""
"""Only the cases with this in their name."""


def decay(fixed: bool, tokens: int, width: int) -> Tensor:
    return -torch.rand((width,) if fixed else (B, tokens, width))


def diagonal(tokens: int, width: int, start: bool, kind: str) -> Given:
    log_a = decay(kind == "fixed", tokens, width)
    if kind == "forgetting":
        log_a = torch.where(torch.rand(log_a.shape) < 0.2, -1e4, -0.01)
    return {
        "log_a": log_a,
        "b": torch.randn(B, tokens, width),
        "state": torch.randn(B, width) if start else None,
    }


def complex_(tokens: int, width: int, start: bool, kind: str) -> Given:
    """`kind`: decay, then angle, per token (t) or fixed (f); then with a factor (x) or not."""
    angle = torch.randn((width,) if kind[1] == "f" else (B, tokens, width))
    return {
        "log_a": decay(kind[0] == "f", tokens, width),
        "angle": angle,
        "b": torch.randn(B, tokens, 2 * width),
        "state": torch.randn(B, 2 * width) if start else None,
        "factor": torch.randn(width, dtype=torch.complex128) if kind[2:] else None,
    }


def selective(tokens: int, width: int, start: bool, kind: str) -> Given:
    """`kind`: the states of a channel; a letter behind: forgetting tokens (l), spans (s)."""
    rows = int(kind.rstrip("ls"))
    dt = F.softplus(torch.randn(B, tokens, width))
    if kind.endswith("l"):
        dt = torch.where(torch.rand(dt.shape) < 0.2, 1e4, 0.01)
    return {
        "x": torch.randn(B, tokens, width),
        "dt": dt,
        "a": -torch.rand(width, rows) - 0.1,
        "b": torch.randn(B, tokens, rows),
        "c": torch.randn(B, tokens, rows),
        "state": torch.randn(B, width, rows) if start else None,
    }


OPS: dict[str, tuple[Call, Callable[[int, int, bool, str], Given]]] = {
    "diagonal_scan": (diagonal_scan, diagonal),
    "complex_scan": (complex_scan, complex_),
    "selective_scan": (selective_scan, selective),
}
HALF = ("diagonal_scan-37-6-True-fixed", "complex_scan-33-6-True-tf", "selective_scan-33-5-True-4")
"""Also in float16, of which the definition gets the rounded inputs and computes in float32."""
CASES = [
    ("diagonal_scan", 2, 6, True, "token"),
    ("diagonal_scan", 3, 6, False, "token"),
    ("diagonal_scan", 37, 6, True, "token"),
    ("diagonal_scan", 32, 6, False, "forgetting"),
    ("diagonal_scan", 1, 6, True, "fixed"),
    ("diagonal_scan", 37, 6, True, "fixed"),
    ("complex_scan", 1, 6, True, "ffx"),
    ("complex_scan", 2, 6, False, "ffx"),
    ("complex_scan", 3, 6, True, "tf"),
    ("complex_scan", 37, 6, True, "ffx"),
    ("complex_scan", 33, 6, True, "tf"),
    ("complex_scan", 32, 3, False, "ft"),
    ("complex_scan", 17, 6, True, "ttx"),
    ("selective_scan", 1, 6, True, "4"),
    ("selective_scan", 2, 6, True, "3"),
    ("selective_scan", 3, 6, False, "1"),
    ("selective_scan", 33, 5, True, "4"),
    ("selective_scan", 24, 10, False, "6l"),
    ("selective_scan", 37, 5, True, "3s"),
    ("selective_scan", 35, 3, False, "8s"),
]


def main() -> None:
    torch.set_num_threads(1)
    quick_calls()
    # Narrow tiles and short chunks, so that a narrow, short sequence has several of each.
    triton_selective_scan.CHUNK = 16
    launches = {
        "diagonal_scan": Config((8, 4), 1, 1),
        "complex_scan": Config((8, 4), 1, 1),
        "selective_scan.ends": Config((8, 16), 1, 1),
        "selective_scan.forward": Config((8, 16), 1, 1),
        "selective_scan.backward": Config((4, 16), 1, 1),
    }
    results: dict[str, dict[str, float]] = {}
    with use_tuning(pins=launches):
        for case in CASES:
            if ONLY in "-".join(map(str, case)):
                results |= measured(*case)
    json.dump(results, sys.stdout)


def measured(
    op: str, tokens: int, width: int, start: bool, kind: str
) -> dict[str, dict[str, float]]:
    """The errors of a case, in float32 and perhaps in float16."""
    triton_selective_scan.SHORTEST_SPAN = 16 if kind.endswith("s") else 256
    name = f"{op}-{tokens}-{width}-{start}-{kind}"
    call, inputs = OPS[op]
    torch.manual_seed(tokens)
    given = inputs(tokens, width, start, kind)
    results = {}
    for dtype in (torch.float32, torch.float16) if name in HALF else (torch.float32,):
        rounded = {
            n: t.to(dtype) if t is not None and t.is_floating_point() else t
            for n, t in given.items()
        }
        with poisoned():
            have = run(call, rounded, {}, "triton", dtype)
            with torch.no_grad(), use_backend("triton"):
                # Without gradients fewer states are kept.
                out, final = call(**rounded)
        want = run(call, rounded, {}, "definition", torch.float32)
        assert have.keys() == want.keys()
        key = name if dtype == torch.float32 else name + "-float16"
        results[key] = {part: error(have[part], want[part]) for part in want}
        results[key] |= {
            "out alone": error(out, want["out"]),
            "final alone": error(final, want["final"]),
        }
    return results


if __name__ == "__main__":
    main()
