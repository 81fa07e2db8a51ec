"""A kernel compiled, or only laid out, for a chip that is not there.

As a launch would: PyTorch's allocations begin at multiples of 16 bytes, and widths are mostly
multiples of 16 too, which a launch tells the compiler. Loads are wider then, and those that are
wide enough go through shared memory ahead of their use: other registers, other memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

SHARED_KIB = {80: 163, 90: 227, 100: 227}
"""The shared memory that one program may take (CUDA programming guide, table of capabilities)."""
MATRIX_INSTRUCTION = {80: "mma.sync", 90: "wgmma", 100: "tcgen05.mma"}
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
"""Pointers to float32, of all modules and of one; most others are to the dtype of the inputs."""
OTHERS = {
    "scale": "fp32",
    "eps": "fp32",
    "z_weight": "fp32",
    "targets_ptr": "*i64",
    "back_ptr": "*i64",
}
NOT_FLOAT32 = {
    "short_conv": ("state", "dx"),
    "rms_norm": ("dx", "g"),
    "selective_scan": ("dx",),
    "diagonal_scan": ("db",),
    "complex_scan": ("db",),
}

TILE_PRODUCT = {80: "#ttg.nvidia_mma<", 90: "ttng.warp_group_dot", 100: "ttng.tc_gen5_mma"}
"""How a product on tensor cores looks before it is an instruction."""


@dataclass(frozen=True)
class Laid:
    """A kernel laid out for a chip: shared bytes of a program, and how it multiplies tiles."""

    shared: int
    products: tuple[str, ...]

    @property
    def matrix(self) -> bool:
        return bool(self.products)


def parsed(
    module: str,
    function: str,
    constants: dict[str, Any],
    inputs: str = "bf16",
    *,
    aligned: bool = True,
) -> Any:
    """A kernel's source with the types of its arguments, `constants` being no arguments.

    Not `aligned` are a view's pointers and odd widths.
    """
    from triton.compiler import ASTSource

    kernel = getattr(import_module(f"mendel.kernels.triton_{module}"), function)
    wide = {*FLOAT32[""], *FLOAT32.get(module, ())} - {*NOT_FLOAT32.get(module, ())}
    types = {**OTHERS, **{f"{pointer}_ptr": "*fp32" for pointer in wide}}
    signature = {
        argument: "constexpr"
        if argument in constants
        else types.get(argument, f"*{inputs}" if argument.endswith("_ptr") else "i32")
        for argument in kernel.arg_names
    }
    sixteen = [
        parameter.num
        for parameter in kernel.params
        if signature[parameter.name].startswith("*")
        or (signature[parameter.name] == "i32" and not parameter.do_not_specialize)
    ]
    attributes = {(place,): [["tt.divisibility", 16]] for place in sixteen if aligned}
    return ASTSource(kernel, signature, constexprs=constants, attrs=attributes)


def compiled(source: Any, options: dict[str, int], capability: int) -> Any:
    """To machine code."""
    import triton
    from triton.backends.compiler import GPUTarget

    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def laid_out(source: Any, options: dict[str, int], capability: int) -> Laid:
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
    made = source.make_ir(target, chosen, functions, modules, context)
    steps: dict[str, Any] = {}
    backend.add_stages(steps, chosen, source.language)
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
        made.get_int_attr("ttg.shared"),
        tuple(word for word in TILE_PRODUCT.values() if word in text),
    )
