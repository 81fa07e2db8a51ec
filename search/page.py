"""A self-contained HTML page: light and dark styles, tables, plotly figures, no outside file."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

STYLE = """
:root{color-scheme:light dark;--paper:#fff;--ink:#1f2430;--faint:#5b6472;--line:#d9dde4;
--card:#f6f7f9;--mixer:#0072b2;--channel:#a66300;--link:#a8467f;--accent:#0072b2;--base:#c04f00}
@media (prefers-color-scheme:dark){:root{--paper:#14171c;--ink:#e6e9ef;--faint:#a3acba;
--line:#343a45;--card:#1b1f26;--mixer:#56b4e9;--channel:#e69f00;--link:#d98bb9;--accent:#56b4e9;
--base:#f08a4b}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1080px;margin:0 auto;padding:40px 24px 80px}
h1{font-size:30px;line-height:1.2;margin:0 0 6px}
h2{font-size:21px;margin:48px 0 8px;padding-top:14px;border-top:1px solid var(--line)}
h3{font-size:17px;margin:0 0 8px}
p{margin:8px 0 12px;max-width:75ch}
.question{font-size:19px;color:var(--faint);margin:0 0 18px}
.note{color:var(--faint);font-size:14px}
.wrap{overflow-x:auto;margin:10px 0 18px}
table{border-collapse:collapse;font-size:14px;font-variant-numeric:tabular-nums}
caption{text-align:left;color:var(--faint);padding-bottom:6px}
th,td{padding:5px 18px 5px 0;text-align:left;vertical-align:top;border-bottom:1px solid var(--line)}
th{font-weight:600;white-space:nowrap}
td:first-child{white-space:nowrap}
.facts td:first-child{white-space:normal}
td.n,th.n{text-align:right;white-space:nowrap}
td:has(>code){min-width:260px}
tr.base td:first-child{color:var(--base);font-weight:600}
tr.mark td:first-child{color:var(--accent);font-weight:600}
code{font:13px ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;overflow-wrap:anywhere}
.card{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:18px 20px;
margin:16px 0}
.split{display:flex;flex-wrap:wrap;gap:20px 36px;align-items:flex-start}
.split>svg{max-width:100%;height:auto;flex:0 1 auto}
.split>div{flex:1 1 280px;min-width:0}
.plot{width:100%}
@media (max-width:600px){.plot .annotation:has(.annotation-arrow-g){display:none}}
.tiles{display:flex;flex-wrap:wrap;gap:12px;margin:18px 0 6px}
.tile{border:1px solid var(--line);border-radius:10px;padding:10px 16px;min-width:120px}
.tile b{display:block;font-size:22px;line-height:1.2}
.tile span{color:var(--faint);font-size:13px}
details{margin:8px 0 14px}
summary{cursor:pointer;color:var(--accent)}
summary:focus-visible{outline:2px solid var(--accent);outline-offset:3px}
pre{white-space:pre-wrap;overflow-wrap:anywhere;font-size:13px;background:var(--card);
border:1px solid var(--line);border-radius:8px;padding:12px}
"""

_SCRIPT = """
const figures = JSON.parse(document.getElementById('figures').textContent);
const scheme = matchMedia('(prefers-color-scheme: dark)');
function colours() {
  const style = getComputedStyle(document.documentElement);
  const ink = style.getPropertyValue('--ink').trim();
  const faint = style.getPropertyValue('--faint').trim();
  const card = style.getPropertyValue('--card').trim();
  return {'font.color': ink, 'xaxis.linecolor': faint, 'yaxis.linecolor': faint,
    'hoverlabel.bgcolor': card, 'hoverlabel.font.color': ink};
}
const drawn = Object.entries(figures).map(([id, figure]) =>
  Plotly.newPlot(id, figure.data, figure.layout, {displaylogo: false, responsive: true,
    modeBarButtonsToRemove: ['select2d', 'lasso2d', 'autoScale2d']})
    .then(plot => Plotly.relayout(plot, colours())));
scheme.addEventListener('change', () =>
  Object.keys(figures).forEach(id => Plotly.relayout(id, colours())));
"""


class Page:
    """Collects the parts of a page in order; `html` gives it whole."""

    def __init__(self, title: str) -> None:
        self.title = title
        self._parts: list[str] = []
        self._figures: dict[str, go.Figure] = {}

    def add(self, *parts: str) -> None:
        """Append HTML; the caller has escaped what came from elsewhere."""
        self._parts += parts

    def figure(self, figure: go.Figure, label: str) -> None:
        """Append a plot; `label` says in words what it shows."""
        name = f"figure{len(self._figures)}"
        self._figures[name] = figure
        height = int(figure.layout.height or 450)
        self.add(
            f'<div class="plot" id="{name}" role="img" aria-label="{escape(label)}" '
            f'style="min-height:{height}px"></div>'
        )

    def html(self) -> str:
        figures = ",".join(f'"{name}":{figure.to_json()}' for name, figure in self._figures.items())
        # Inside a script element only "<" could end it; JSON may spell it as an escape.
        data = ("{" + figures + "}").replace("<", "\\u003c")
        scripts = ""
        if self._figures:
            scripts = (
                "<noscript><p>The plots need JavaScript; the tables hold the same numbers.</p>"
                f"</noscript><script>{get_plotlyjs()}</script>"
                f'<script type="application/json" id="figures">{data}</script>'
                f"<script>{_SCRIPT}</script>"
            )
        return (
            '<!doctype html><html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width,initial-scale=1">'
            f"<title>{escape(self.title)}</title><style>{STYLE}</style></head><body><main>"
            + "\n".join(self._parts)
            + f"</main>{scripts}</body></html>\n"
        )


def text(tag: str, content: str, role: str = "") -> str:
    """An element with escaped text in it."""
    attribute = f' class="{role}"' if role else ""
    return f"<{tag}{attribute}>{escape(content)}</{tag}>"


def table(
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    numbers: Sequence[str] = (),
    roles: Sequence[str] | None = None,
    code: Sequence[str] = (),
    caption: str = "",
    role: str = "",
) -> str:
    """A table with escaped cells: `numbers` and `code` name columns, `roles` one class per
    row, `role` the table's."""
    kinds = ["n" if name in numbers else "" for name in columns]
    head = "".join(
        f'<th scope="col"{_class(kind)}>{escape(name)}</th>'
        for name, kind in zip(columns, kinds, strict=True)
    )
    body = []
    for i, row in enumerate(rows):
        cells = []
        for name, kind, cell in zip(columns, kinds, row, strict=True):
            inner = f"<code>{escape(cell)}</code>" if name in code and cell else escape(cell)
            cells.append(f"<td{_class(kind)}>{inner}</td>")
        body.append(f"<tr{_class(roles[i] if roles else '')}>{''.join(cells)}</tr>")
    title = f"<caption>{escape(caption)}</caption>" if caption else ""
    return (
        f'<div class="wrap"><table{_class(role)}>{title}<thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _class(role: str) -> str:
    return f' class="{role}"' if role else ""


def fold(summary: str, inner: str) -> str:
    """Content that opens on a click; `inner` is HTML."""
    return f"<details><summary>{escape(summary)}</summary>{inner}</details>"
