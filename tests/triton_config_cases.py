"""Every configuration of the launches in Triton's interpreter: `test_autotune.py` runs it.

The i-th configuration of every list is pinned at once, for each i from 1; the defaults have their
own cases in `triton_cases.py` and `triton_layer_cases.py`. Prints one JSON object: per case
the largest relative error of the results and gradients against the definition.
"""

from __future__ import annotations

import json
import sys

import torch
import triton_cases
from interpreter import quick_calls
from triton_cases import error, inputs
from triton_layer_cases import (
    conv_inputs,
    expert_inputs,
    loss_inputs,
    mean_loss,
    norm_inputs,
    run,
    to_experts_and_back,
)
from triton_scan_cases import complex_, selective

from mendel.kernels import triton_delta_rule, triton_matrix_state, triton_vector_decay
from mendel.kernels.autotune import use_tuning
from mendel.kernels.backend import use_backend
from mendel.kernels.complex_scan import complex_scan
from mendel.kernels.launches import CHOICES
from mendel.kernels.rms_norm import rms_norm
from mendel.kernels.selective_scan import selective_scan
from mendel.kernels.short_conv import short_conv

CASES: dict[str, tuple[str, str, int]] = {
    "matrix_state": ("matrix_state", "scalar", 17),
    "vector_decay": ("matrix_state", "vector", 17),
    "delta_rule": ("delta_rule", "scalar", 17),
    "low_rank": ("low_rank", "vector", 17),
    "diagonal_scan": ("diagonal_scan", "scalar", 70),
    "step": ("delta_rule", "vector", 1),
}


def main() -> None:
    torch.set_num_threads(1)
    quick_calls()
    triton_cases.B = triton_cases.H = 1
    for module in (triton_matrix_state, triton_delta_rule, triton_vector_decay):
        module.CHUNK = 16
    triton_vector_decay.CHUNK_FLOAT32 = 16
    layers = {
        "short_conv": (short_conv, conv_inputs(70, 130, 3, True, True)),
        "rms_norm": (rms_norm, norm_inputs(9, 600, True, True)),
        "linear_cross_entropy": (mean_loss, loss_inputs(5, 8, 4500, False)),
        "complex_scan": (complex_scan, complex_(35, 40, True, "ffx")),
        "selective_scan": (selective_scan, selective(11, 40, True, "16")),
        "moe_permute": (to_experts_and_back, expert_inputs(3, 600, 2, False)),
    }
    found = {}
    for i in range(1, max(len(choices.configs) for choices in CHOICES.values())):
        pins = {
            name: choices.configs[i % len(choices.configs)] for name, choices in CHOICES.items()
        }
        with use_tuning(pins=pins):
            for name, (op, decay, tokens) in CASES.items():
                torch.manual_seed(tokens)
                given = inputs(op, decay, tokens, "tiled", True)
                if name == "step":
                    with torch.no_grad():
                        results = []
                        for backend in ("triton", "definition"):
                            with use_backend(backend):  # type: ignore[arg-type]
                                results.append(triton_cases.OPS[op](**given))
                    have, want = (dict(zip(("out", "final"), r, strict=True)) for r in results)
                else:
                    have = triton_cases.run(op, given, "triton")
                    want = triton_cases.run(op, given, "definition")
                found[f"{name}-{i}"] = max(error(have[part], want[part]) for part in want)
            for name, (function, given) in layers.items():
                have, want = (
                    run(function, given, {}, backend, torch.float32)
                    for backend in ("triton", "definition")
                )
                found[f"{name}-{i}"] = max(error(have[part], want[part]) for part in want)
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
