"""Draws line charts as SVG text that needs no script, font or network. The page's style sheet sets the colors.

The values at a point appear when the pointer, or a finger, is over it.
"""

import bisect
import html
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

from trainer.report.scales import Kind, Scale, fit_x, fit_y

NUM_COLORS = 8
"""Lines use the CSS classes c0 to c7. The style sheet gives each class a color."""

_WIDTH, _HEIGHT = 480, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 12, 14, 38  # margins; tick labels need the left and bottom ones
_PLOT_WIDTH, _PLOT_HEIGHT = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
_MAX_POINTS = 600  # per line
_DOT = 4  # units around the plot in which dots are still shown
_MAX_DOTS = 30  # a line with at most this many points shows each of them
_MAX_VALUE = 1e100  # differences of larger values overflow, and a chart of them shows nothing
_MAX_COLUMNS = 60  # places where the pointer shows values
_MAX_COLUMN_VALUES = 700  # in all columns of a chart: they make up most of a page
_MAX_TIP_LINES = 12
_LINE_HEIGHT, _CHARACTER_WIDTH = 15, 7.2  # of the text beside the pointer


class Series(NamedTuple):
    """One line of a chart."""

    name: str
    points: Sequence[tuple[float, float]]
    color: int
    dashed: bool = False
    band: Sequence[tuple[float, float, float]] = ()
    """x, lowest and highest value; the line is the mean of the values"""


class Mark(NamedTuple):
    """A vertical line with a text."""

    x: float
    text: str


class _Scales(NamedTuple):
    """Maps data coordinates to SVG coordinates."""

    x_scale: Scale
    y_scale: Scale

    def x(self, value: float) -> float:
        return _LEFT + self.x_scale.share(value) * _PLOT_WIDTH

    def y(self, value: float) -> float:
        """Values above the axis are drawn at its edge. Values below it are outside the visible part."""
        return _HEIGHT - _BOTTOM - min(max(self.y_scale.share(value), -1.0), 1.0) * _PLOT_HEIGHT


def line_chart(
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    kind: Kind = "plain",
    mark: Mark | None = None,
    has_legend: bool = True,
) -> str:
    """Returns an SVG element and a legend, or an HTML paragraph "no <y_label> yet" if no series has a finite point.

    kind: which y axis suits the values; accuracies are labeled in percent.
    """
    lines = [line._replace(points=_thin_out(_drawable(line.points))) for line in series]
    lines = [line for line in lines if line.points]
    if not lines:
        return f'<p class="empty">no {html.escape(y_label)} yet</p>'
    points = [point for line in lines for point in line.points]
    scales = _Scales(fit_x([x for x, _ in points]), fit_y(points, kind))
    label = y_label + (", logarithmic axis" if scales.y_scale.is_log else "")
    left, top, width = _LEFT - _DOT, _TOP - _DOT, _PLOT_WIDTH + 2 * _DOT  # dots at the edges are not cut
    height = _PLOT_HEIGHT + 2 * _DOT
    elements = [
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{html.escape(label)}">',
        *_axes(scales, x_label, is_percent=kind == "accuracy"),
        # hides what is outside
        f'<svg x="{left}" y="{top}" width="{width}" height="{height}" viewBox="{left} {top} {width} {height}">',
        *(_band(line, scales) for line in lines if line.band),
        *(_line(line, scales) for line in lines),
        "</svg>",
        _draw_mark(mark, scales) if mark is not None else "",
        *_columns(lines, scales, x_label, is_percent=kind == "accuracy"),
        "</svg>",
    ]
    return "".join(elements) + (legend(lines) if has_legend and len(lines) > 1 else "")


def legend(lines: Sequence[Series]) -> str:
    """Returns the list of the lines' colors and names."""
    items = "".join(
        f'<li><span class="key c{line.color % NUM_COLORS}{" dashed" if line.dashed else ""}"></span>'
        f"{html.escape(line.name)}</li>"
        for line in lines
    )
    return f'<ul class="legend">{items}</ul>'


def _axes(scales: _Scales, x_label: str, is_percent: bool) -> list[str]:
    elements = []
    for tick in scales.y_scale.ticks(5):
        y = scales.y(tick)
        text = f"{tick:,.10g}" if not is_percent else f"{100 * tick:.4g} %"
        elements.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        elements.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
    for tick in scales.x_scale.ticks(6):
        x = scales.x(tick)
        elements.append(f'<text x="{x:.1f}" y="{_HEIGHT - _BOTTOM + 17}" text-anchor="middle">{tick:,.10g}</text>')
    center = (_LEFT + _WIDTH - _RIGHT) / 2
    elements.append(f'<text x="{center}" y="{_HEIGHT - 4}" text-anchor="middle">{html.escape(x_label)}</text>')
    return elements


def _line(line: Series, scales: _Scales) -> str:
    """Returns a polyline, with dots if it has few points; only a dot for a single point."""
    color = f"c{line.color % NUM_COLORS}"
    css_class = f"line {color}" + (" dashed" if line.dashed else "")
    places = [(f"{scales.x(x):.1f}", f"{scales.y(y):.1f}") for x, y in line.points]
    if len(places) == 1:
        return f'<circle class="{css_class}" cx="{places[0][0]}" cy="{places[0][1]}" r="3.5"/>'
    dots = "".join(f'<circle class="dot {color}" cx="{x}" cy="{y}" r="2.2"/>' for x, y in places[: _MAX_DOTS + 1])
    polyline = f'<polyline class="{css_class}" points="{" ".join(f"{x},{y}" for x, y in places)}"/>'
    return polyline + (dots if len(places) <= _MAX_DOTS and not line.dashed else "")


def _band(line: Series, scales: _Scales) -> str:
    upper = [f"{scales.x(x):.1f},{scales.y(high):.1f}" for x, _, high in line.band]
    lower = [f"{scales.x(x):.1f},{scales.y(low):.1f}" for x, low, _ in line.band]
    return f'<polygon class="band c{line.color % NUM_COLORS}" points="{" ".join([*upper, *reversed(lower)])}"/>'


def _draw_mark(mark: Mark, scales: _Scales) -> str:
    x = scales.x(mark.x)
    if not _LEFT <= x <= _WIDTH - _RIGHT + 0.5:
        return ""
    is_right = x > _LEFT + _PLOT_WIDTH / 2
    text = f'<text class="mark" x="{x + (-4 if is_right else 4):.1f}" y="{_TOP - 3}"'
    anchor = ' text-anchor="end"' if is_right else ""
    return (
        f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP - 12}" y2="{_HEIGHT - _BOTTOM}"/>'
        f"{text}{anchor}>{html.escape(mark.text)}</text>"
    )


def _columns(lines: Sequence[Series], scales: _Scales, x_label: str, is_percent: bool) -> list[str]:
    """Returns narrow columns over the plot. Each shows the nearest value of each line while the pointer is over it."""
    count = max(1, min(_MAX_COLUMNS, _MAX_COLUMN_VALUES // len(lines)))
    places: dict[int, float] = {}
    for x in sorted({x for line in lines for x, _ in line.points}):  # the last x in each column
        places[min(int(scales.x_scale.share(x) * count), count - 1)] = x
    positions = list(places.values())
    centers = [scales.x(x) for x in positions]
    edges = [_LEFT, *((a + b) / 2 for a, b in itertools.pairwise(centers)), _WIDTH - _RIGHT]
    width = (scales.x_scale.high - scales.x_scale.low) / count
    columns = []
    for index, position in enumerate(positions):
        values = [(line, *point) for line in lines if (point := _nearest(line.points, position, width)) is not None]
        columns.append(_column(values, position, (edges[index], edges[index + 1]), scales, x_label, is_percent))
    return columns


def _nearest(points: Sequence[tuple[float, float]], x: float, width: float) -> tuple[float, float] | None:
    """Returns the point next to x; None if it is farther away than the points are from each other."""
    index = bisect.bisect_left(points, x, key=lambda point: point[0])
    near = points[max(0, index - 1) : index + 1]
    point = min(near, key=lambda point: abs(point[0] - x))
    spacing = (points[-1][0] - points[0][0]) / max(1, len(points) - 1)
    return point if abs(point[0] - x) <= max(width, spacing) else None


def _column(
    values: Sequence[tuple[Series, float, float]],
    position: float,
    edges: tuple[float, float],
    scales: _Scales,
    x_label: str,
    is_percent: bool,
) -> str:
    center = scales.x(position)
    texts = [f"{x_label} {position:.4g}"]
    texts += [f"{line.name} {f'{y:.2%}' if is_percent else f'{y:,.4g}'}" for line, _, y in values[:_MAX_TIP_LINES]]
    texts += [f"and {len(values) - _MAX_TIP_LINES} more"] if len(values) > _MAX_TIP_LINES else []
    width = 14 + _CHARACTER_WIDTH * max(map(len, texts))
    left = max(0, center - width - 8) if center > _LEFT + _PLOT_WIDTH / 2 else min(center + 8, _WIDTH - width)
    colors = ["", *(f' class="c{line.color % NUM_COLORS}"' for line, _, _ in values), ""]
    spans = "".join(
        f'<tspan x="{left + 7:.0f}" dy="{_LINE_HEIGHT if index else 0}"{color}>{html.escape(text)}</tspan>'
        for index, (text, color) in enumerate(zip(texts, colors, strict=False))
    )
    dots = "".join(
        f'<circle class="dot c{line.color % NUM_COLORS}" cx="{scales.x(x):.0f}" cy="{scales.y(y):.0f}" r="4"/>'
        for line, x, y in values
        if scales.y_scale.share(y) >= 0
    )
    return (
        f'<g class="at"><rect x="{edges[0]:.0f}" y="{_TOP}" width="{edges[1] - edges[0]:.1f}" height="{_PLOT_HEIGHT}"/>'
        f'<g class="tip"><line x1="{center:.0f}" x2="{center:.0f}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}"/>{dots}'
        f'<rect x="{left:.0f}" y="{_TOP}" width="{width:.0f}" height="{_LINE_HEIGHT * len(texts) + 8}" rx="4"/>'
        f'<text y="{_TOP + 15}">{spans}</text></g></g>'
    )


def _drawable(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    return [(x, y) for x, y in points if math.isfinite(x) and abs(y) < _MAX_VALUE]


def _thin_out(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Keeps evenly spaced points, at most about one per pixel, and always the last point."""
    stride = -(-len(points) // _MAX_POINTS)
    return points if stride <= 1 else points[-1::-stride][::-1]
