"""The drawing of a genome in a terminal: slots in order, repeats folded, sharing as rails."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, field

from rich.text import Text

from ..genome.residual import entry_norm, final_norm
from ..primitives.base import Cost
from .outline import Block, Box, Link, Outline, Row
from .terminal import ascii_text
from .units import bytes_text, count_text

LEAST_WIDTH, MOST_WIDTH = 60, 110
GUTTER = 10
"""Columns for slot numbers and the bracket of a repeat."""
MOST_BOXES = 48
RAIL = 2
"""Columns for one sharing group."""
MOST_RAILS = 5

_STYLE = {"mixer": "cyan", "channel": "yellow", "edge": "dim", "link": "magenta"}
_LINES = "╭╮╰╯┌┐└┘├┤┬┴┼│─┆◂"
_TO_ASCII = str.maketrans(_LINES, "+" * 13 + "|-:<")


@dataclass
class Canvas:
    """A grid of characters with styles that grows downwards."""

    width: int
    rows: list[list[tuple[str, str]]] = field(default_factory=list)

    def line(self) -> int:
        """Add an empty line; its index."""
        self.rows.append([(" ", "")] * self.width)
        return len(self.rows) - 1

    def put(self, y: int, x: int, text: str, style: str = "") -> None:
        for i, char in enumerate(text):
            if 0 <= x + i < self.width:
                self.rows[y][x + i] = (char, style)

    def char(self, y: int, x: int) -> str:
        return self.rows[y][x][0]

    def texts(self) -> list[Text]:
        lines = []
        for row in self.rows:
            text = Text(no_wrap=True)
            for char, style in row:
                text.append(char, style or None)
            text.rstrip()
            lines.append(text)
        return lines


@dataclass(frozen=True)
class _Layout:
    width: int
    left: int
    """First column of the boxes."""
    boxes: int
    """Columns of the boxes."""
    columns: tuple[str, ...]
    """The costs that fit."""

    @property
    def centre(self) -> int:
        return self.left + self.boxes // 2

    @property
    def right(self) -> int:
        """The column of the right edge of a slot."""
        return self.left + self.boxes - 1


_COLUMNS = {"params": 9, "cache": 10, "FLOPs/token": 13}


def drawing(content: Outline, width: int = 80, unicode: bool = True) -> list[Text]:
    """The lines of the drawing, none longer than `width` (60 to 110 columns are used).

    `unicode=False` draws with ASCII alone.
    """
    width = max(LEAST_WIDTH, min(width, MOST_WIDTH))
    rails = [link for link in content.links if len(link.places) > 1][:MOST_RAILS]
    layout = _layout(width, len(rails))
    canvas = Canvas(layout.width)
    _column_heads(canvas, layout)
    genome = content.genome
    first = entry_norm(genome)
    after = "" if first == "none" else f" · {first}"
    _end_box(canvas, layout, f"embedding {genome.vocab} × {genome.width}{after}", True)
    _costs(canvas, layout, len(canvas.rows) - 2, content.cost.embedding)
    middles: dict[tuple[int, int], int] = {}
    edges: dict[int, int] = {}
    for block in content.blocks:
        _block(canvas, layout, block, middles, edges)
    last = final_norm(genome)
    norm = "" if last == "none" else f"{last} · "
    _end_box(canvas, layout, f"{norm}logits{' (tied)' if genome.tied else ''}", False)
    _costs(canvas, layout, len(canvas.rows) - 2, content.cost.head)
    _rails(canvas, layout, rails, middles, edges)
    _totals(canvas, layout, content)
    lines = canvas.texts()
    return lines if unicode else [_in_ascii(line) for line in lines]


def _in_ascii(line: Text) -> Text:
    plain = ascii_text(line.plain.translate(_TO_ASCII))
    return Text(plain, spans=line.spans, no_wrap=True)


def _layout(width: int, rails: int) -> _Layout:
    columns = list(_COLUMNS)
    while True:
        boxes = width - GUTTER - sum(_COLUMNS[c] for c in columns) - RAIL * rails - (rails > 0)
        if boxes >= 26 or len(columns) == 1:
            spare = max(0, boxes - MOST_BOXES)
            return _Layout(width - spare, GUTTER, boxes - spare, tuple(columns))
        columns.pop()


def _column_heads(canvas: Canvas, layout: _Layout) -> None:
    y = canvas.line()
    x = layout.width
    for name in reversed(layout.columns):
        canvas.put(y, x - len(name), name, "bold")
        x -= _COLUMNS[name]
    canvas.put(y, 0, "slot", "bold")


def _costs(canvas: Canvas, layout: _Layout, y: int, cost: Cost, style: str = "") -> None:
    texts = {
        "params": count_text(cost.params),
        "cache": bytes_text(cost.state_bytes),
        "FLOPs/token": count_text(cost.flops_per_token),
    }
    x = layout.width
    for name in reversed(layout.columns):
        text = texts[name]
        nothing = text in ("0", "0 B")
        text = "·" if nothing else text
        canvas.put(y, x - len(text), text, "dim" if nothing else style)
        x -= _COLUMNS[name]


def _end_box(canvas: Canvas, layout: _Layout, label: str, first: bool) -> None:
    inner = layout.boxes - 2
    text = label if len(label) <= inner else label[: inner - 1] + "…"
    top, middle, bottom = canvas.line(), canvas.line(), canvas.line()
    canvas.put(top, layout.left, "┌" + "─" * inner + "┐", "dim")
    canvas.put(middle, layout.left, "│" + text.center(inner) + "│", "dim")
    canvas.put(bottom, layout.left, "└" + "─" * inner + "┘", "dim")
    if first:
        canvas.put(bottom, layout.centre, "┬", "dim")
    else:
        canvas.put(top, layout.centre, "┴", "dim")


def _block(
    canvas: Canvas,
    layout: _Layout,
    block: Block,
    middles: dict[tuple[int, int], int],
    edges: dict[int, int],
) -> None:
    top = len(canvas.rows)
    for row in block.rows:
        _slot(canvas, layout, row, middles, edges)
    if block.count == 1:
        return
    bottom = len(canvas.rows) - 1
    x = GUTTER - 2
    for y in range(top, bottom + 1):
        canvas.put(y, x, "┌" if y == top else "└" if y == bottom else "│", "bold")
    label = f"×{block.count}"
    # Beside a slot's number there is room for it only between the slots.
    y = (top + bottom) // 2
    while canvas.char(y, 2).strip() and y < bottom:
        y += 1
    canvas.put(y, x - len(label), label, "bold")


def _slot(
    canvas: Canvas,
    layout: _Layout,
    row: Row,
    middles: dict[tuple[int, int], int],
    edges: dict[int, int],
) -> None:
    bodies = []
    for first, part in row.parts():
        bodies.append(_branches(canvas, layout, part, first, middles))
        if part.join == "chain":
            label = " chain "
            canvas.put(len(canvas.rows) - 1, layout.centre - len(label) // 2, label, "dim")
    middle = bodies[0][(len(bodies[0]) - 1) // 2]
    number = str(row.index)
    canvas.put(middle, 3 - len(number), number, "dim")
    _costs(canvas, layout, middle, row.cost)
    edges[row.index] = layout.right


def _branches(
    canvas: Canvas, layout: _Layout, row: Row, first: int, middles: dict[tuple[int, int], int]
) -> list[int]:
    """Boxes side by side, the first one being that branch of the slot; the lines of their texts."""
    count = len(row.boxes)
    each = (layout.boxes - 2 * (count - 1)) // count
    if count == 1 or each - 4 >= max(box.longest for box in row.boxes):
        lefts = [layout.left + i * (each + 2) for i in range(count)]
        widths = [each] * (count - 1) + [layout.right - lefts[-1] + 1]
        contents = [_lines(box, w - 4) for box, w in zip(row.boxes, widths, strict=True)]
    else:
        # More branches than fit side by side stand as lines of one box.
        lefts, widths = [layout.left], [layout.boxes]
        stack = _stacked(row, layout.boxes - 4)
        contents = [[line for lines in stack for line in lines]]
    if count == 1 and row.entry:
        contents[0].append((row.entry, "dim"))
    # Rails of two branches would run into each other on one line.
    ports = {j: k for k, j in enumerate(j for j, box in enumerate(row.boxes) if box.tags)}
    if len(lefts) < count:
        ports = {j: sum(map(len, stack[: j + 1])) for j in ports}
    height = max(*map(len, contents), len(ports))
    centres = [x + w // 2 for x, w in zip(lefts, widths, strict=True)]
    if len(centres) % 2:
        centres[len(centres) // 2] = layout.centre
    if len(centres) > 1:
        y = canvas.line()
        _branch_line(canvas, y, centres, layout.centre, "╭╮┬", "┴")
        if row.entry:
            label = f" {row.entry} "
            canvas.put(y, layout.centre - len(label) // 2, label, "dim")
    top = canvas.line()
    body = [canvas.line() for _ in range(height)]
    bottom = canvas.line()
    for j, (x, w, centre) in enumerate(zip(lefts, widths, centres, strict=True)):
        canvas.put(top, x, "╭" + "─" * (w - 2) + "╮")
        canvas.put(top, centre, "┴")
        canvas.put(bottom, x, "╰" + "─" * (w - 2) + "╯")
        canvas.put(bottom, centre, "┬")
        lines = contents[j]
        skip = (height - len(lines)) // 2
        for i, y in enumerate(body):
            canvas.put(y, x, "│")
            canvas.put(y, x + w - 1, "│")
            if 0 <= i - skip < len(lines):
                text, style = lines[i - skip]
                canvas.put(y, x + 1, text.center(w - 2), style)
    for j, line in ports.items():
        middles[row.index, first + j] = body[line]
    if len(centres) > 1:
        y = canvas.line()
        _branch_line(canvas, y, centres, layout.centre, "╰╯┴", "┬")
        label = f" {row.join} "
        canvas.put(y, layout.centre - len(label) // 2, label, "dim")
    return body


def _branch_line(
    canvas: Canvas, y: int, centres: list[int], centre: int, ends: str, stem: str
) -> None:
    first, last = centres[0], centres[-1]
    canvas.put(y, first, "─" * (last - first))
    for x in centres[1:-1]:
        canvas.put(y, x, ends[2])
    canvas.put(y, first, ends[0])
    canvas.put(y, last, ends[1])
    canvas.put(y, centre, "┼" if canvas.char(y, centre) == ends[2] else stem)


def _lines(box: Box, width: int) -> list[tuple[str, str]]:
    """The box's text: all in one line where it fits, else the name above the rest."""
    bold, style = f"bold {_STYLE[box.kind]}", _STYLE[box.kind]
    parts = [part for part in (box.genes, *box.tags) if part]
    whole = " · ".join([box.name, *parts])
    if len(whole) <= width and not (parts and box.genes):
        return [(whole, bold)]
    rest = " · ".join(parts)
    if len(rest) > width:
        lines = [line for part in parts for line in textwrap.wrap(part, width)]
    else:
        lines = [rest]
    return [(line, bold) for line in textwrap.wrap(box.name, width)] + [(t, style) for t in lines]


def _stacked(row: Row, width: int) -> list[list[tuple[str, str]]]:
    """What the slot is, and the lines of each branch."""
    found = [[(row.stacked, "dim")]]
    for box in row.boxes:
        text = box.name + (f"({box.genes})" if box.genes else "")
        text = " · ".join([text, *box.tags])
        found.append([(line, _STYLE[box.kind]) for line in textwrap.wrap(text, width)])
    return found


def _rails(
    canvas: Canvas,
    layout: _Layout,
    links: list[Link],
    middles: dict[tuple[int, int], int],
    edges: dict[int, int],
) -> None:
    """Vertical lines right of the boxes, one per sharing group, the shortest innermost."""
    style = _STYLE["link"]
    spans = []
    for link in links:
        ys = [middles[p] for p in link.places if p in middles]
        if len(set(ys)) > 1:
            spans.append((max(ys) - min(ys), link, ys))
    spans.sort(key=lambda span: span[0])
    for k, (_, link, ys) in enumerate(spans):
        x = layout.right + RAIL * (k + 1)
        low, high = min(ys), max(ys)
        upright = "┆" if link.kind == "weights" else "│"
        for y in range(low, high + 1):
            canvas.put(y, x, upright, style)
        for y in sorted(set(ys)):
            for at in range(layout.right + 1, x):
                crossing = canvas.char(y, at) in "│┆"
                canvas.put(y, at, "┼" if crossing else "─", style)
            canvas.put(y, x, "╮" if y == low else "╯" if y == high else "┤", style)
            takes = link.kind == "features" and y != low
            canvas.put(y, layout.right, "◂" if takes else "├", style)


def _totals(canvas: Canvas, layout: _Layout, content: Outline) -> None:
    total = content.cost.total
    length = sum(_COLUMNS[c] for c in layout.columns) - 2
    y = canvas.line()
    canvas.put(y, layout.width - length, "─" * length, "dim")
    y = canvas.line()
    canvas.put(y, layout.left, "whole model", "bold")
    _costs(canvas, layout, y, total, "bold")
    if total.active_params != total.params:
        y = canvas.line()
        canvas.put(y, layout.left, "active for one token")
        text = count_text(total.active_params)
        x = layout.width - sum(_COLUMNS[c] for c in layout.columns[1:]) - len(text)
        canvas.put(y, x, text)
