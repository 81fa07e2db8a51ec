"""Kernels compiled for a chip that is not there, by the names and lists of `launches.py`."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from mendel.kernels.autotune import Config
from mendel.kernels.launches import CHOICES

SHARED_KIB = {80: 163, 90: 227, 100: 227}
"""The shared memory that one program may take (CUDA programming guide, table of capabilities)."""

HEADS: dict[str, Any] = {"K": 128, "V": 128, "C": 64}
DECAYED: dict[str, Any] = {**HEADS, "DECAY": True}
WALK: dict[str, Any] = {**DECAYED, "FULL_K": 128, "START": True}
HALVES: dict[str, Any] = {**HEADS, "LEVELS": 6}
SOLVE: dict[str, Any] = {**DECAYED, "LEVELS": 6, "PRECISION": "tf32"}
LOW_RANK: dict[str, Any] = {**HALVES, "PRECISION": "tf32"}
CONV: dict[str, Any] = {"W": 4, "BIAS": True, "START": True, "SILU": True}
NORM: dict[str, Any] = {"GATE": True, "SILU": True, "FIRST": False}
FLOAT32 = {
    "": (
        *("prefix", "start", "last", "dprefix", "dlast", "dstate", "dstart", "state", "new"),
        *("g", "log_decay", "kept", "bonus", "dq", "dk", "dg", "dbonus", "db", "dx", "inverse"),
        *("sums", "losses"),
    ),
    "delta_solve": ("beta", "dbeta"),
    "diagonal_scan": ("log_a", "dlog_a"),
    "complex_scan": ("log_a", "angle", "factor", "dlog_a", "dangle", "dfactor"),
    "selective_scan": (
        *("dt", "a", "states", "starts", "ahead", "ddt", "da", "dc", "written", "total"),
    ),
}
"""Pointers to float32, of all modules and of one; all others are to the dtype of the inputs."""
NOT_FLOAT32 = {
    "short_conv": ("state", "dx"),
    "rms_norm": ("dx", "g"),
    "selective_scan": ("dx",),
    "diagonal_scan": ("db",),
    "complex_scan": ("db",),
}

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
        ("vector_decay", "_decayed", {"K": 128, "C": 64, "END": False, "PRE": True})
    ],
    "vector_decay.states": [("vector_decay", "_states", {**HEADS, "START": True, "REVERSE": True})],
    "vector_decay.outputs": [("vector_decay", "_outputs", {**HALVES, "PRE": True, "READ": True})],
    "vector_decay.gradients": [
        ("vector_decay", "_gradients", {**HALVES, "PRE": True, "READ": True})
    ],
    "low_rank.states": [("low_rank", "_low_rank_states", {**HEADS, "FULL_K": 128})],
    "low_rank.gradients": [("low_rank", "_low_rank_gradients", {**HEADS, "FULL_K": 128})],
    "low_rank.solve": [("low_rank", "_solve", LOW_RANK)],
    "low_rank.direct": [("low_rank", "_direct", HALVES)],
    "low_rank.solve_gradients": [("low_rank", "_solve_gradients", LOW_RANK)],
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
    "step": [("step", "_step", {"T": 1, "K": 128, "V": 128, "FULL_K": 128, "DECAY": 4})],
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
TILE_PRODUCTS = ("#ttg.nvidia_mma<", "ttng.warp_group_dot", "ttng.tc_gen5_mma")
"""How a product on tensor cores looks before it is an instruction."""


@dataclass(frozen=True)
class Laid:
    """A kernel laid out for a chip: shared bytes of a program, and how it multiplies tiles."""

    shared: int
    products: tuple[str, ...]

    @property
    def matrix(self) -> bool:
        return bool(self.products)


def source(name: str, i: int, config: Config) -> tuple[Any, dict[str, int]]:
    """The i-th kernel of a list in one configuration, in bfloat16, and its warps and stages."""
    from triton.compiler import ASTSource

    module, function, constants = KERNELS[name][i]
    launch = CHOICES[name].constants(config)
    if module == "rms_norm":
        launch = import_module("mendel.kernels.triton_rms_norm").tile_of_rows(launch, 4096)
    if module == "selective_scan":
        fit = import_module("mendel.kernels.triton_selective_scan").tile_of_states
        launch = fit(launch, name.partition(".")[2], 4096, 16)
    options = {option: launch.pop(option) for option in ("num_warps", "num_stages")}
    constants = {**constants, **launch}
    kernel = getattr(import_module(f"mendel.kernels.triton_{module}"), function)
    wide = {*FLOAT32[""], *FLOAT32.get(module, ())} - {*NOT_FLOAT32.get(module, ())}
    types = {"scale": "fp32", "eps": "fp32", "z_weight": "fp32", "targets_ptr": "*i64"}
    types["back_ptr"] = "*i64"
    types |= {f"{pointer}_ptr": "*fp32" for pointer in wide}
    signature = {
        argument: "constexpr"
        if argument in constants
        else types.get(argument, "*bf16" if argument.endswith("_ptr") else "i32")
        for argument in kernel.arg_names
    }
    return ASTSource(kernel, signature, constexprs=constants), options


def compile_for(name: str, i: int, config: Config, capability: int) -> Any:
    """Compiled to machine code."""
    import triton
    from triton.backends.compiler import GPUTarget

    made, options = source(name, i, config)
    return triton.compile(made, target=GPUTarget("cuda", capability, 32), options=options)


def lay_out(name: str, i: int, config: Config, capability: int) -> Laid:
    """The i-th kernel of a list in one configuration."""
    return laid_out(*source(name, i, config), capability)


def laid_out(parsed: Any, options: dict[str, int], capability: int) -> Laid:
    """As far as a program's memory is known.

    Triton's own passes up to the allocation of shared memory: LLVM and the assembler, which come
    after it and take most of the time, change nothing of it. No public function of Triton 3.6 or
    3.7 stops there; this goes once one does.
    """
    from triton._C.libtriton import ir, nvidia, passes
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import get_ptx_version_from_options
    from triton.compiler.compiler import make_backend

    target = GPUTarget("cuda", capability, 32)
    backend = make_backend(target)
    chosen = backend.parse_options(options)
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    functions, modules = backend.get_codegen_implementation(chosen), backend.get_module_map()
    made = parsed.make_ir(target, chosen, functions, modules, context)
    steps: dict[str, Any] = {}
    backend.add_stages(steps, chosen, parsed.language)
    metadata: dict[str, Any] = {}
    for step in ("ttir", "ttgir"):
        made = steps[step](made, metadata)
    text = str(made)
    version = get_ptx_version_from_options(chosen, target.arch)
    manager = ir.pass_manager(made.context)
    passes.ttgpuir.add_combine_tensor_select_and_if(manager)
    passes.ttgpuir.add_allocate_warp_groups(manager)
    passes.convert.add_scf_to_cf(manager)
    passes.gluon.add_inliner(manager)
    nvidia.passes.ttgpuir.add_allocate_shared_memory_nv(manager, capability, version)
    manager.run(made, "lay_out")
    return Laid(
        made.get_int_attr("ttg.shared"), tuple(word for word in TILE_PRODUCTS if word in text)
    )


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
