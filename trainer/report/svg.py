"""Draws line charts as SVG text that needs no script, font or network. The page's style sheet sets the colors."""

import html
import math
from collections.abc import Sequence
from typing import NamedTuple

NUM_COLORS = 8
"""Lines use the CSS classes c0 to c7. The style sheet gives each class a color."""

_WIDTH, _HEIGHT = 480, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 12, 14, 38  # margins; tick labels need the left and bottom ones
_MAX_POINTS = 600  # per line
_MAX_VALUE = 1e100  # differences of larger values overflow, and a chart of them shows nothing


class Series(NamedTuple):
    """One line of a chart."""

    name: str
    points: Sequence[tuple[float, float]]
    color: int
    dashed: bool = False


class _Scale(NamedTuple):
    """Maps data coordinates to SVG coordinates. Values above y_max or below y_min are drawn at the edge."""

    x_min: float
    x_max: float
    y_min: float
    y_max: float

    def x(self, value: float) -> float:
        return _LEFT + (value - self.x_min) / (self.x_max - self.x_min) * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        share = (min(max(value, self.y_min), self.y_max) - self.y_min) / (self.y_max - self.y_min)
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)


def line_chart(
    series: Sequence[Series], x_label: str, y_label: str, percent: bool = False, from_zero: bool = False
) -> str:
    """Returns an SVG element and a legend, or an HTML paragraph "no <y_label> yet" if no series has a finite point.

    percent: label the y axis in percent.
    from_zero: include 0 in the y axis, which otherwise starts at the lowest value.
    """
    lines = [line._replace(points=_thin_out(_drawable(line.points))) for line in series]
    lines = [line for line in lines if line.points]
    if not lines:
        return f'<p class="empty">no {html.escape(y_label)} yet</p>'
    scale = _fit_scale(lines, from_zero)
    elements = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{html.escape(y_label)}">']
    elements += _axes(scale, x_label, percent)
    elements += [_line(line, scale) for line in lines]
    return "".join(elements) + "</svg>" + _legend(lines)


def ticks(low: float, high: float, target_count: int) -> list[float]:
    """Returns about target_count round numbers within [low, high]: multiples of 1, 2 or 5 times a power of ten."""
    rough_step = (high - low) / target_count
    power = 10.0 ** math.floor(math.log10(rough_step))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough_step * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def _fit_scale(lines: Sequence[Series], from_zero: bool) -> _Scale:
    xs = [x for line in lines for x, _ in line.points]
    y_min, y_max = _y_limits([y for line in lines for _, y in line.points] + [0.0] * from_zero)
    x_min, x_max = min(xs), max(xs)
    return _Scale(x_min, x_max if x_max > x_min else x_min + 1, y_min, y_max)


def _y_limits(values: list[float]) -> tuple[float, float]:
    """Returns the limits of the y axis. It cuts off rare outliers: the first loss, or the loss of one bad step, can be
    many times larger than all others and would flatten the curve."""
    ordered = sorted(values)
    low, high = ordered[0], ordered[-1]
    percentile_98 = ordered[int(0.98 * (len(ordered) - 1))]
    if len(ordered) > 50 and high - low > 4 * (percentile_98 - low) > 0:
        high = low + 2 * (percentile_98 - low)
    if high <= low:
        margin = abs(low) / 10 or 1.0
        return low - margin, high + margin
    return low, high


def _axes(scale: _Scale, x_label: str, percent: bool) -> list[str]:
    elements = []
    for tick in ticks(scale.y_min, scale.y_max, 5):
        y = scale.y(tick)
        text = f"{tick:,.10g}" if not percent else f"{100 * tick:.4g} %"
        elements.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        elements.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
    for tick in ticks(scale.x_min, scale.x_max, 6):
        x = scale.x(tick)
        elements.append(f'<text x="{x:.1f}" y="{_HEIGHT - _BOTTOM + 17}" text-anchor="middle">{tick:,.10g}</text>')
    center = (_LEFT + _WIDTH - _RIGHT) / 2
    elements.append(f'<text x="{center}" y="{_HEIGHT - 4}" text-anchor="middle">{html.escape(x_label)}</text>')
    return elements


def _line(line: Series, scale: _Scale) -> str:
    """Returns a polyline, or a dot for a single point."""
    css_class = f"line c{line.color % NUM_COLORS}" + (" dashed" if line.dashed else "")
    if len(line.points) == 1:
        x, y = line.points[0]
        return f'<circle class="{css_class}" cx="{scale.x(x):.1f}" cy="{scale.y(y):.1f}" r="2.5"/>'
    points = " ".join(f"{scale.x(x):.1f},{scale.y(y):.1f}" for x, y in line.points)
    return f'<polyline class="{css_class}" points="{points}"><title>{html.escape(line.name)}</title></polyline>'


def _legend(lines: Sequence[Series]) -> str:
    if len(lines) < 2:
        return ""
    items = "".join(
        f'<li><span class="key c{line.color % NUM_COLORS}{" dashed" if line.dashed else ""}"></span>'
        f"{html.escape(line.name)}</li>"
        for line in lines
    )
    return f'<ul class="legend">{items}</ul>'


def _drawable(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    return [(x, y) for x, y in points if math.isfinite(x) and abs(y) < _MAX_VALUE]


def _thin_out(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Keeps evenly spaced points, at most about one per pixel, and always the last point."""
    stride = -(-len(points) // _MAX_POINTS)
    return points if stride <= 1 else points[-1::-stride][::-1]
