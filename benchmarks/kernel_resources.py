"""What does every kernel take of a chip in its default launch? Read off machine code for sm_90.

    PYTHONPATH=benchmarks:tests python benchmarks/kernel_resources.py

Needs no GPU, and takes no time: registers, spilled bytes and shared memory are the compiler's and
assembler's, in bfloat16, for heads of 64, 128 and 256 and for 4096 channels. Instructions are
counted as they stand in the code, not as often as they run.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from compiled import compiled
from compiled_launches import KERNELS, WIDTH, source
from machine_code import usage
from record import save

from mendel.kernels.launches import CHOICES

CAPABILITY = 90
WIDTHS = (64, WIDTH, 256)


def row(name: str, i: int, width: int | None) -> dict[str, Any]:
    """One kernel; `width` is None where it has no heads."""
    _, function, _ = KERNELS[name][i]
    config = CHOICES[name].configs[0]
    made, options = source(name, i, config, width=width or WIDTH)
    found = compiled(made, options, CAPABILITY)
    taken, warps, shared = usage(found.asm["cubin"]), options["num_warps"], found.metadata.shared
    return {
        "kernel": f"{name} {function}",
        "K = V": width or "",
        "launch": str(config),
        "warps": warps,
        "registers": taken.registers,
        "stored": taken.stored,
        "loaded": taken.loaded,
        "stack": taken.stack,
        "shared": shared,
        "warps per scheduler": taken.warps_per_scheduler(warps, shared),
        "instructions": taken.instructions,
        **taken.counts,
    }


def main() -> None:
    rows = []
    for name, kernels in KERNELS.items():
        for i, (_, _, constants) in enumerate(kernels):
            widths = WIDTHS if WIDTH in constants.values() else (None,)
            rows += [row(name, i, width) for width in widths]
            print(rows[-1], flush=True)
    save(
        f"kernel_resources-sm{CAPABILITY}",
        "What does every kernel take of a chip in its default launch?",
        rows,
        triton=version("triton"),
        capability=CAPABILITY,
        dtype="bfloat16",
    )


if __name__ == "__main__":
    main()
