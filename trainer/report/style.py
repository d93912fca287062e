"""Builds the HTML of report pages: style sheet, page, section, table. Supports light, dark and phone-sized screens."""

import html
from collections.abc import Sequence

# Colors of lines, classes c0 to c7. Each has a contrast of at least 3 to its background, and any two are told apart by
# people who see no red, no green or no blue. tests/trainer/report/test_style.py computes both.
LIGHT_COLORS = ("#0a5fc4", "#d2571b", "#1b1b1b", "#b0668c", "#6c2400", "#8f1ff0", "#240090", "#6c246c")
DARK_COLORS = ("#5aa9ff", "#ff9a62", "#f2f2f2", "#a070a0", "#48e010", "#b4fcb4", "#6c906c", "#d84800")
LIGHT_PAPER, DARK_PAPER = "#ffffff", "#15171a"


def _variables(colors: Sequence[str]) -> str:
    return " ".join(f"--c{index}: {color};" for index, color in enumerate(colors))


_STYLE = f"""
:root {{ color-scheme: light dark; --ink: #1c1e21; --soft: #5b6470; --paper: {LIGHT_PAPER}; --card: #f4f5f7;
  --rule: #d9dde3; --faint: #b4bac3; --good: #1a7f4b; --bad: #b3261e; {_variables(LIGHT_COLORS)} }}
@media (prefers-color-scheme: dark) {{ :root {{ --ink: #e7e9ec; --soft: #a3abb6; --paper: {DARK_PAPER}; --card: #1f2328;
  --rule: #363c44; --faint: #59616b; --good: #58c98d; --bad: #ff8f7a; {_variables(DARK_COLORS)} }} }}
{" ".join(f".c{index} {{ --color: var(--c{index}); }}" for index in range(len(LIGHT_COLORS)))}
"""
_STYLE += """
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 70rem; padding: 1.5rem 1rem 4rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.6rem; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .75rem; border-bottom: 1px solid var(--rule); }
h3 { font-size: 1rem; margin: 1.25rem 0 .25rem; }
p { margin: .25rem 0; color: var(--soft); }
summary { cursor: pointer; color: var(--soft); }
.state { font-size: .8rem; vertical-align: middle; padding: .1rem .6rem; border-radius: 1rem; background: var(--card);
  color: var(--soft); border: 1px solid var(--rule); white-space: nowrap; }
.state.finished { color: var(--good); border-color: var(--good); }
.state.failed, .problem { color: var(--bad); border-color: var(--bad); }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(8.5rem, 1fr)); gap: .75rem; margin: 1rem 0 0; }
.cards div { background: var(--card); border-radius: .5rem; padding: .6rem .8rem; }
dt { color: var(--soft); font-size: .8rem; line-height: 1.3; }
dd { margin: 0; font-size: 1.25rem; font-variant-numeric: tabular-nums; }
dd small { color: var(--soft); font-size: .8rem; white-space: nowrap; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr)); gap: 1.25rem; }
figure { margin: 0; min-width: 0; }
.charts figcaption { font-weight: 600; }
.chart { width: 100%; height: auto; display: block; overflow: visible; }
svg text { fill: var(--soft); font-size: 12px; }
.grid { stroke: var(--rule); }
.line { fill: none; stroke: var(--color); stroke-width: 2; stroke-linejoin: round; }
polyline.dashed { stroke-dasharray: 5 4; stroke-width: 1.5; }
circle.line, .dot { fill: var(--color); }
.band { fill: var(--color); opacity: .18; }
line.mark { stroke: var(--soft); stroke-dasharray: 2 3; }
text.mark { font-size: 11px; }
.at > rect { fill: transparent; }
.tip { visibility: hidden; pointer-events: none; }
.at:hover .tip { visibility: visible; }
.tip line { stroke: var(--soft); }
.tip .dot { stroke: var(--paper); stroke-width: 1.5; }
.tip rect { fill: var(--card); stroke: var(--rule); }
.tip text { fill: var(--ink); font-variant-numeric: tabular-nums; }
.tip tspan[class] { fill: var(--color); font-weight: 600; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: .25rem 1rem; margin: .25rem 0 .75rem; padding: 0;
  font-size: .85rem; color: var(--soft); }
.key { display: inline-block; width: 1.1rem; height: 0; border-top: 3px solid var(--color); margin-right: .4rem;
  vertical-align: middle; }
.key.dashed { border-top-style: dashed; }
/* A shadow at the edge behind which there is more: the first two backgrounds scroll with the content and cover it. */
.wide { overflow-x: auto; background: linear-gradient(to right, var(--paper) 40%, transparent) 0 0 / 2.5rem 100%,
  linear-gradient(to left, var(--paper) 40%, transparent) 100% 0 / 2.5rem 100%,
  linear-gradient(to right, var(--faint), transparent) 0 0 / .8rem 100%,
  linear-gradient(to left, var(--faint), transparent) 100% 0 / .8rem 100%;
  background-repeat: no-repeat; background-attachment: local, local, scroll, scroll; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .3rem .75rem .3rem 0; border-bottom: 1px solid var(--rule); vertical-align: top; }
th { color: var(--soft); font-weight: 600; }
td:first-child { min-width: 6rem; }
.numbers td + td, .numbers th + th { text-align: right; padding: .3rem 0 .3rem 1.25rem; white-space: nowrap; }
.numbers th + th { white-space: normal; vertical-align: bottom; }
.numbers td:first-child { white-space: nowrap; position: sticky; left: 0; background: var(--paper); }
.side { display: flex; flex-wrap: wrap; gap: 0 3rem; }
.side > div { min-width: 0; }
.side h3:first-child { margin-top: 0; }
.values td + td { max-width: 36rem; }
.confusion th, .confusion td { padding: .25rem .45rem; text-align: right; border: 1px solid var(--rule); min-width: 0;
  white-space: nowrap; }
.confusion th[scope=row] { position: sticky; left: 0; background: var(--paper); max-width: 9rem; overflow: hidden;
  text-overflow: ellipsis; }
.confusion th[scope=col] { writing-mode: vertical-rl; text-align: left; max-height: 9rem; overflow: hidden;
  text-overflow: ellipsis; }
.confusion .hit { background: color-mix(in srgb, var(--c0) calc(8% + var(--share) * .36), transparent); }
.confusion .miss { background: color-mix(in srgb, var(--c1) calc(22% + var(--share) * .4), transparent);
  font-weight: 600; }
.confusion .zero { color: var(--faint); }
.map { display: block; image-rendering: pixelated; border: 1px solid var(--rule); max-width: none; }
.hint { display: none; font-size: .85rem; }
@media (max-width: 40rem) { .hint { display: block; }
  td:first-child { min-width: 4rem; }
  .numbers td + td, .numbers th + th { padding-left: .8rem; }
  .numbers.names td:first-child { white-space: normal; min-width: 9rem; } }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(6.2rem, 1fr)); gap: .75rem; }
.gallery img { width: 100%; aspect-ratio: 1; image-rendering: pixelated; border-radius: .3rem; display: block;
  border: 2px solid transparent; }
.classes { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(24rem, 100%), 1fr)); gap: .25rem 1.5rem; }
.classes .gallery { grid-template-columns: repeat(8, 1fr); gap: .25rem; }
.classes .gallery figcaption { font-size: .65rem; }
.classes h3 { margin: .5rem 0 .1rem; font-size: .85rem; }
.figure { max-width: 100%; height: auto; display: block; margin: .5rem 0; }
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
    numeric: right-align all columns but the first, and never break their lines.
    """
    header_cells = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in headers) if any(headers) else ""
    header_row = f"<tr>{header_cells}</tr>" if header_cells else ""
    cells = [[str(cell) if cells_are_html else html.escape(str(cell)) for cell in row] for row in rows]
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in cells)
    # A first column that says "run" holds names of any length.
    css_class = ("numbers names" if headers[0] == "run" else "numbers") if numeric else "values"
    return f'<div class="wide"><table class="{css_class}">{header_row}{body}</table></div>'


def page(title: str, sections: Sequence[str]) -> str:
    """Returns a complete HTML document. sections: HTML; empty ones are dropped."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(content for content in sections if content)
        + "\n</body></html>\n"
    )
