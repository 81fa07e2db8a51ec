"""What a compiled kernel takes of a chip, read off its machine code: registers, spills, products.

By the tools that Triton brings, so without a GPU and without CUDA's compiler.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

REGISTERS = 65536
WARPS = 64
PROGRAMS = 32
RESERVED = 1024
"""Of a multiprocessor of sm_90, and the shared bytes that it adds to every program (CUDA
programming guide, table of capabilities)."""
SHARED = 228 * 1024
SCHEDULERS = 4

SPILL = re.compile(r"\b(STL|LDL)((?:\.[A-Z]+)*)(?:\.(64|128))?\b")
COUNTED = {
    "wgmma": r"\b[HIQ]GMMA\b",
    "mma": r"\b[HI]MMA\b",
    "exp2": r"\bMUFU\.EX2\b",
    "shuffles": r"\bSHFL\b",
    "barriers": r"\bBAR\.SYNC\b",
}


@dataclass(frozen=True)
class Usage:
    """Of one program of a kernel; instructions as they stand in the code, not as often as run."""

    registers: int
    stack: int
    stored: int
    loaded: int
    instructions: int
    counts: dict[str, int]

    def warps_per_scheduler(self, warps: int, shared: int) -> float:
        """That a scheduler of sm_90 has to choose from, if there are programs enough."""
        # Registers are given to warps, 8 at a time to every thread.
        by_registers = REGISTERS // (-(-self.registers // 8) * 8 * 32 * warps)
        by_memory = SHARED // (shared + RESERVED)
        programs = min(by_registers, by_memory, WARPS // warps, PROGRAMS)
        return programs * warps / SCHEDULERS


def usage(cubin: bytes) -> Usage:
    """Of the one kernel in a cubin."""
    from triton.backends.nvidia import compiler

    tools = Path(compiler.__file__).parent / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        about = _said(tools / "cuobjdump", "-res-usage", file.name)
        code = _said(tools / "nvdisasm", "-c", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", about)
    if found is None:
        raise ValueError(f"cuobjdump does not say what the kernel takes: {about!r}")
    moved = {"STL": 0, "LDL": 0}
    for word, _, bits in SPILL.findall(code):
        moved[word] += int(bits or 32) // 8
    return Usage(
        registers=int(found[1]),
        stack=int(found[2]),
        stored=moved["STL"],
        loaded=moved["LDL"],
        instructions=len(re.findall(r"/\*[0-9a-f]{4,}\*/", code)),
        counts={name: len(re.findall(word, code)) for name, word in COUNTED.items()},
    )


def _said(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout
