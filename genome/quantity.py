"""Numbers as people write them in a study: `400k`, `1.3B`, `64KiB`."""

from __future__ import annotations

import math
import re
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

_NUMBER = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?(?:[eE][+-]?[0-9]+)?)\s*([A-Za-z]*)\s*")
_COUNT_UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "b": 1e9, "t": 1e12}
_COUNT_UNITS |= {unit.upper(): factor for unit, factor in _COUNT_UNITS.items()}
_BYTE_UNITS = {
    "": 1.0,
    "B": 1.0,
    "k": 1e3,
    "kB": 1e3,
    "KB": 1e3,
    "M": 1e6,
    "MB": 1e6,
    "G": 1e9,
    "GB": 1e9,
    "TB": 1e12,
    "KiB": 2.0**10,
    "MiB": 2.0**20,
    "GiB": 2.0**30,
    "TiB": 2.0**40,
}


def _read(value: Any, units: dict[str, float], what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"{what}, not {value!r}")
    if isinstance(value, str):
        match = _NUMBER.fullmatch(value)
        if match is None or match.group(2) not in units:
            raise ValueError(f"{what}, not {value!r}")
        number = float(match.group(1)) * units[match.group(2)]
    else:
        number = float(value)
    if not math.isfinite(number) or number < 0:
        raise ValueError(f"{what}, not {value!r}")
    return number


def read_count(value: Any) -> float:
    """A number of parameters, operations or tokens: `400000`, `400k`, `1.3B` (k, M, B or G, T, in
    either case)."""
    return _read(value, _COUNT_UNITS, "a number of at least 0, such as 400000, 400k or 1.3B")


def read_bytes(value: Any) -> float:
    """A number of bytes: `65536`, `64KiB`, `1.3GB` (KiB, MiB, GiB are powers of 1024)."""
    return _read(value, _BYTE_UNITS, "a number of bytes, such as 65536, 64KiB or 1.3GB")


Count = Annotated[float, BeforeValidator(read_count)]
Bytes = Annotated[float, BeforeValidator(read_bytes)]
Share = Annotated[float, Field(ge=0, le=1, strict=True)]
Tokens = Annotated[int, Field(ge=1, le=1 << 30, strict=True)]
