"""Numbers as people read them: counts, bytes, durations, one way everywhere."""

from __future__ import annotations

import math

_STEPS = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "K"))


def count_text(value: float) -> str:
    """A count in at most six characters: `0`, `912`, `16.4K`, `1.23M`, `5.0G`."""
    if not math.isfinite(value):
        return str(value)
    magnitude = abs(value)
    for step, letter in _STEPS:
        # 999,950 would round to 1000K.
        if magnitude >= step * 0.99995:
            scaled = value / step
            digits = 2 if abs(scaled) < 9.995 else 1 if abs(scaled) < 99.95 else 0
            return f"{scaled:.{digits}f}{letter}"
    return f"{value:.0f}" if magnitude >= 100 or value == int(value) else f"{value:.3g}"


def ratio_text(value: float) -> str:
    """A ratio in three digits or all before the point: `0.087`, `1.00`, `9.68`, `315`, `12,400`."""
    return f"{value:#.3g}" if value < 99.95 else f"{value:,.0f}"


def bytes_text(value: float) -> str:
    """Bytes in binary units: `0 B`, `512 B`, `32 KiB`, `1.5 MiB`."""
    if not math.isfinite(value):
        return str(value)
    scaled = float(value)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(scaled) < 1023.5 or unit == "TiB":
            break
        scaled /= 1024
    if scaled == int(scaled) or abs(scaled) >= 100:
        return f"{scaled:.0f} {unit}"
    return f"{scaled:.{2 if abs(scaled) < 9.995 else 1}f} {unit}"


def duration_text(seconds: float) -> str:
    """A duration: `0.4 s`, `12 s`, `3 min 20 s`, `2 h 05 min`."""
    if seconds < 9.95:
        return f"{max(seconds, 0):.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def value_text(value: float, unit: str = "") -> str:
    """A value in the unit that its objective names."""
    if unit == "bytes":
        return bytes_text(value)
    if unit == "s":
        return _small_seconds(value)
    if not math.isfinite(value):
        return str(value)
    if unit in ("", "score", "fraction", "0..1") and abs(value) <= 1:
        return f"{value:.3f}"
    if abs(value) >= 1000:
        return count_text(value)
    return f"{value:.4g}"


def _small_seconds(value: float) -> str:
    if not math.isfinite(value):
        return str(value)
    if value >= 1:
        return duration_text(value)
    return f"{value * 1e3:.3g} ms" if value >= 1e-3 else f"{value * 1e6:.3g} µs"
