"""The words that help after a typing mistake."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: str, names: Iterable[str]) -> str:
    """`; did you mean a or b?` for a mistyped name, or an empty string."""
    close = difflib.get_close_matches(name, list(names), n=2, cutoff=0.6)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def unknown(sentence: str, name: str, names: Iterable[str], allowed: str) -> str:
    """A sentence about a mistyped name, then the nearest names, then the list of what is allowed,
    which comes last because it may be long."""
    close = nearest(name, names)
    return (
        f"{sentence}{close} {allowed[0].upper()}{allowed[1:]}"
        if close
        else f"{sentence}; {allowed}"
    )
