"""Line charts as SVG text."""

import itertools
import re

import numpy as np
import pytest

from trainer.report.scales import ticks
from trainer.report.svg import Mark, Series, line_chart

LEFT, RIGHT, TOP, BOTTOM = 56, 480 - 12, 14, 250 - 38  # edges of the plot area, in SVG units


def line_points(text: str) -> list[list[tuple[float, float]]]:
    """Returns the SVG coordinates of each polyline."""
    polylines = re.findall(r'points="([^"]*)"', text)
    return [[tuple(map(float, pair.split(","))) for pair in line.split()] for line in polylines]  # type: ignore[misc]


def test_line_spans_the_plot_area() -> None:
    ((first, last),) = line_points(line_chart([Series("a", [(0, 0), (10, 5)], 0)], "x", "y"))
    assert first == (LEFT, BOTTOM) and last == (RIGHT, TOP)  # SVG's y grows downwards


def test_values_that_are_not_finite_are_left_out() -> None:
    chart = line_chart([Series("a", [(0, float("nan")), (1, 2.0), (2, 3.0)], 0)], "x", "y")
    assert [len(line) for line in line_points(chart)] == [2]


def test_single_point_is_a_dot() -> None:
    chart = line_chart([Series("a", [(1, 2.0)], 0)], "x", "y")
    assert "<circle" in chart and not line_points(chart)


@pytest.mark.parametrize("points", [[], [(0, 1e308), (1, -1e308)], [(0, float("inf"))]])
def test_chart_without_drawable_points_says_so(points: list[tuple[float, float]]) -> None:
    assert "no y yet" in line_chart([Series("a", points, 0)], "x", "y")


def test_single_outlier_does_not_flatten_the_curve() -> None:
    values: list[tuple[float, float]] = [(x, 1 + x / 100) for x in range(100)]
    values[50] = (50, 1e6)
    (points,) = line_points(line_chart([Series("a", values, 0)], "x", "y"))
    assert points[-1][1] < 150  # well above the axis
    assert points[50][1] == TOP  # the outlier is drawn at the edge


def test_from_zero_includes_zero_in_the_y_axis() -> None:
    series = [Series("a", [(0, 4), (1, 5)], 0)]
    ((first, _),) = line_points(line_chart(series, "x", "y", "from_zero"))
    assert first[1] == pytest.approx(TOP + (BOTTOM - TOP) / 5, abs=0.1)


def test_accuracies_are_labeled_in_percent() -> None:
    series = [Series("a", [(0, 0), (1, 1)], 0)]
    assert ">80 %<" in line_chart(series, "x", "y", "accuracy") and ">0.4<" in line_chart(series, "x", "y")


def test_hovering_shows_the_values_of_all_lines_at_a_place() -> None:
    chart = line_chart([Series("a<b", [(0, 0.5), (10, 0.25)], 0), Series("c", [(10, 1234.5)], 1)], "epoch", "y")
    texts = re.findall(r'<g class="at">.*?<text.*?>(.*?)</text>', chart)
    plain = [" ".join(re.findall(r">([^<>]+)</tspan>", text)) for text in texts]
    assert plain == ["epoch 0 a&lt;b 0.5", "epoch 10 a&lt;b 0.25 c 1,234"]


def test_columns_for_the_pointer_cover_the_plot_without_gaps() -> None:
    chart = line_chart([Series("a", [(x, x % 7) for x in range(500)], 0)], "epoch", "y")
    rects = re.findall(r'<g class="at"><rect x="([\d.]+)" y="14" width="([\d.]+)"', chart)
    assert len(rects) <= 60 and float(rects[0][0]) == LEFT
    assert float(rects[-1][0]) + float(rects[-1][1]) == pytest.approx(RIGHT, abs=1)
    for (left, width), (next_left, _) in itertools.pairwise(rects):
        assert float(left) + float(width) == pytest.approx(float(next_left), abs=1)


def test_mark_is_a_line_with_a_text() -> None:
    chart = line_chart([Series("a", [(0, 0), (10, 5)], 0)], "x", "y", mark=Mark(10, "best <1>"))
    assert f'<line class="mark" x1="{RIGHT:.1f}" x2="{RIGHT:.1f}"' in chart and "best &lt;1&gt;</text>" in chart
    assert '<line class="mark"' not in line_chart([Series("a", [(0, 0), (1, 5)], 0)], "x", "y", mark=Mark(10, "far"))


def test_band_goes_along_the_highest_and_back_along_the_lowest_values() -> None:
    line = Series("a", [(0, 1), (10, 2)], 0, band=[(0, 0, 2), (10, 1, 4)])
    chart = line_chart([line, Series("b", [(0, 0), (10, 4)], 1)], "x", "y")
    (points,) = re.findall(r'<polygon class="band c0" points="([^"]*)"', chart)
    assert points.split() == [f"{LEFT:.1f},113.0", f"{RIGHT:.1f},14.0", f"{RIGHT:.1f},162.5", f"{LEFT:.1f},212.0"]


def test_legend_names_lines_and_escapes_them() -> None:
    chart = line_chart([Series("a<b", [(0, 0), (1, 1)], 0), Series("c", [(0, 1), (1, 0)], 9)], "x", "y")
    assert "a&lt;b</li>" in chart and 'class="key c1"' in chart  # the ninth color is the first again


def test_ticks_are_round() -> None:
    assert ticks(0, 1, 5) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    assert ticks(0.13, 0.97, 5) == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert ticks(3400, 5400, 5) == pytest.approx([3500, 4000, 4500, 5000])


def test_many_points_are_thinned_out_and_the_last_one_stays() -> None:
    values = [(float(x), float(np.sin(x / 500))) for x in range(5000)]
    last_point_only = Series("b", values[-1:], 1)  # the x axis ends there, whichever points of the first series stay
    (points,) = line_points(line_chart([Series("a", values, 0), last_point_only], "x", "y"))
    assert 500 < len(points) <= 601 and points[-1][0] == RIGHT
