"""The drawing of a genome as an SVG: the same content as the terminal drawing (`outline.py`).

Colours are CSS variables with fallbacks, so one picture reads on a light and on a dark page: a
page sets `--ink`, `--faint`, `--paper`, `--mixer`, `--channel` and `--link`.
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, field
from html import escape

from ..genome.residual import entry_norm, final_norm
from .outline import Block, Box, Link, Outline, Row
from .units import bytes_text, count_text

WIDTH = 560
_BOXES = 300
"""Width of the boxes' column in user units; the costs stand right of it."""
_LEFT = 64
_LINE = 17
_PAD = 9
_GAP = 16
_APART = 10
"""Between branches."""
_CHAR = 7.4
"""Width of a character at the size that the boxes' text has."""

_Places = dict[tuple[int, int], list[tuple[float, float]]]
"""Of each branch that shares: the points by which its rail leaves it, from the dot on."""


@dataclass
class _Sheet:
    parts: list[str] = field(default_factory=list)
    y: float = 0.0

    def box(self, x: float, y: float, w: float, h: float, role: str) -> None:
        self.parts.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{w:.1f}" height="{h:.1f}" rx="7" '
            f'class="box {role}"/>'
        )

    def text(self, x: float, y: float, text: str, role: str, anchor: str = "middle") -> None:
        self.parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" class="{role}" text-anchor="{anchor}">'
            f"{escape(text)}</text>"
        )

    def path(self, points: list[tuple[float, float]], role: str) -> None:
        text = "M" + " L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        self.parts.append(f'<path d="{text}" class="{role}"/>')


_STYLE = """
.genome text{font:13px ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;fill:var(--ink,#1f2430)}
.genome .name{font-weight:600}
.genome .small{font-size:11.5px;fill:var(--faint,#5b6472)}
.genome .head{font-size:11.5px;font-weight:600;fill:var(--faint,#5b6472)}
.genome .box{stroke-width:1.4;fill:var(--paper,#fff)}
.genome .mixer{stroke:var(--mixer,#0072b2)}
.genome .channel{stroke:var(--channel,#b36b00)}
.genome .edge{stroke:var(--faint,#5b6472);stroke-dasharray:3 3}
.genome .stem{stroke:var(--faint,#5b6472);stroke-width:1.3;fill:none}
.genome .bracket{stroke:var(--ink,#1f2430);stroke-width:1.3;fill:none}
.genome .features{stroke:var(--link,#a8467f);stroke-width:1.6;fill:none}
.genome .weights{stroke:var(--link,#a8467f);stroke-width:1.6;stroke-dasharray:2 4;fill:none}
.genome .dot{fill:var(--link,#a8467f)}
"""


def picture(content: Outline, title: str) -> str:
    """The drawing as one `<svg>` element that needs nothing from outside. `title` is spoken."""
    sheet = _Sheet()
    genome = content.genome
    links = [link for link in content.links if len(link.places) > 1]
    numbers = _LEFT + _BOXES + 14 + 12 * len(links)
    width = numbers + 226
    for offset, label in ((58, "params"), (134, "cache"), (226, "FLOPs/token")):
        sheet.text(numbers + offset, 13, label, "head", "end")
    sheet.y = 22
    first = entry_norm(genome)
    after = "" if first == "none" else f" · {first}"
    _end(sheet, f"embedding {genome.vocab} × {genome.width}{after}")
    _numbers(sheet, numbers, sheet.y - 11, content.cost.embedding.params, 0, 0.0)
    places: _Places = {}
    for block in content.blocks:
        _block(sheet, block, numbers, places)
    _stem(sheet, _LEFT + _BOXES / 2, sheet.y, sheet.y + _GAP)
    sheet.y += _GAP
    last = final_norm(genome)
    norm = "" if last == "none" else f"{last} · "
    _end(sheet, f"{norm}logits{' (tied)' if genome.tied else ''}")
    head = content.cost.head
    _numbers(sheet, numbers, sheet.y - 11, head.params, 0, head.flops_per_token)
    for k, link in enumerate(sorted(links, key=_span)):
        _rail(sheet, link, places, _LEFT + _BOXES + 12 * (k + 1))
    total = content.cost.total
    sheet.y += 12
    sheet.path([(numbers, sheet.y), (numbers + 226, sheet.y)], "stem")
    sheet.y += 18
    sheet.text(_LEFT, sheet.y, "whole model", "name", "start")
    _numbers(sheet, numbers, sheet.y, total.params, total.state_bytes, total.flops_per_token)
    if total.active_params != total.params:
        sheet.y += _LINE
        sheet.text(_LEFT, sheet.y, "active for one token", "small", "start")
        sheet.text(numbers + 58, sheet.y, count_text(total.active_params), "small", "end")
    height = sheet.y + 10
    return (
        f'<svg class="genome" xmlns="http://www.w3.org/2000/svg" role="img" '
        f'viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" height="{height:.0f}">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style>" + "".join(sheet.parts) + "</svg>"
    )


def _span(link: Link) -> int:
    slots = [slot for slot, _ in link.places]
    return max(slots) - min(slots)


def _stem(sheet: _Sheet, x: float, top: float, bottom: float) -> None:
    sheet.path([(x, top), (x, bottom)], "stem")


def _end(sheet: _Sheet, label: str) -> None:
    sheet.box(_LEFT, sheet.y, _BOXES, 30, "edge")
    sheet.text(_LEFT + _BOXES / 2, sheet.y + 19, label, "small")
    sheet.y += 30


def _numbers(
    sheet: _Sheet, x: float, y: float, params: int, state_bytes: int, flops: float
) -> None:
    shown = (
        (58, count_text(params) if params else "·"),
        (134, bytes_text(state_bytes) if state_bytes else "·"),
        (226, count_text(flops) if flops else "·"),
    )
    for offset, text in shown:
        sheet.text(x + offset, y, text, "small", "end")


def _block(sheet: _Sheet, block: Block, numbers: float, places: _Places) -> None:
    top = sheet.y + _GAP
    for row in block.rows:
        _slot(sheet, row, numbers, places)
    if block.count == 1:
        return
    x, bottom = _LEFT - 14, sheet.y
    sheet.path([(x + 6, top), (x, top), (x, bottom), (x + 6, bottom)], "bracket")
    sheet.text(x - 5, (top + bottom) / 2 + 4, f"×{block.count}", "name", "end")


@dataclass(frozen=True)
class _Drawn:
    """A box of a slot: one operator's, or that of all branches where they do not fit."""

    x: float
    width: float
    kind: str
    lines: list[tuple[str, str]]
    """Each with its role."""

    @property
    def centre(self) -> float:
        return self.x + self.width / 2


def _boxes(row: Row) -> list[_Drawn]:
    count = len(row.boxes)
    width = (_BOXES - _APART * (count - 1)) / count
    chars = int((width - 14) / _CHAR)
    if count > 1 and max(box.longest for box in row.boxes) > chars:
        whole = int((_BOXES - 14) / _CHAR)
        lines = [line for box in row.boxes for line in _lines(box, whole)]
        return [_Drawn(_LEFT, _BOXES, row.boxes[0].kind, [(row.stacked, "small"), *lines])]
    texts = [_lines(box, chars) for box in row.boxes]
    if count == 1 and row.entry:
        texts[0].append((row.entry, "small"))
    return [
        _Drawn(_LEFT + i * (width + _APART), width, box.kind, lines)
        for i, (box, lines) in enumerate(zip(row.boxes, texts, strict=True))
    ]


def _slot(sheet: _Sheet, row: Row, numbers: float, places: _Places) -> None:
    centres = []
    for first, part in row.parts():
        centres.append(_branches(sheet, part, first, places))
        if part.join == "chain":
            sheet.text(_LEFT + _BOXES / 2 + 6, sheet.y + _GAP - 3, "chain", "small", "start")
    centre = centres[0] + 4
    sheet.text(6, centre, str(row.index), "small", "start")
    cost = row.cost
    _numbers(sheet, numbers, centre, cost.params, cost.state_bytes, cost.flops_per_token)


def _branches(sheet: _Sheet, row: Row, first: int, places: _Places) -> float:
    """Boxes side by side, the first one being that branch of the slot; the height of their
    middle."""
    boxes = _boxes(row)
    middle = _LEFT + _BOXES / 2
    height = max(len(box.lines) for box in boxes) * _LINE + 2 * _PAD
    top = sheet.y + _GAP
    if len(boxes) > 1:
        split = top - 2
        top = split + 10
        _stem(sheet, middle, sheet.y, split)
        _bar(sheet, boxes, split)
        for box in boxes:
            _stem(sheet, box.centre, split, top)
    else:
        _stem(sheet, middle, sheet.y, top)
    for box in boxes:
        sheet.box(box.x, top, box.width, height, box.kind)
        y = top + (height - len(box.lines) * _LINE) / 2 + 12.5
        for k, (line, role) in enumerate(box.lines):
            sheet.text(box.centre, y + k * _LINE, line, role)
    for j, port in _ports(row, boxes, top, height).items():
        places[row.index, first + j] = port
    sheet.y = top + height
    if len(boxes) > 1:
        join = sheet.y + 10
        for box in boxes:
            _stem(sheet, box.centre, sheet.y, join)
        _bar(sheet, boxes, join)
        words = " · ".join(filter(None, (row.join, row.entry)))
        sheet.text(middle + 6, join + 13, words, "small", "start")
        sheet.y = join
    return top + height / 2


def _bar(sheet: _Sheet, boxes: list[_Drawn], y: float) -> None:
    sheet.path([(boxes[0].centre, y), (boxes[-1].centre, y)], "stem")


def _ports(
    row: Row, boxes: list[_Drawn], top: float, height: float
) -> dict[int, list[tuple[float, float]]]:
    """Where the rails of what is shared leave the branches. Those that share stand last: the last
    one's rail leaves it at its side, those of others below, and past the later ones."""
    sharing = [j for j, box in enumerate(row.boxes) if box.tags]
    bottom, right = top + height, boxes[-1].x + boxes[-1].width
    found = {}
    for k, j in enumerate(reversed(sharing)):
        if k > 0 and len(boxes) > 1:
            x = boxes[j].x + boxes[j].width - _PAD
            found[j] = [(x, bottom), (x, bottom + min(1.0 + 3 * k, 8.0))]
        else:
            y = top + height / 2 + (-8 * k if len(boxes) == 1 else 0)
            found[j] = [(right, y)]
    return found


def _lines(box: Box, chars: int) -> list[tuple[str, str]]:
    """The box's text, each line with its role."""
    parts = [part for part in (box.genes, *box.tags) if part]
    rest = " · ".join(parts)
    if len(rest) > chars:
        small = [line for part in parts for line in textwrap.wrap(part, chars)]
    else:
        small = [rest] if rest else []
    names = textwrap.wrap(box.name, chars)
    return [(line, "name") for line in names] + [(line, "small") for line in small]


def _rail(sheet: _Sheet, link: Link, places: _Places, x: float) -> None:
    ports = [places[place] for place in link.places]
    ys = [port[-1][1] for port in ports]
    sheet.path([(x, min(ys)), (x, max(ys))], link.kind)
    for port in ports:
        left, y = port[0]
        sheet.path([*port, (x, port[-1][1])], link.kind)
        sheet.parts.append(f'<circle cx="{left:.1f}" cy="{y:.1f}" r="3" class="dot"/>')
