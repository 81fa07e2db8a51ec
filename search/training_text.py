"""What training would cost, as the commands take it from options and print it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from ..genome.devices import COMMON, DEVICES, Device, find_device
from ..genome.genome import Genome
from ..genome.quantity import read_count
from ..genome.training_cost import RATIO, UTILISATION, TrainingCost, training_cost
from .terminal import Mistake, say_wrapped
from .units import count_text, duration_text

Tokens = Annotated[
    str | None, typer.Option(help="Tokens of training, such as 300B; without it --ratio says.")
]
Ratio = Annotated[
    float | None,
    typer.Option(help=f"Tokens of training per active parameter; {RATIO:g} as in Chinchilla."),
]
Mfu = Annotated[
    float | None,
    typer.Option("--mfu", help=f"Share of a device's peak that training reaches; {UTILISATION:g}."),
]
DeviceName = Annotated[
    str | None,
    typer.Option("--device", help="Hours on this one: " + ", ".join(d.name for d in DEVICES) + "."),
]


@dataclass(frozen=True)
class TrainingPlan:
    """How much training is counted, and on what."""

    tokens: float | None
    ratio: float
    utilisation: float
    devices: tuple[Device, ...]
    """Those that are named in the terminal."""

    def cost(self, genome: Genome, context: int) -> TrainingCost:
        """What it costs for a genome, at sequences of `context` tokens."""
        return training_cost(genome, context, tokens=self.tokens, ratio=self.ratio)


def read_size(option: str, text: str) -> float:
    """A number of parameters or tokens, such as 1.3B. Raises Mistake."""
    try:
        value = read_count(text)
    except ValueError as error:
        raise Mistake(f"{option} is {error}") from None
    if value < 1:
        raise Mistake(f"{option} is at least 1, not {text!r}")
    return value


def training_plan(
    tokens: str | None, ratio: float | None, mfu: float | None, device: str | None
) -> TrainingPlan:
    """The plan of the options. Raises Mistake, or DeviceError for an unknown device."""
    if tokens is not None and ratio is not None:
        raise Mistake("--tokens and --ratio say the same; give one of them")
    if ratio is not None and not (math.isfinite(ratio) and ratio > 0):
        raise Mistake(f"--ratio is a number of tokens above 0, not {ratio:g}")
    if mfu is not None and not 0 < mfu <= 1:
        raise Mistake(f"--mfu is a share above 0 and at most 1, not {mfu:g}")
    return TrainingPlan(
        None if tokens is None else read_size("--tokens", tokens),
        RATIO if ratio is None else ratio,
        UTILISATION if mfu is None else mfu,
        tuple(find_device(name) for name in (COMMON if device is None else [device])),
    )


def training_dict(genome: Genome, context: int, plan: TrainingPlan) -> dict[str, Any]:
    """What --json prints under `training`; its keys are fixed."""
    counted = plan.cost(genome, context)
    return {
        "tokens": counted.tokens,
        "tokens_per_active_param": counted.ratio,
        "context": counted.context,
        "flops_per_token": counted.flops_per_token,
        "head_flops_per_token": counted.head_flops,
        "flops": counted.flops,
        "memory_bytes": counted.memory,
        "utilisation": plan.utilisation,
        "devices": [
            {
                "device": device.name,
                "peak_flops": device.peak,
                "memory_bytes": device.memory,
                "source": device.source,
                "hours": counted.seconds(device, plan.utilisation) / 3600,
                "fits": counted.fits(device),
            }
            for device in DEVICES
        ],
    }


def print_training(genome: Genome, context: int, plan: TrainingPlan) -> None:
    """Three sentences to stdout."""
    for line in training_lines(plan.cost(genome, context), plan):
        say_wrapped(line, "dim")


def training_lines(counted: TrainingCost, plan: TrainingPlan) -> list[str]:
    """The three sentences."""
    times = " · ".join(
        f"{device.name} {_time_text(counted.seconds(device, plan.utilisation))}"
        for device in plan.devices
    )
    tokens, ratio = count_text(counted.tokens), _ratio_text(counted.ratio)
    memory = _memory_text(counted.memory)
    lengths = f"in sequences of {counted.context:,}"
    flops, fit = _power_text(counted.flops), _fit_text(counted, plan.devices)
    return [
        f"Training on {tokens} tokens, {ratio} per active parameter, {lengths}: {flops} FLOPs.",
        f"One device at {plan.utilisation:.0%} of its peak: {times}.",
        f"Weights, gradients and AdamW take {memory}, activations more: {fit}.",
    ]


def _fit_text(counted: TrainingCost, devices: tuple[Device, ...]) -> str:
    fit = [device.name for device in devices if counted.fits(device)]
    if fit:
        few = [device.name for device in devices if device.name not in fit]
        return f"they fit on one {_either(fit)}" + (f", not on one {_either(few)}" if few else "")
    most = max(devices, key=lambda device: device.memory)
    return f"at least {math.ceil(counted.memory / most.memory):,} {most.name}s"


def _either(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"


def _ratio_text(ratio: float) -> str:
    return f"{ratio:.3g}" if ratio < 1000 else f"{ratio:,.0f}"


def _power_text(value: float) -> str:
    """Operations in powers of ten: `4.5e20`."""
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def _time_text(seconds: float) -> str:
    """Up to ten hours as every duration from a second on, then whole hours."""
    hours = seconds / 3600
    if seconds < 1:
        return "under 1 s"
    if hours < 10:
        return duration_text(seconds)
    return f"{hours:,.0f} h" if hours < 99_999.5 else f"{count_text(hours)} h"


def _memory_text(value: float) -> str:
    """Bytes in the units in which devices are sold."""
    for step, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if value >= step:
            return f"{value / step:.3g} {unit}"
    return f"{value / 1e3:.3g} KB"
