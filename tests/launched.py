"""Every launch that the operators make for a GPU, compiled for one that is not there.

    python tests/launched.py bfloat16 128           # dtype, width; `float32` likewise

The operators run with their gradients on tensors of the CPU, on which Triton is told that its
device is an H100: a launch sees what it is given, compiles it, and does nothing. So their results
mean nothing; but what a GPU would be asked to compile has been compiled, to the last constant.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

import torch
from compiled import SHARED_KIB

from mendel import kernels
from mendel.kernels.bench_cases import (
    FORMS,
    STATELESS,
    Case,
    forward_and_backward,
    function_of,
    pinned,
    upstream,
)

CAPABILITY = 90
SIZES = {"linear_cross_entropy": 1000, "selective_scan": 16, "moe_permute": 4}


class Device:
    """As much of a driver of Triton as a compilation asks."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", CAPABILITY, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_only(launches: list[str]) -> None:
    """From now on, for the whole process; the kernels' names go to `launches`."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    driver.set_active(Device())
    launch = JITFunction.run

    def run(self: Any, *given: Any, **options: Any) -> Any:
        found = launch(self, *given, **{**options, "warmup": True})
        name = f"{self.fn.__module__.rpartition('.')[2]}.{self.fn.__name__}"
        launches.append(name)
        if found.metadata.shared > SHARED_KIB[CAPABILITY] * 1024:
            raise AssertionError(f"{name} takes {found.metadata.shared} shared bytes")
        return found

    JITFunction.run = run
    for module in iter_modules(kernels.__path__):
        if module.name.startswith("triton_"):
            loaded = import_module(f"mendel.kernels.{module.name}")
            if hasattr(loaded, "check_device"):
                vars(loaded)["check_device"] = lambda op, tensor: None


def launched(case: Case) -> None:
    """As the bench does: without gradients and, but for decoding, with them."""
    call, inputs = pinned(function_of(case), "triton"), case.inputs("cpu")
    with torch.no_grad():
        outputs = call(**inputs)
    if case.tokens > 1:
        forward_and_backward(call, inputs, upstream(outputs))


def rows(dtype: torch.dtype, width: int) -> Iterator[dict[str, Any]]:
    """Of every form, training and decoding: the kernels launched, and what went wrong."""
    launches: list[str] = []
    compile_only(launches)
    for op, form in FORMS:
        training = Case(op, form, 1, 2047, 2, width, dtype, SIZES.get(op, 0))
        for case in (training, *([] if op in STATELESS else [replace(training, tokens=1)])):
            launches.clear()
            began = time.monotonic()
            row = {"op": op, "form": form, "tokens": case.tokens, "wrong": None}
            try:
                launched(case)
            except Exception as error:
                row["wrong"] = f"{type(error).__name__}: {str(error)[-400:]}"
            yield row | {
                "kernels": sorted(set(launches)),
                "seconds": round(time.monotonic() - began, 1),
            }


def main() -> None:
    torch.set_num_threads(1)
    wrong = False
    for row in rows(getattr(torch, sys.argv[1]), int(sys.argv[2])):
        print(json.dumps(row), flush=True)
        wrong |= row["wrong"] is not None
    sys.exit(wrong)


if __name__ == "__main__":
    main()
