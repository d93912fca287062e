"""Builds the HTML of report pages: style sheet, page, section, table. Supports light, dark and phone-sized screens."""

import html
from collections.abc import Sequence

_STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --soft: #5b6470; --paper: #fff; --card: #f4f5f7; --rule: #d9dde3;
  --c0: #1f6fd1; --c1: #c4470f; --c2: #1a7f4b; --c3: #8a3fc0; --c4: #a16a00; --c5: #0f7f8a; --c6: #b8326d; --c7: #555; }
@media (prefers-color-scheme: dark) { :root { --ink: #e7e9ec; --soft: #a3abb6; --paper: #15171a; --card: #1f2328;
  --rule: #363c44; --c0: #6fb1ff; --c1: #ff8f5e; --c2: #58c98d; --c3: #c99bf2; --c4: #e3b341; --c5: #56c7d3;
  --c6: #f283b3; --c7: #bbb; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 70rem; padding: 1.5rem 1rem 4rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .75rem; border-bottom: 1px solid var(--rule); }
h3 { font-size: 1rem; margin: 1.25rem 0 .25rem; }
p { margin: .25rem 0; color: var(--soft); }
.state { font-size: .8rem; vertical-align: middle; padding: .1rem .6rem; border-radius: 1rem; background: var(--card);
  color: var(--soft); border: 1px solid var(--rule); }
.state.finished { color: var(--c2); border-color: var(--c2); }
.state.failed { color: var(--c1); border-color: var(--c1); }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: .75rem; margin: 1rem 0 0; }
.cards div { background: var(--card); border-radius: .5rem; padding: .6rem .8rem; }
dt { color: var(--soft); font-size: .8rem; }
dd { margin: 0; font-size: 1.25rem; font-variant-numeric: tabular-nums; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr)); gap: 1.25rem; }
figure { margin: 0; min-width: 0; }
.charts figcaption { font-weight: 600; }
svg { width: 100%; height: auto; display: block; }
svg text { fill: var(--soft); font-size: 12px; }
.grid { stroke: var(--rule); }
.line { fill: none; stroke-width: 2; stroke-linejoin: round; }
polyline.dashed { stroke-dasharray: 5 4; stroke-width: 1.5; }
.c0 { stroke: var(--c0); --color: var(--c0); } .c1 { stroke: var(--c1); --color: var(--c1); }
.c2 { stroke: var(--c2); --color: var(--c2); } .c3 { stroke: var(--c3); --color: var(--c3); }
.c4 { stroke: var(--c4); --color: var(--c4); } .c5 { stroke: var(--c5); --color: var(--c5); }
.c6 { stroke: var(--c6); --color: var(--c6); } .c7 { stroke: var(--c7); --color: var(--c7); }
circle.line { fill: var(--color); }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: .25rem 1rem; margin: .25rem 0 0; padding: 0;
  font-size: .85rem; color: var(--soft); }
.key { display: inline-block; width: 1.1rem; height: 0; border-top: 3px solid var(--color); margin-right: .4rem;
  vertical-align: middle; }
.key.dashed { border-top-style: dashed; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .3rem .75rem .3rem 0; border-bottom: 1px solid var(--rule); vertical-align: top; }
th { color: var(--soft); font-weight: 600; }
.numbers td + td, .numbers th + th { text-align: right; padding: .3rem 0 .3rem 1.25rem; }
section > .wide td { overflow-wrap: anywhere; min-width: 4rem; }
.confusion th, .confusion td { padding: .25rem .45rem; text-align: right; border: 1px solid var(--rule); min-width: 0; }
.confusion th[scope=col] { writing-mode: vertical-rl; text-align: left; }
.confusion td[style] { background: color-mix(in srgb, var(--c0) calc(var(--share) * .7), transparent); }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(6.2rem, 1fr)); gap: .75rem; }
.gallery img { width: 100%; aspect-ratio: 1; image-rendering: pixelated; border-radius: .3rem; display: block;
  border: 2px solid transparent; }
.figure { max-width: 100%; height: auto; display: block; margin: .5rem 0; background: #fff; border-radius: .3rem; }
.gallery .wrong img { border-color: var(--c1); }
.gallery figcaption { font-size: .8rem; line-height: 1.25; color: var(--soft); overflow-wrap: anywhere; }
.gallery b { color: var(--c1); font-weight: 600; }
pre { background: var(--card); padding: .8rem; border-radius: .5rem; white-space: pre-wrap; overflow-wrap: anywhere; }
.empty { padding: 2rem 0; }
"""


def section(title: str, content: str) -> str:
    """Returns a section with a heading, or an empty string if content is empty. content: HTML."""
    return content and f"<section><h2>{title}</h2>{content}</section>"


def table(
    headers: Sequence[str], rows: Sequence[Sequence[object]], cells_are_html: bool = False, numeric: bool = False
) -> str:
    """Returns an HTML table, without a header row if all headers are empty. It scrolls sideways if it is too wide.

    cells_are_html: do not escape the cells.
    numeric: right-align all columns but the first.
    """
    header_cells = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in headers) if any(headers) else ""
    header_row = f"<tr>{header_cells}</tr>" if header_cells else ""
    cells = [[str(cell) if cells_are_html else html.escape(str(cell)) for cell in row] for row in rows]
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in cells)
    css_class = ' class="numbers"' if numeric else ""
    return f'<div class="wide"><table{css_class}>{header_row}{body}</table></div>'


def page(title: str, sections: Sequence[str]) -> str:
    """Returns a complete HTML document. sections: HTML; empty ones are dropped."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(content for content in sections if content)
        + "\n</body></html>\n"
    )
