# SPDX-License-Identifier: Apache-2.0
"""The page around reports: one HTML file with its style inside, light or dark as the reader's
system is, and good on paper."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

_STYLE = """
:root {
  --page: #f4f5f7; --card: #ffffff; --ink: #1b2430; --soft: #5a6675; --faint: #e3e7ec;
  --edge: #d9dee5; --cell: #1f5fbf; --empty: #f1f3f6;
  --c0: #1f5fbf; --c1: #d1641f; --c2: #16876b; --c3: #8a4bc2;
  --c4: #b8860b; --c5: #c2306f; --c6: #3b98b8; --c7: #6b7280;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #12161c; --card: #1b2129; --ink: #e6eaf0; --soft: #9aa6b5; --faint: #2a323d;
    --edge: #303946; --cell: #6ea8ff; --empty: #232a34;
    --c0: #6ea8ff; --c1: #f29a5c; --c2: #4cc9a4; --c3: #bd93f0;
    --c4: #e0b84c; --c5: #f27bac; --c6: #74cbe8; --c7: #a3adba;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Liberation Sans",
    sans-serif;
}
main { max-width: 1180px; margin: 0 auto; padding: 36px 24px 48px; }
h1 { margin: 0; font-size: 27px; line-height: 1.25; letter-spacing: -0.01em; }
h2 { margin: 0 0 2px; font-size: 16px; }
.lead { margin: 6px 0 24px; color: var(--soft); font-size: 16px; }
.note { margin: 0 0 12px; color: var(--soft); font-size: 13.5px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(165px, 1fr)); gap: 12px; }
.tile, section {
  background: var(--card); border: 1px solid var(--edge); border-radius: 10px;
}
.tile { padding: 13px 16px 12px; }
.tile b { display: block; font-size: 25px; line-height: 1.25; font-weight: 650; }
.tile span { color: var(--soft); font-size: 13px; }
.tile .what { display: block; font-size: 13px; color: var(--soft); }
.tile.main b { color: var(--c0); }
.grid2 {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(min(480px, 100%), 1fr));
  gap: 16px; margin-top: 16px;
}
section { padding: 18px 20px; min-width: 0; }
section.wide { margin-top: 16px; }
svg { display: block; width: 100%; height: auto; overflow: visible; }
svg text { fill: var(--soft); font-size: 12px; font-variant-numeric: tabular-nums; }
svg text.label { font-size: 12.5px; }
svg text.small { font-size: 10.5px; }
.grid { stroke: var(--faint); } .axis { stroke: var(--edge); }
.mark { stroke: var(--soft); stroke-dasharray: 3 4; stroke-width: 1; opacity: .7; }
.line { fill: none; stroke: currentColor; stroke-width: 2.2; stroke-linejoin: round; }
.dot { fill: var(--card); stroke: currentColor; stroke-width: 2; }
.hidden { fill: transparent; stroke: none; }
.blob { fill: currentColor; fill-opacity: .72; stroke: var(--card); stroke-width: .6; }
.dashed { stroke-dasharray: 6 4; }
.bar { fill: var(--soft); opacity: .75; } .cell { fill: var(--cell); }
.empty { fill: var(--empty); }
.c0 { color: var(--c0); } .c1 { color: var(--c1); } .c2 { color: var(--c2); }
.c3 { color: var(--c3); } .c4 { color: var(--c4); } .c5 { color: var(--c5); }
.c6 { color: var(--c6); } .c7 { color: var(--c7); }
.legend { display: flex; flex-wrap: wrap; gap: 4px 16px; margin: 4px 0 8px; font-size: 13.5px; }
.swatch {
  display: inline-block; width: 14px; height: 0; margin: 0 6px 0 0; vertical-align: middle;
  border-top: 3px solid currentColor; border-radius: 2px;
}
.swatch.dashed { border-top-style: dashed; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th { color: var(--soft); font-weight: 500; font-size: 13px; text-align: left; }
th, td { padding: 6px 14px 6px 0; border-bottom: 1px solid var(--faint); vertical-align: top; }
tr:last-child td { border-bottom: 0; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
details { margin-top: 16px; background: var(--card); border: 1px solid var(--edge);
  border-radius: 10px; padding: 12px 20px; }
summary { cursor: pointer; font-weight: 600; }
details[open] summary { margin-bottom: 8px; }
pre { margin: 0; overflow-x: auto; font: 13px/1.5 ui-monospace, "Cascadia Code", "DejaVu Sans Mono",
  "Liberation Mono", monospace; }
footer { margin-top: 24px; color: var(--soft); font-size: 13px; }
@media print { body { background: none; } main { padding: 0; }
  section, .tile { break-inside: avoid; } }
"""


def page(title: str, body: str) -> str:
    """A whole document."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def tile(what: str, value: str, more: str = "", *, main: bool = False) -> str:
    """A key figure: what it is, how much, and what else is worth saying."""
    kind = "tile main" if main else "tile"
    return (
        f'<div class="{kind}"><span class="what">{escape(what)}</span><b>{escape(value)}</b>'
        f"<span>{escape(more)}</span></div>"
    )


def section(title: str, note: str, content: str, *, wide: bool = False) -> str:
    """A card; `content` is HTML, the rest plain text."""
    kind = ' class="wide"' if wide else ""
    said = f'<p class="note">{escape(note)}</p>' if note else ""
    return f"<section{kind}><h2>{escape(title)}</h2>{said}{content}</section>"


def folded(title: str, content: str) -> str:
    """A card that opens when asked; `content` is HTML."""
    return f"<details><summary>{escape(title)}</summary>{content}</details>"


def legend(names: Sequence[str], classes: Sequence[str]) -> str:
    """The names of several lines or colours beside their swatches."""
    items = "".join(
        f'<span><i class="swatch {kind}"></i>{escape(name)}</span>'
        for name, kind in zip(names, classes, strict=True)
    )
    return f'<div class="legend">{items}</div>'


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, words: int = 1) -> str:
    """A table of plain text; the first `words` columns are words, the others numbers."""

    def line(cells: Sequence[str], tag: str) -> str:
        return "".join(
            f"<{tag}{'' if i < words else ' class=number'}>{escape(cell)}</{tag}>"
            for i, cell in enumerate(cells)
        )

    body = "".join(f"<tr>{line(row, 'td')}</tr>" for row in rows)
    return (
        f'<div class="scroll"><table><thead><tr>{line(header, "th")}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )
