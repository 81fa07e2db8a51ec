"""What every command prints with: the console, JSON, tables, and a user's mistake in one line."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from rich.box import ASCII, SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

PLAIN_WIDTH = 80
"""Columns when the output is no terminal and COLUMNS is not set."""

_ASCII = str.maketrans(
    {
        "·": "-", "×": "x", "…": "~", "–": "-", "—": "-", "µ": "u", "→": ">", "←": "<",
        "★": "*", "◆": "+", "●": "o", "▸": ">", "±": "~", "≤": "<", "≥": ">", "━": "=", "╌": "-",
        "’": "'", "“": '"', "”": '"', "↑": "^", "↓": "v", "○": "o", "△": "^", "√": "y",
    }
)  # fmt: skip


class Mistake(ValueError):
    """A user's mistake; the message is one line that says what, where and what is allowed."""


def unicode_works(stream: TextIO | None = None) -> bool:
    """Whether the stream can carry the drawing characters."""
    stream = sys.stdout if stream is None else stream
    try:
        "╭│×●≤".encode(getattr(stream, "encoding", None) or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def ascii_text(text: str) -> str:
    """The text with nothing but ASCII in it."""
    return text.translate(_ASCII).encode("ascii", "replace").decode()


def plain(text: str) -> str:
    """The text as this terminal can show it."""
    return text if unicode_works() else ascii_text(text)


def console(stderr: bool = False) -> Console:
    """A console on the real streams: colour and width as the terminal has them."""
    stream = sys.stderr if stderr else sys.stdout
    width = None
    if not stream.isatty() and "COLUMNS" not in os.environ:
        width = PLAIN_WIDTH
    return Console(file=stream, width=width, highlight=False, soft_wrap=False, emoji=False)


def say(text: str = "", style: str | None = None) -> None:
    """One line to stdout; nothing in it is markup."""
    console().print(Text(plain(text), style=style or ""), soft_wrap=True)


def say_wrapped(text: str, style: str | None = None) -> None:
    """A paragraph to stdout, broken at words to the width of the terminal."""
    console().print(Text(plain(text), style=style or ""))


def warn(text: str) -> None:
    """One line to stderr."""
    line = text if unicode_works(sys.stderr) else ascii_text(text)
    console(stderr=True).print(Text(line, style="yellow"), soft_wrap=True)


def clean(value: Any) -> Any:
    """The value as strict JSON takes it: paths as text, numbers that are not finite as null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(k): clean(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [clean(v) for v in value]
    if isinstance(value, Path):
        return str(value)
    return value


def print_json(value: Any) -> None:
    """Strict JSON to stdout, nothing else on it."""
    sys.stdout.write(json.dumps(clean(value), indent=2, ensure_ascii=not unicode_works()) + "\n")


def print_table(
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    right: Iterable[str] = (),
    styles: Sequence[str | None] | None = None,
    fold: Iterable[str] = (),
    title: str | None = None,
    narrow: Mapping[str, int] | None = None,
) -> None:
    """A table; `right` columns hold numbers, `fold` columns may break over lines. Those in `narrow`
    have so many characters below a hundred columns, so that the others make room for them."""
    numbers, folded = set(right), set(fold)
    table = Table(
        box=SIMPLE_HEAD if unicode_works() else ASCII,
        title=None if title is None else Text(plain(title)),
        title_justify="left",
        pad_edge=False,
        show_edge=not unicode_works(),
        header_style="bold",
    )
    for name in columns:
        table.add_column(
            Text(plain(name)),
            justify="right" if name in numbers else "left",
            no_wrap=name not in folded,
            overflow="fold" if name in folded else "ellipsis",
            width=(narrow or {}).get(name) if console().width < 100 else None,
        )
    for i, row in enumerate(rows):
        style = styles[i] if styles is not None else None
        table.add_row(*(Text(plain(cell)) for cell in row), style=style)
    console().print(table)


def print_hanging(lines: Sequence[tuple[str, str]]) -> None:
    """Lines of a short label and a long text, which hangs beside its label when it breaks."""
    width = max((len(label) for label, _ in lines), default=0)
    table = Table.grid(padding=(0, 2))
    table.add_column(justify="right", min_width=width, no_wrap=True)
    table.add_column(overflow="fold")
    for label, text in lines:
        table.add_row(Text(plain(label), style="dim"), Text(plain(text)))
    console().print(table)
