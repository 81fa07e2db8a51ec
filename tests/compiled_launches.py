"""Every kernel in the launches of `launches.py`, at K = V = 128 or 4096 channels, for a test."""

from __future__ import annotations

import json
import sys
import time
from importlib import import_module
from typing import Any

from compiled import SHARED_KIB, Laid, laid_out, parsed

from mendel.kernels.autotune import Config, rounded
from mendel.kernels.launches import CHOICES

WIDTH = 128
CHANNELS = 4096
HEADS: dict[str, Any] = {"K": WIDTH, "V": WIDTH, "C": 64}
DECAYED: dict[str, Any] = {**HEADS, "DECAY": True}
WALK: dict[str, Any] = {**DECAYED, "FULL_K": WIDTH, "START": True}
HALVES: dict[str, Any] = {**HEADS, "LEVELS": 6}
SOLVE: dict[str, Any] = {**DECAYED, "LEVELS": 6, "PRECISION": "tf32"}
LOW_RANK: dict[str, Any] = {**HALVES, "PRECISION": "tf32"}
CONV: dict[str, Any] = {"W": 4, "BIAS": True, "START": True, "SILU": True}
NORM: dict[str, Any] = {"GATE": True, "SILU": True, "FIRST": False}
KERNELS: dict[str, list[tuple[str, str, dict[str, Any]]]] = {
    "matrix_state.states": [
        ("matrix_state", "_states", {**DECAYED, "START": True, "REVERSE": True})
    ],
    "matrix_state.outputs": [("matrix_state", "_outputs", DECAYED)],
    "matrix_state.gradients": [("matrix_state", "_gradients", DECAYED)],
    "delta_rule.states": [("delta_rule", "_delta_states", WALK)],
    "delta_rule.gradients": [("delta_rule", "_delta_gradients", WALK)],
    "delta_solve.solve": [("delta_solve", "_solve", SOLVE)],
    "delta_solve.gradients": [("delta_solve", "_solve_gradients", SOLVE)],
    "vector_decay.decayed": [
        ("vector_decay", "_decayed", {"K": WIDTH, "C": 64, "END": False, "PRE": True})
    ],
    "vector_decay.states": [("vector_decay", "_states", {**HEADS, "START": True, "REVERSE": True})],
    "vector_decay.outputs": [("vector_decay", "_outputs", {**HALVES, "PRE": True, "READ": True})],
    "vector_decay.gradients": [
        ("vector_decay", "_gradients", {**HALVES, "PRE": True, "READ": True})
    ],
    "low_rank.states": [("low_rank", "_low_rank_states", {**HEADS, "FULL_K": WIDTH})],
    "low_rank.gradients": [("low_rank", "_low_rank_gradients", {**HEADS, "FULL_K": WIDTH})],
    "low_rank.solve": [("low_rank_solve", "_solve", LOW_RANK)],
    "low_rank.direct": [("low_rank", "_direct", HALVES)],
    "low_rank.solve_gradients": [("low_rank_solve", "_solve_gradients", LOW_RANK)],
    "diagonal_scan": [
        ("diagonal_scan", "_forward", {"FIXED": False}),
        ("diagonal_scan", "_backward", {"FIXED": False}),
    ],
    "complex_scan": [
        ("complex_scan", "_forward", {"FIXED": False, "TURN": True}),
        ("complex_scan", "_backward", {"FIXED": True, "TURN": True}),
    ],
    "selective_scan.ends": [("selective_scan", "_ends", {"REVERSE": False})],
    "selective_scan.forward": [("selective_scan", "_forward", {"CHUNK": 64})],
    "selective_scan.backward": [("selective_scan", "_backward", {"CHUNK": 64})],
    "short_conv.forward": [("short_conv", "_forward", CONV)],
    "short_conv.backward": [("short_conv", "_backward", {**CONV, "WALK": 8})],
    "rms_norm": [
        ("rms_norm", "_forward", {**NORM, "RESIDUAL": True}),
        ("rms_norm", "_backward", {**NORM, "CARRIED": True}),
    ],
    "step": [("step", "_step", {"T": 1, "K": WIDTH, "V": WIDTH, "FULL_K": WIDTH, "DECAY": 4})],
    "moe_permute": [
        ("moe_permute", "_gather_rows", {"K": 6}),
        ("moe_permute", "_spread_rows", {"K": 6, "FULL_K": 8}),
    ],
    "linear_cross_entropy": [("linear_cross_entropy", "_rows", {"GRADIENT": True})],
}
"""The kernels that a list is for, with what a launch passes beside its tiles."""
WITHOUT_PRODUCTS = (
    *("vector_decay.decayed", "diagonal_scan", "short_conv.forward", "short_conv.backward"),
    *("rms_norm", "step", "linear_cross_entropy", "complex_scan", "moe_permute"),
    *("selective_scan.ends", "selective_scan.forward", "selective_scan.backward"),
)
CHIPS = dict.fromkeys(
    (
        *("vector_decay.outputs", "vector_decay.gradients"),
        *("low_rank.solve", "low_rank.direct", "low_rank.solve_gradients", *WITHOUT_PRODUCTS),
    ),
    (80,),
)
"""The chips, for a test, of kernels that take long and of those that no chip lays out in a way of
its own, because they multiply no tiles: the one with the least memory. `main` takes all."""
SHORTER = ("vector_decay", "low_rank", "low_rank_solve")
"""Modules whose float32 tiles do not fit a chip in chunks of 64."""


def source(
    name: str,
    i: int,
    config: Config,
    *,
    width: int = WIDTH,
    inputs: str = "bf16",
    aligned: bool = True,
) -> tuple[Any, dict[str, int]]:
    """The i-th kernel of a list in one configuration, and its warps and stages.

    `width` is that of heads, where a kernel has heads.
    """
    module, function, constants = KERNELS[name][i]
    choices, heads = CHOICES[name], [side for side, size in constants.items() if size == WIDTH]
    limits = [max(16, rounded(width))] * len(choices.tiles)
    constants = {**constants, **dict.fromkeys(heads, width)}
    if "FULL_K" in heads:
        constants["FULL_K"] = max(16, rounded(width))
    if inputs == "fp32" and "PRECISION" in constants:
        constants["PRECISION"] = "tf32x3"
    if inputs == "fp32" and module in SHORTER and "C" in constants:
        constants |= {"C": 32, **({"LEVELS": 5} if "LEVELS" in constants else {})}
        limits[-1] = min(32, limits[-1]) if "LEVELS" in constants else limits[-1]
    launch = choices.constants(config.within(tuple(limits)) if heads else config)
    if module == "rms_norm":
        launch = import_module("mendel.kernels.triton_rms_norm").tile_of_rows(launch, CHANNELS)
    if module == "selective_scan":
        fit = import_module("mendel.kernels.triton_selective_scan").tile_of_states
        launch = fit(launch, name.partition(".")[2], CHANNELS, 16)
    options = {option: launch.pop(option) for option in ("num_warps", "num_stages")}
    made = parsed(module, function, {**constants, **launch}, inputs, aligned=aligned)
    return made, options


def lay_out(name: str, i: int, config: Config, capability: int, **given: Any) -> Laid:
    """The i-th kernel of a list in one configuration; `given` as `source` takes it."""
    return laid_out(*source(name, i, config, **given), capability)


def main() -> None:
    """Every configuration for every chip, a JSON line each."""
    only = sys.argv[1] if len(sys.argv) > 1 else ""
    for name in KERNELS:
        if not name.startswith(only):
            continue
        for i, (_, function, _) in enumerate(KERNELS[name]):
            for config in CHOICES[name].configs:
                for capability in SHARED_KIB:
                    began = time.monotonic()
                    found = lay_out(name, i, config, capability)
                    row = {"kernel": f"{name} {function}", "config": str(config), "sm": capability}
                    row |= {"shared_kib": round(found.shared / 1024, 1), "matrix": found.matrix}
                    print(json.dumps({**row, "s": round(time.monotonic() - began, 1)}), flush=True)


if __name__ == "__main__":
    main()
