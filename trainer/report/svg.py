"""Series of points in, an SVG line chart out: text that needs no script, no font and no network, light or dark."""

import html
import math
from collections.abc import Sequence
from typing import NamedTuple

_WIDTH, _HEIGHT = 480, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 12, 14, 38  # margins, for the axes' numbers
_MOST_POINTS = 600
_LARGEST = 1e100  # beyond it there is nothing to see, and differences overflow
COLOURS = 8
"""classes c0, c1, ... of lines, which the page gives their colours"""


class Series(NamedTuple):
    name: str
    points: Sequence[tuple[float, float]]
    colour: int
    dashed: bool = False


def line_chart(
    series: Sequence[Series], x_label: str, y_label: str, percent: bool = False, from_zero: bool = False
) -> str:
    """y from the lowest value, or from 0, to the highest, which a few points far outside do not stretch. Without any
    point a line that says so."""
    drawn = [each._replace(points=_thinned(_finite(each.points))) for each in series]
    drawn = [each for each in drawn if each.points]
    if not drawn:
        return f'<p class="empty">no {html.escape(y_label)} yet</p>'
    xs = [x for each in drawn for x, _ in each.points]
    low, high = _range([y for each in drawn for _, y in each.points] + [0.0] * from_zero)
    first, last = min(xs), max(xs)
    last = last if last > first else first + 1
    y_ticks, x_ticks = ticks(low, high, 5), ticks(first, last, 6)

    def across(x: float) -> float:
        return _LEFT + (x - first) / (last - first) * (_WIDTH - _LEFT - _RIGHT)

    def down(y: float) -> float:
        share = (min(max(y, low), high) - low) / (high - low)
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)

    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{html.escape(y_label)}">']
    for tick in y_ticks:
        y = down(tick)
        text = f"{tick:.4g}" if not percent else f"{100 * tick:.4g} %"
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
    for tick in x_ticks:
        parts.append(
            f'<text x="{across(tick):.1f}" y="{_HEIGHT - _BOTTOM + 17}" text-anchor="middle">{tick:.4g}</text>'
        )
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{_HEIGHT - 4}" text-anchor="middle">{html.escape(x_label)}</text>')
    for each in drawn:
        kind = f"line c{each.colour % COLOURS}" + (" dashed" if each.dashed else "")
        points = " ".join(f"{across(x):.1f},{down(y):.1f}" for x, y in each.points)
        if len(each.points) == 1:
            x, y = each.points[0]
            parts.append(f'<circle class="{kind}" cx="{across(x):.1f}" cy="{down(y):.1f}" r="2.5"/>')
        else:
            parts.append(
                f'<polyline class="{kind}" points="{points}"><title>{html.escape(each.name)}</title></polyline>'
            )
    return "".join(parts) + "</svg>" + _legend(drawn)


def ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers within [low, high]: multiples of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def _legend(series: Sequence[Series]) -> str:
    if len(series) < 2:
        return ""
    names = "".join(
        f'<li><span class="key c{each.colour % COLOURS}{" dashed" if each.dashed else ""}"></span>'
        f"{html.escape(each.name)}</li>"
        for each in series
    )
    return f'<ul class="legend">{names}</ul>'


def _finite(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    return [(x, y) for x, y in points if math.isfinite(x) and abs(y) < _LARGEST]


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Evenly, the last one kept: more than one a pixel cannot be seen."""
    stride = -(-len(points) // _MOST_POINTS)
    return points if stride <= 1 else points[-1::-stride][::-1]


def _range(values: list[float]) -> tuple[float, float]:
    """Of the axis. A first loss, or one step that went wrong, may be many times all others."""
    ordered = sorted(values)
    low, high = ordered[0], ordered[-1]
    usual = ordered[int(0.98 * (len(ordered) - 1))]
    if len(ordered) > 50 and high - low > 4 * (usual - low) > 0:
        high = low + 2 * (usual - low)
    if high <= low:
        margin = abs(low) / 10 or 1.0
        return low - margin, high + margin
    return low, high
