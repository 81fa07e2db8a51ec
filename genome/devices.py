"""Accelerators: the dense bf16 peak and the memory that their makers state.

Peaks are those of matrix products with bf16 inputs, sums in float32 and no sparsity. Memory is as
sold, in units of 1e9 bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..primitives.nearest import nearest


class DeviceError(ValueError):
    """An unknown device: one line."""


@dataclass(frozen=True)
class Device:
    """One accelerator."""

    name: str
    peak: float
    """FLOP/s in bf16, dense."""
    memory: float
    """Bytes."""
    source: str


DEVICES = (
    Device("A100", 312e12, 80e9, "NVIDIA A100 80GB SXM data sheet"),
    Device(
        "H100", 989.4e12, 80e9, "NVIDIA H100 SXM data sheet (1,979 TFLOPS with sparsity, halved)"
    ),
    Device("H200", 989.4e12, 141e9, "NVIDIA H200 SXM data sheet (1,979 TFLOPS halved)"),
    Device("B200", 2250e12, 180e9, "NVIDIA HGX B200 data sheet (eight: 36 PFLOPS, sparse)"),
    Device("L40S", 362.05e12, 48e9, "NVIDIA L40S data sheet"),
    Device("RTX-3090", 71e12, 24e9, "NVIDIA GA102 white paper, appendix A"),
    Device("RTX-4090", 165.2e12, 24e9, "NVIDIA Ada white paper, appendix A"),
    Device("RTX-5090", 209.5e12, 32e9, "NVIDIA RTX Blackwell white paper, appendix A"),
    Device("MI250X", 383e12, 128e9, "AMD Instinct MI250X data sheet"),
    Device("MI300X", 1307.4e12, 192e9, "AMD Instinct MI300X data sheet"),
    Device("TPU-v4", 275e12, 32e9, "Google Cloud documentation, TPU v4"),
    Device("TPU-v5e", 197e12, 16e9, "Google Cloud documentation, TPU v5e"),
    Device("TPU-v5p", 459e12, 95e9, "Google Cloud documentation, TPU v5p"),
)

COMMON = ("A100", "H100", "RTX-4090")
"""Those that are named where nobody asks for one."""


def find_device(name: str) -> Device:
    """The device of a name, whatever its case. Raises DeviceError."""
    for device in DEVICES:
        if device.name.lower() == name.lower().replace(" ", "-"):
            return device
    names = [device.name for device in DEVICES]
    raise DeviceError(
        f"no device is named {name!r}; there are {', '.join(names)}{nearest(name, names)}"
    )
