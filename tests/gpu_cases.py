"""The operators at real sizes on a device, without pytest: `test_gpu.py` and a bare machine run it.

    python tests/gpu_cases.py --device cuda --out checks.json

Needs torch, and Triton on a GPU. A case gives its relative errors, or raises. On a CPU the same
bodies run at small sizes, where `chunked` stands for the kernels.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from poison import poisoned
from torch import Tensor

from mendel.kernels.autotune import folder, use_tuning
from mendel.kernels.backend import Backend, backends, use_backend
from mendel.kernels.bench_cases import (
    FORMS,
    STATELESS,
    TOLERANCE,
    Case,
    check,
    compared,
    forward_and_backward,
    function_of,
    pinned,
    relative_error,
    results,
    upstream,
)
from mendel.kernels.bench_processes import side_by_side
from mendel.kernels.matrix_state import matrix_state
from mendel.kernels.rms_norm import rms_norm
from mendel.primitives.channel import experts

Errors = dict[str, float]
LATE = "not done in time"
ALONE_SECONDS = {"cpu": 0.0, "cuda": 15.0}
"""Kept of a device's seconds for the cases that run alone."""


@dataclass(frozen=True)
class Sizes:
    """What a device can bear: of real training, of decoding, and beyond 2**31 numbers."""

    real: tuple[int, int, int, int]
    """(B, T, H, K) of a training step; an odd T, so that the last chunk is not full."""
    widths: tuple[int, ...]
    """K and V of heads, not only powers of two."""
    decoded: int
    """Sequences that decode at once."""
    alphabet: int
    rows: int
    """Rows of 4096 numbers, for offsets: on a GPU more than 2**31 numbers."""
    heads: int
    """Heads of `long_tokens` tokens and 128 keys, likewise."""
    long_tokens: int
    dtypes: tuple[torch.dtype, ...]


SIZES = {
    "cuda": Sizes(
        *((1, 2047, 16, 128), (16, 24, 64, 80, 128, 256), 256, 32768),
        *(2**19 + 100, 128, 131_137),
        (torch.float32, torch.bfloat16, torch.float16),
    ),
    "cpu": Sizes(
        *((2, 129, 2, 16), (16, 24), 4, 300, 100, 2, 257),
        (torch.float32, torch.bfloat16),
    ),
}


def kernel_of(device: str) -> Backend:
    return "triton" if device == "cuda" else "chunked"


def served(device: str) -> list[tuple[str, str | None]]:
    """The operators and forms that the device's backend has."""
    return [pair for pair in FORMS if kernel_of(device) in backends(*pair)]


def case_of(device: str, op: str, form: str | None, dtype: torch.dtype) -> Case:
    sizes = SIZES[device]
    size = {"linear_cross_entropy": sizes.alphabet, "selective_scan": 16, "moe_permute": 4}
    return Case(op, form, *sizes.real, dtype, size.get(op, 0))


def small(device: str, op: str, form: str | None, dtype: torch.dtype, width: int) -> Errors:
    """Against the definition, NaN in memory: chunks of two heads, and one token with a state."""
    case = replace(case_of(device, op, form, dtype), width=width)
    with poisoned():
        errors = check(case, kernel_of(device), device)
    if op not in STATELESS:
        decoded = check(replace(case, tokens=1), kernel_of(device), device)
        errors |= {f"step {part}": error for part, error in decoded.items()}
    return errors


def real(device: str, op: str, form: str | None, dtype: torch.dtype) -> Errors:
    """At a training step's size, against the chunked form in float64 of the same rounded inputs.

    Twice: what differs in a bit between two runs of the same is a race.
    """
    case = case_of(device, op, form, dtype)
    inputs = case.inputs(device)
    call = pinned(function_of(case), kernel_of(device))
    reference = pinned(function_of(case), "chunked")
    exact = {
        name: t.double() if t is not None and t.is_floating_point() else t
        for name, t in inputs.items()
    }
    with torch.no_grad():
        douts = upstream(call(**inputs))
    have = forward_and_backward(call, inputs, douts)
    again = forward_and_backward(call, inputs, douts)
    for part, value in have.items():
        if not torch.equal(value, again[part]):
            raise AssertionError(f"{part} differs between two runs: a race")
    right = forward_and_backward(reference, exact, douts)
    return compared(have, right)


def decoding(device: str, op: str, form: str | None, dtype: torch.dtype) -> Errors:
    """A token of many sequences without gradients: the kernel that decodes."""
    case = replace(case_of(device, op, form, dtype), batch=SIZES[device].decoded, tokens=1)
    inputs = case.inputs(device)
    exact = {name: None if t is None else t.float() for name, t in inputs.items()}
    with torch.no_grad():
        with poisoned():
            have = pinned(function_of(case), kernel_of(device))(**inputs)
        want = pinned(function_of(case), "definition")(**exact)
    return compared(results(have), results(want))


def far_rows(device: str) -> Errors:
    """The last rows of a norm over more than 2**31 numbers equal those rows alone."""
    x = torch.randn(SIZES[device].rows, 4096, device=device, dtype=torch.bfloat16)
    weight = torch.ones(4096, device=device, dtype=torch.bfloat16)
    with torch.no_grad(), use_backend(kernel_of(device)):
        whole, alone = rms_norm(x, weight)[0][-50:], rms_norm(x[-50:].clone(), weight)[0]
    return {"out": relative_error(whole, alone)}


def far_heads(device: str) -> Errors:
    """The last head of a matrix state over more than 2**31 numbers equals that head alone."""
    sizes = SIZES[device]
    q, k, v = (
        torch.randn(1, sizes.long_tokens, sizes.heads, 128, device=device, dtype=torch.bfloat16)
        for _ in range(3)
    )
    g = -torch.rand(1, sizes.long_tokens, sizes.heads, device=device) / 8
    with torch.no_grad(), use_backend(kernel_of(device)):
        whole = matrix_state(q, k, v, g)[0][:, :, -1:]
        last: list[Tensor] = [t[:, :, -1:].contiguous() for t in (q, k, v, g)]
        alone = matrix_state(*last)[0]
    return {"out": relative_error(whole, alone)}


def grouped(device: str, dtype: torch.dtype) -> Errors:
    """torch's grouped product around our rows, and its gradients, against one product per expert;
    an expert has no rows."""
    sizes = torch.tensor([70, 0, 1, 200, 29], device=device)
    ends = sizes.cumsum(0).to(torch.int32)
    draw = torch.Generator(device).manual_seed(0)
    rows, weight, dout = (
        torch.randn(*shape, generator=draw, device=device).to(dtype)
        for shape in ((300, 64), (5, 96, 64), (300, 96))
    )
    found = []
    for form, kind in (("grouped", dtype), ("segments", torch.float64)):
        leaves = [t.to(kind).requires_grad_() for t in (rows, weight)]
        out = experts._product(*leaves, ends, form)
        found.append((out.detach(), *torch.autograd.grad(out, leaves, dout.to(kind))))
    return {
        name: relative_error(have, want)
        for name, have, want in zip(("out", "drows", "dweight"), *found, strict=True)
    }


def tuning(device: str, dtype: torch.dtype) -> Errors:
    """With launches chosen by time: as correct, and on a GPU the choices are kept."""
    case = case_of(device, "matrix_state", "scalar", dtype)
    with tempfile.TemporaryDirectory() as kept, _environment("MENDEL_TUNING_FOLDER", kept):
        with use_tuning("on"):
            errors = check(case, kernel_of(device), device)
        if device == "cuda" and not list(folder().glob("*/*.json")):
            raise AssertionError("no choice was kept")
    return errors


class _environment:
    def __init__(self, name: str, value: str) -> None:
        from unittest.mock import patch

        self._patch: Any = patch.dict("os.environ", {name: value})

    def __enter__(self) -> None:
        self._patch.start()

    def __exit__(self, *_: object) -> None:
        self._patch.stop()


def cases(device: str) -> dict[str, tuple[torch.dtype, Callable[[], Errors]]]:
    """By name: the dtype, whose tolerance holds, and the body; in order of weight.

    First what models run, half precision at the width of most heads; then what the bench takes
    times of; other dtypes and widths, which share most code with these, last.
    """
    return dict(_cases(device))


def _cases(device: str) -> Iterator[tuple[str, tuple[torch.dtype, Callable[[], Errors]]]]:
    sizes = SIZES[device]
    main, half, exact = sizes.real[3], sizes.dtypes[1], sizes.dtypes[0]

    def every(
        kind: str, body: Callable[..., Errors], dtype: torch.dtype, *width: int
    ) -> Iterator[tuple[str, tuple[torch.dtype, Callable[[], Errors]]]]:
        for op, form in served(device):
            if op not in STATELESS or body is not decoding:
                name = " ".join(map(str, (kind, op, form, str(dtype)[6:], *width)))
                yield name, (dtype, partial(body, device, op, form, dtype, *width))

    yield from every("small", small, half, main)
    yield from every("real", real, half)
    yield from every("decoding", decoding, half)
    for dtype in sizes.dtypes:
        yield f"grouped product {str(dtype)[6:]}", (dtype, partial(grouped, device, dtype))
    yield "tuning", (half, partial(tuning, device, half))
    yield from every("small", small, exact, main)
    for width in sorted({*sizes.widths} - {main}, reverse=True):
        yield from every("small", small, half, width)
    yield from every("real", real, exact)
    for dtype in sizes.dtypes[2:]:
        yield from every("small", small, dtype, main)
    for dtype in (exact, *sizes.dtypes[2:]):
        if main != sizes.widths[0]:
            yield from every("small", small, dtype, sizes.widths[0])
    yield "far rows", (torch.float32, partial(far_rows, device))
    yield "far heads", (torch.float32, partial(far_heads, device))


def verdict(dtype: torch.dtype, errors: Errors) -> str | None:
    """What is wrong with the errors of a case; None for nothing."""
    wrong = {part: error for part, error in errors.items() if not error <= TOLERANCE[dtype]}
    return f"above {TOLERANCE[dtype]}: {wrong}" if wrong else None


def run(name: str, device: str) -> dict[str, Any]:
    """A case as a row: its errors and what is wrong."""
    torch.set_num_threads(1)
    began = time.monotonic()
    dtype, body = cases(device)[name]
    try:
        errors = body()
        row: dict[str, Any] = {"errors": errors, "wrong": verdict(dtype, errors)}
    except Exception as error:
        row = {"errors": {}, "wrong": f"{type(error).__name__}: {str(error)[-400:]}"}
    return {"case": name, **row, "seconds": round(time.monotonic() - began, 2)}


def _wrong(name: str, why: str) -> dict[str, Any]:
    """The row of a case that gave no errors."""
    return {"case": name, "errors": {}, "wrong": why, "seconds": None}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=sorted(SIZES), default="cpu")
    parser.add_argument("--out", type=Path, help="write the rows to this JSON file")
    parser.add_argument("--workers", type=int, default=max(1, min(14, (os.cpu_count() or 1) - 2)))
    parser.add_argument("--seconds", type=float, default=150.0)
    given = parser.parse_args()
    deadline = time.monotonic() + given.seconds
    rows: list[dict[str, Any]] = []

    def note(row: dict[str, Any]) -> None:
        rows.append(row)
        print(f"{row['case']:50} {row['wrong'] or 'ok'}", flush=True)
        # After each, because a machine may be cut off.
        if given.out is not None:
            given.out.write_text(json.dumps(rows, indent=1) + "\n")

    # What takes a large part of a device's memory runs when nothing else does.
    names = list(cases(given.device))
    alone = [name for name in names if name.startswith("far")]
    # Processes of their own: kernels compile side by side, and one that crashes spoils no other.
    found = side_by_side(
        run, {name: (name, given.device) for name in names if name not in alone},
        given.workers, deadline - ALONE_SECONDS[given.device], ended=_wrong,
    )  # fmt: skip
    for _, row in found:
        note(row)
    for name in alone:
        note(run(name, given.device))
    done = {row["case"] for row in rows}
    late = [name for name in names if name not in done]
    for name in late:
        note(_wrong(name, LATE))
    wrong = sum(row["wrong"] not in (None, LATE) for row in rows)
    print(f"{len(rows)} cases: {wrong} wrong, {len(late)} not done in time")
    sys.exit(wrong + len(late) > 0)


if __name__ == "__main__":
    main()
