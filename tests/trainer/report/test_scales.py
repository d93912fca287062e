"""Ranges of axes: what matters fills the axis, whatever the values are."""

import math
import random

import pytest

from trainer.report.scales import Kind, fit_x, fit_y


def learning_curve(last: float) -> list[tuple[float, float]]:
    return [(epoch, last - (last - 0.1) * math.exp(-epoch)) for epoch in range(21)]


def test_accuracy_axis_shows_the_late_part_and_a_tick_at_100_percent() -> None:
    scale = fit_y(learning_curve(0.986), "accuracy")
    assert scale.high == 1.0 and 0.9 <= scale.low < 0.97  # the curve begins at 10 %
    assert scale.ticks(5)[-1] == pytest.approx(1.0)
    assert fit_y(learning_curve(0.5), "accuracy").high < 0.6


def test_accuracy_axis_shows_the_whole_curve_if_it_fits() -> None:
    assert fit_y([(0, 0.91), (1, 0.95), (2, 0.96)], "accuracy").low <= 0.91


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_constant_accuracy_is_within_its_axis(value: float) -> None:
    scale = fit_y([(0, value), (1, value)], "accuracy")
    assert scale.low < scale.high and 0 <= scale.share(value) <= 1


def test_loss_over_decades_has_a_logarithmic_axis() -> None:
    scale = fit_y([(x, 2.3 * 0.7**x) for x in range(20)], "loss")
    assert scale.is_log and scale.share(2.3) == pytest.approx(1) and scale.ticks(5) == pytest.approx([0.01, 0.1, 1])
    assert not fit_y([(x, 2.3 - x / 20) for x in range(20)], "loss").is_log


def test_loss_of_zero_and_one_outlier_do_not_flatten_the_curve() -> None:
    values = [(x, 1 + x / 100) for x in range(100)]
    assert fit_y([*values, (100, 1e9)], "loss").share(1.5) > 0.05
    assert fit_y([*values, (100, 1e-12)], "loss").share(1.0) > 0.2


def test_x_axis_of_a_single_point_begins_at_zero() -> None:
    assert fit_x([1.18]) == (0.0, 1.18, False) and fit_x([0.0]) == (0.0, 1.0, False)
    assert fit_x([20.0, 25.0]).low == 20  # a run that branched off


@pytest.mark.parametrize("kind", ["plain", "from_zero", "accuracy", "loss"])
def test_any_values_give_an_axis_with_ticks(kind: Kind) -> None:
    draw = random.Random(0)
    for _ in range(300):
        size, power = draw.choice([1, 2, 3, 60]), draw.choice([-12, -3, 0, 3, 90])
        sign = draw.choice([1, 1, -1])
        points = [(draw.random() * 9, sign * draw.choice([0, 1, draw.random()]) * 10.0**power) for _ in range(size)]
        scale = fit_y(points, kind)
        assert scale.low < scale.high and math.isfinite(scale.high - scale.low)
        assert all(-1e-6 <= scale.share(tick) <= 1 + 1e-6 for tick in scale.ticks(5)) and len(scale.ticks(5)) < 40
