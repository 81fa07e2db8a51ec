"""Reading checked genes in the type that their axis has."""

from __future__ import annotations

from collections.abc import Mapping

from .base import Gene


def whole(genes: Mapping[str, Gene], name: str) -> int:
    """The value of an axis of whole numbers."""
    value = genes[name]
    assert isinstance(value, int)
    assert not isinstance(value, bool)
    return value


def number(genes: Mapping[str, Gene], name: str) -> float:
    """The value of an axis of numbers."""
    value = genes[name]
    assert isinstance(value, int | float)
    return float(value)


def flag(genes: Mapping[str, Gene], name: str) -> bool:
    """The value of a yes-or-no axis."""
    value = genes[name]
    assert isinstance(value, bool)
    return value


def choice(genes: Mapping[str, Gene], name: str) -> str:
    """The value of an axis of names."""
    value = genes[name]
    assert isinstance(value, str)
    return value
