"""The least work of an operator, and the ceilings of a device: what a time is a share of.

Floors are what an operator must at least multiply and move, whatever the kernel: every input read
once, every output written once. With e bytes per number, N tokens in all, D = H K channels and
chunks of C = 64 (at most T):

    matrix state            N H (4 K V + C (K + V))               e N H (2 K + 2 V)
    ... its decay                                                 4 N H, per channel 4 N H K
    delta rule              N H (6 K V + C (3 K + 2 V) + C^2 / 3) the same, and 4 N H for beta
    diagonal plus low rank  N H (8 K V + C (5 K + 4 V) + C^2 / 3) the same, and 2 e N H K for a, b
    diagonal scan           2 N D                                 3 e N D
    complex scan            8 N D                                 5 e N D
    selective scan          9 N D n                               e N (3 D + 2 n)
    convolution             2 W N D                               2 e N D
    norm with residual      4 N D                                 4 e N D
    linear cross-entropy    2 N D A                               e (N + A) D
    experts and back, k     2 N D k                               2 e N D (1 + k)
    causal attention        2 N T D                               4 e N D

The backward passes: twice the FLOPs (delta rules, attention and the selective scan 2.5 times), and
e N H (4 K + 3 V), 5 e N D, 8 e N D (complex scan), 3 e N D (convolution), 4 e N D (norm),
2 e N D + e A D (loss) bytes. A step moves its state, in float32, in and out.

The selective scan needs N D n exponentials too, and in the backward pass again, of which a
multiprocessor of an NVIDIA GPU makes 16 per clock (CUDA programming guide, arithmetic
instructions).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from importlib import import_module

import torch

from .bench_cases import CHUNK, TAPS, Case
from .bench_timing import times

STATED: dict[str, tuple[float, float]] = {
    "A100": (2.039e12, 312e12),
    "H100 PCIe": (2.0e12, 756e12),
    "H100": (3.35e12, 989e12),
    "H200": (4.8e12, 989e12),
    "B200": (8.0e12, 2250e12),
}
"""Bytes and dense bfloat16 operations per second by NVIDIA's data sheets (A100 80 GB SXM, H100 SXM
and PCIe, H200 SXM, B200 SXM), by what a device's name contains, the first that fits."""


def floor(case: Case) -> dict[str, float]:
    """Least FLOPs and bytes of the forward pass, and of forward and backward together."""
    e, N, D = case.dtype.itemsize, case.batch * case.tokens, case.channels
    state, moved_again = 0.0, 0.0
    if case.op == "diagonal_scan":
        flops, again = 2.0 * N * D, 2.0
        moved, moved_again, state = 3.0 * e * N * D, 5.0 * e * N * D, 8.0 * case.batch * D
    elif case.op == "complex_scan":
        flops, again = 8.0 * N * D, 2.0
        moved, moved_again, state = 5.0 * e * N * D, 8.0 * e * N * D, 16.0 * case.batch * D
    elif case.op == "selective_scan":
        flops, again = 9.0 * N * D * case.size, 2.5
        moved = e * N * (3.0 * D + 2 * case.size)
        moved_again, state = e * N * (5.0 * D + 4 * case.size), 8.0 * case.batch * D * case.size
    elif case.op == "short_conv":
        flops, again = 2.0 * TAPS * N * D, 2.0
        moved, moved_again = 2.0 * e * N * D, 3.0 * e * N * D
        state = 2.0 * e * case.batch * D * (TAPS - 1)
    elif case.op == "rms_norm":
        flops, again = 4.0 * N * D, 2.0
        moved = moved_again = 4.0 * e * N * D
    elif case.op == "linear_cross_entropy":
        flops, again = 2.0 * N * D * case.size, 2.0
        moved, moved_again = e * (N + case.size) * float(D), e * (2.0 * N + case.size) * D
    elif case.op == "moe_permute":
        flops, again = 2.0 * N * D * case.size, 2.0
        moved = moved_again = 2.0 * e * N * D * (1 + case.size)
    elif case.op == "attention":
        flops, again = 2.0 * N * case.tokens * D, 2.5
        moved, moved_again = 4.0 * e * N * D, 8.0 * e * N * D
    else:
        return _with_heads(case)
    least = _both(case, flops, again, moved, moved_again, state)
    if case.op == "selective_scan":
        exponentials = float(N * D * case.size)
        least |= {"forward_exps": exponentials, "both_exps": 2 * exponentials}
    return least


def _with_heads(case: Case) -> dict[str, float]:
    e, N, H, K = case.dtype.itemsize, case.batch * case.tokens, case.heads, case.width
    C = min(CHUNK, case.tokens)
    within = C > 1
    decays = {"scalar": 4 * N * H, "none": 0, "fixed": 0}.get(case.form or "scalar", 4 * N * H * K)
    again = 2.5
    if case.form == "diagonal-low-rank":
        flops = N * H * (8.0 * K * K + within * (9.0 * C * K + C * C / 3))
        decays += 2 * e * N * H * K
    elif case.op == "delta_rule":
        flops = N * H * (6.0 * K * K + within * (5.0 * C * K + C * C / 3))
        decays += 4 * N * H
    else:
        flops, again = N * H * (4.0 * K * K + within * (2.0 * C * K)), 2.0
    moved = 4.0 * e * N * H * K + decays
    moved_again = 7.0 * e * N * H * K + 2 * decays
    return _both(case, flops, again, moved, moved_again, 8.0 * case.batch * H * K * K)


def _both(
    case: Case, flops: float, again: float, moved: float, moved_again: float, state: float
) -> dict[str, float]:
    if case.tokens == 1:
        moved += state
    return {
        "forward_flops": flops,
        "forward_bytes": moved,
        "both_flops": flops * (1 + again),
        "both_bytes": moved + moved_again,
    }


def seconds(part: str, least: dict[str, float], ceilings: dict[str, float], dtype: str) -> float:
    """The floor's time: bytes, operations or exponentials, whatever takes longest."""
    found = max(
        least[part + "_bytes"] / ceilings["copy_bytes_per_s"],
        least[part + "_flops"] / ceilings[f"matmul_{dtype}_per_s"],
    )
    if "exps_per_s" in ceilings:
        found = max(found, least.get(part + "_exps", 0.0) / ceilings["exps_per_s"])
    return found


def measured_ceilings(device: str, dtypes: tuple[torch.dtype, ...]) -> dict[str, float]:
    """Bytes per second of a large copy, read and written, and operations of a large product.

    float32 is multiplied with TF32 allowed, the most that a GPU does with float32 numbers. The
    exponentials of a GPU are not measured, but 16 per clock and multiprocessor.
    """
    size = 2**30 if device == "cuda" else 2**26
    source = torch.ones(size, dtype=torch.uint8, device=device)
    to = torch.empty_like(source)
    found = {"copy_bytes_per_s": 2 * size / _median(lambda: to.copy_(source), device)}
    side = 8192 if device == "cuda" else 768
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        for dtype in dtypes:
            # Random and not zeros: a chip may multiply zeros faster.
            x, y = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
            took = _median(lambda x=x, y=y: x @ y, device)  # type: ignore[misc]
            found[f"matmul_{str(dtype)[6:]}_per_s"] = 2 * side**3 / took
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed
    if device == "cuda":
        about = torch.cuda.get_device_properties()
        found["exps_per_s"] = 16.0 * about.multi_processor_count * highest_clock()
    return found


def highest_clock() -> float:
    """Of the current GPU's multiprocessors, in Hz; torch's properties lost it with CUDA 13."""
    driver = import_module("triton.runtime").driver.active
    properties = driver.utils.get_device_properties(torch.cuda.current_device())
    return 1000.0 * float(properties["sm_clock_rate"])


def stated_ceilings(device_name: str) -> dict[str, float] | None:
    for name, (moved, flops) in STATED.items():
        if all(word in device_name for word in name.split()):
            return {"copy_bytes_per_s": moved, "matmul_bfloat16_per_s": flops}
    return None


def _median(work: Callable[[], object], device: str) -> float:
    return statistics.median(times(work, device, most_seconds=1.0))
