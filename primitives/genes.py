"""Reading checked genes in the type that their axis has."""

from __future__ import annotations

from collections.abc import Mapping

from .base import Gene, GeneError, show_gene


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


def only(genes: Mapping[str, Gene], name: str, allowed: Mapping[str, Gene]) -> None:
    """Raises GeneError where a gene differs from the only value that goes with `name`'s.

    `allowed` maps axes to that value. For a form of a primitive that does not know an axis.
    """
    for axis, value in allowed.items():
        if genes[axis] != value:
            raise GeneError(
                f"{name}={show_gene(genes[name])} goes with {axis}={show_gene(value)}, "
                f"not {show_gene(genes[axis])}"
            )
