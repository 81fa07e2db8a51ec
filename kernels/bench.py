"""Check, then time, every operator on every backend of a device.

    python -m mendel.kernels.bench --device cpu --out kernels.json

Needs torch, and Triton for its backend. Every backend is first compared with the definition at an
odd length, output, state and gradients; one that differs is not timed. Floors are what the operator
must at least move and multiply, whatever the kernel (the formulas stand at `floor`).
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .backend import OPS, Backend, Unsupported, backends, use_backend
from .delta_rule import delta_rule
from .diagonal_low_rank import diagonal_low_rank
from .diagonal_scan import diagonal_scan
from .matrix_state import matrix_state
from .preread import matrix_state_preread
from .short_conv import short_conv

FUNCTIONS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "matrix_state": matrix_state,
    "delta_rule": delta_rule,
    "diagonal_scan": diagonal_scan,
    "short_conv": short_conv,
    "preread": matrix_state_preread,
    "diagonal-low-rank": diagonal_low_rank,
}
"""By operator, or by the form that has a function of its own."""
FORMS: tuple[tuple[str, str | None], ...] = (
    *(("matrix_state", form) for form in ("none", "fixed", "scalar", "vector", "preread")),
    *(("delta_rule", form) for form in (None, "vector", "diagonal-low-rank")),
    ("diagonal_scan", None),
    ("short_conv", None),
)
TAPS = 4
CHUNK = 64

SHAPES = {
    "cpu": ((4, 128, 4, 32), (1, 512, 4, 64), (1, 1, 4, 64)),
    "cuda": (
        (8, 1024, 8, 64),
        (4, 2048, 16, 128),
        (4, 4096, 64, 128),
        (8, 2048, 32, 256),
        (2, 16384, 16, 128),
        (1, 8192, 96, 128),
        (1, 1, 16, 128),
        (64, 1, 16, 128),
    ),
}
"""(B, T, H, K = V); scans and convolutions take H * K channels. T = 1 is decoding with a state."""
DTYPES = {"cpu": (torch.float32,), "cuda": (torch.bfloat16, torch.float32)}
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""Of the check, relative: float32 sums in another order (and as three TF32 products on a GPU);
bfloat16 operands, 2**-9 each, in products of products."""
CHECKED_LENGTH = 193
REPEATS = 20
SECONDS = {"cpu": 0.4, "cuda": 2.0}
"""At most, per time that is taken."""


@dataclass(frozen=True)
class Case:
    """One operator at one shape: B sequences of T tokens, H heads of K keys and K values."""

    op: str
    form: str | None
    batch: int
    tokens: int
    heads: int
    width: int
    dtype: torch.dtype

    def inputs(self, device: str) -> dict[str, Tensor | None]:
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(device, self.dtype)

        def decay(*shape: int) -> Tensor:
            return (-torch.rand(shape, generator=generator) / 8).to(device)

        B, T, H, K = self.batch, self.tokens, self.heads, self.width
        started = T == 1
        if self.op == "diagonal_scan":
            state = normal(B, H * K).float() if started else None
            return {"log_a": decay(B, T, H * K), "b": normal(B, T, H * K), "state": state}
        if self.op == "short_conv":
            past = normal(B, H * K, TAPS - 1) if started else None
            return {"x": normal(B, T, H * K), "weight": normal(H * K, TAPS), "state": past}
        shapes = {"fixed": (H,), "scalar": (B, T, H), "vector": (B, T, H, K)}
        form = {"preread": "vector", "diagonal-low-rank": "vector", None: "scalar"}.get(
            self.form, self.form
        )
        given: dict[str, Tensor | None] = {
            "q": normal(B, T, H, K),
            "k": F.normalize(normal(B, T, H, K).float(), dim=-1).to(self.dtype),
            "v": normal(B, T, H, K),
            "log_decay": decay(*shapes[form]) if form in shapes else None,
            "state": normal(B, H, K, K).float() if started else None,
        }
        if self.form == "preread":
            given["bonus"] = normal(H, K)
        if self.form == "diagonal-low-rank":
            unit = F.normalize(normal(B, T, H, K).float(), dim=-1)
            given["a"] = -unit.to(self.dtype)
            rate = torch.rand((B, T, H, 1), generator=generator).to(device)
            given["b"] = (unit * rate).to(self.dtype)
        elif self.op == "delta_rule":
            given["beta"] = torch.rand((B, T, H), generator=generator).to(device)
        return given

    def floor(self) -> dict[str, float]:
        """Least FLOPs and bytes of the forward pass, and of forward and backward together.

        With e bytes per number and N tokens in all, chunks of C = 64 (at most T): the matrix state
        N H (4 K V + C (K + V)) and e N H (2 K + 2 V) + 4 N H, and for the decay of a key channel
        4 N H K more; the delta rule N H (6 K V + C (3 K + 2 V) + C^2 / 3) and 4 N H more for beta,
        diagonal plus low rank N H (8 K V + C (5 K + 4 V) + C^2 / 3) and 2 e N H K for a and b;
        the scan 2 N D and 3 e N D; the convolution 2 W N D and 2 e N D. The backward passes: twice
        the FLOPs (the delta rule 2.5 times) and e N H (4 K + 3 V), 5 e N D and 3 e N D bytes. A
        step moves its state, in float32, in and out.
        """
        e, N = self.dtype.itemsize, self.batch * self.tokens
        H, K, D = self.heads, self.width, self.heads * self.width
        C = min(CHUNK, self.tokens)
        if self.op == "diagonal_scan":
            flops, back_flops = 2.0 * N * D, 4.0 * N * D
            moved, back_moved = 3.0 * e * N * D, 5.0 * e * N * D
            state = 8.0 * self.batch * D
        elif self.op == "short_conv":
            flops, back_flops = 2.0 * TAPS * N * D, 4.0 * TAPS * N * D
            moved, back_moved = 2.0 * e * N * D, 3.0 * e * N * D
            state = 2.0 * e * self.batch * D * (TAPS - 1)
        else:
            per_channel = 4 * N * H * K
            decays = {"scalar": 4 * N * H, "none": 0, "fixed": 0}.get(
                self.form or "scalar", per_channel
            )
            if self.form == "diagonal-low-rank":
                flops = N * H * (8.0 * K * K + (9.0 * C * K + C * C / 3 if C > 1 else 0.0))
                back_flops, decays = 2.5 * flops, decays + 2 * e * N * H * K
            elif self.op == "delta_rule":
                flops = N * H * (6.0 * K * K + (5.0 * C * K + C * C / 3 if C > 1 else 0.0))
                back_flops, decays = 2.5 * flops, decays + 4 * N * H
            else:
                flops = N * H * (4.0 * K * K + (2.0 * C * K if C > 1 else 0.0))
                back_flops = 2.0 * flops
            moved = 4.0 * e * N * H * K + decays
            back_moved = 7.0 * e * N * H * K + 2 * decays
            state = 8.0 * self.batch * H * K * K
        if self.tokens == 1:
            moved += state
        return {
            "forward_flops": flops,
            "forward_bytes": moved,
            "both_flops": flops + back_flops,
            "both_bytes": moved + back_moved,
        }


def run(case: Case, inputs: dict[str, Tensor | None], backend: Backend) -> tuple[Tensor, Tensor]:
    with use_backend(backend):
        return FUNCTIONS[case.form if case.form in FUNCTIONS else case.op](**inputs)


def forward_and_backward(
    case: Case, inputs: dict[str, Tensor | None], backend: Backend, dout: Tensor
) -> dict[str, Tensor]:
    """Output, final state and the gradient of every input for the output's gradient `dout`."""
    leaves = {
        name: None if t is None else t.detach().requires_grad_() for name, t in inputs.items()
    }
    out, final = run(case, leaves, backend)
    torch.autograd.backward((out, final), (dout, torch.ones_like(final)))
    found = {"out": out.detach(), "final": final.detach()}
    for name, t in leaves.items():
        if t is not None and t.grad is not None:
            found["d" + name] = t.grad
    return found


def check(case: Case, backend: Backend, device: str) -> dict[str, float]:
    """Relative errors against the definition in float32, from the same rounded inputs."""
    small = replace(case, batch=1, heads=2, tokens=1 if case.tokens == 1 else CHECKED_LENGTH)
    inputs = small.inputs(device)
    exact = {name: None if t is None else t.float() for name, t in inputs.items()}
    dout = torch.randn_like(run(small, inputs, backend)[0])
    found = forward_and_backward(small, inputs, backend, dout)
    right = forward_and_backward(small, exact, "definition", dout.float())
    return {
        part: ((found[part].float() - right[part]).norm() / right[part].norm()).item()
        for part in right
    }


def times(work: Callable[[], object], device: str) -> list[float]:
    """Seconds of up to REPEATS calls after a warm-up; on a GPU with a cold cache, by events."""
    for _ in range(2):
        work()
    found: list[float] = []
    began = time.perf_counter()
    # Larger than any L2 cache, so that a repeat does not find its inputs there.
    flush = torch.empty(2**28, dtype=torch.uint8, device=device) if device == "cuda" else None
    while len(found) < 3 or (
        len(found) < REPEATS and time.perf_counter() - began < SECONDS[device]
    ):
        if flush is None:
            start = time.perf_counter()
            work()
            found.append(time.perf_counter() - start)
        else:
            flush.zero_()
            first = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            second = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            first.record()
            work()
            second.record()
            torch.cuda.synchronize()
            found.append(first.elapsed_time(second) / 1000)
    return sorted(found)


def spread(found: list[float]) -> dict[str, float]:
    """Median, 10th and 90th percentile, in milliseconds."""
    ninth = statistics.quantiles(found, n=10, method="inclusive")
    return {
        "median_ms": 1000 * statistics.median(found),
        "low_ms": 1000 * ninth[0],
        "high_ms": 1000 * ninth[-1],
        "repeats": len(found),
    }


def measure(case: Case, backend: Backend, device: str) -> dict[str, Any]:
    row: dict[str, Any] = {**asdict(case), "dtype": str(case.dtype)[6:], "backend": backend}
    try:
        row["errors"] = check(case, backend, device)
        if not all(error <= TOLERANCE[case.dtype] for error in row["errors"].values()):
            return {**row, "refused": "differs from the definition"}
        inputs = case.inputs(device)
        with torch.no_grad():
            dout = torch.randn_like(run(case, inputs, backend)[0])
            forward = spread(times(lambda: run(case, inputs, backend), device))
        row |= {"forward": forward, "floor": case.floor()}
        if case.tokens > 1:
            both = times(lambda: forward_and_backward(case, inputs, backend, dout), device)
            row["both"] = spread(both)
    except Unsupported as error:
        return {**row, "refused": str(error)}
    except torch.OutOfMemoryError:
        return {**row, "refused": "out of memory"}
    return row


def cases(device: str) -> Iterator[tuple[Case, Backend]]:
    for shape in SHAPES[device]:
        for dtype in DTYPES[device]:
            for op, form in FORMS:
                for backend in backends(op, form):
                    # No kernel runs on a CPU; on a GPU a loop over 16384 tokens says nothing.
                    if backend == ("triton" if device == "cpu" else "definition"):
                        continue
                    yield Case(op, form, *shape, dtype), backend


def line(row: dict[str, Any]) -> str:
    name = row["op"] + (f" {row['form']}" if row["form"] else "")
    shape = "x".join(str(row[axis]) for axis in ("batch", "tokens", "heads", "width"))
    text = f"{name:20} {shape:16} {row['dtype']:9} {row['backend']:11}"
    if "refused" in row:
        return f"{text} not timed: {row['refused']}"
    worst = max(row["errors"].values())
    for part in ("forward", "both"):
        if part in row:
            found, seconds = row[part], row[part]["median_ms"] / 1000
            text += f" {found['median_ms']:9.3f} ({found['low_ms']:.3f}-{found['high_ms']:.3f}) ms"
            text += f" {row['floor'][part + '_bytes'] / seconds / 1e9:7.1f} GB/s"
            text += f" {row['floor'][part + '_flops'] / seconds / 1e9:8.1f} GFLOP/s"
    return f"{text}  error {worst:.0e}"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m mendel.kernels.bench", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--device", choices=sorted(SHAPES), default="cpu")
    parser.add_argument("--out", type=Path, help="write the results to this JSON file")
    parser.add_argument("--op", choices=OPS, help="only this operator")
    given = parser.parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device here")
    if given.out is not None and not given.out.parent.is_dir():
        parser.error(f"--out {given.out}: there is no folder {given.out.parent}")
    conditions = {
        "device": torch.cuda.get_device_name() if given.device == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "floor": "GB/s and GFLOP/s are the floor's bytes and operations over the median time",
    }
    print("operator, BxTxHxK, dtype, backend, forward, then forward and backward")
    rows = []
    for case, backend in cases(given.device):
        if given.op in (None, case.op):
            rows.append(measure(case, backend, given.device))
            print(line(rows[-1]), flush=True)
    if given.out is not None:
        given.out.write_text(json.dumps({"conditions": conditions, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
