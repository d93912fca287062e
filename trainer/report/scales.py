"""Chooses the range of a chart's axis, linear or logarithmic, and the round numbers that label it."""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

Kind = Literal["plain", "from_zero", "accuracy", "loss"]
"""What a y axis shows. from_zero: 0 is in the range. accuracy: shares, most of the axis for the later part of the
training. loss: logarithmic if the values span more than a decade."""

_LOG_RATIO = 20  # a loss that falls further than this is flat on a linear axis
_MAX_DECADES = 6  # a loss of 1e-15 must not flatten the rest
_MIN_POINTS_TO_CUT = 6  # a shorter curve is shown whole
_FIRST_EPOCHS = 2
_EARLY_SHARE = 0.15  # of the x axis: the first accuracies are far below all others and may leave the axis


class Scale(NamedTuple):
    """A range of values. Both ends are positive if it is logarithmic."""

    low: float
    high: float
    is_log: bool = False

    def share(self, value: float) -> float:
        """Returns where a value lies: 0 at the lower end, 1 at the upper end."""
        if not self.is_log:
            return (value - self.low) / (self.high - self.low)
        low, high = math.log(self.low), math.log(self.high)
        return (math.log(max(value, 1e-300)) - low) / (high - low)

    def ticks(self, target_count: int) -> list[float]:
        """Returns about target_count round numbers within the range."""
        if not self.is_log:
            return ticks(self.low, self.high, target_count)
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        factors = next(
            (f for f in ((1,), (1, 3), (1, 2, 5)) if len(f) * (len(decades) - 1) >= target_count - 1), (1, 2, 5)
        )
        values = [factor * 10.0**power for power in decades for factor in factors]
        return [value for value in values if self.low * 0.999 <= value <= self.high * 1.001]


def ticks(low: float, high: float, target_count: int) -> list[float]:
    """Returns about target_count round numbers within [low, high]: multiples of 1, 2 or 5 times a power of ten."""
    step = _tick_step(low, high, target_count)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def _tick_step(low: float, high: float, target_count: int) -> float:
    rough_step = (high - low) / target_count
    power = 10.0 ** math.floor(math.log10(rough_step))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough_step * 0.999)


def fit_x(values: Sequence[float]) -> Scale:
    """Returns the range of an axis of epochs. It begins at 0, unless all values are in its second half."""
    low, high = min(values), max(values)
    if 0 <= low <= max(high / 2, _FIRST_EPOCHS) or low == high > 0:
        low = 0.0
    return Scale(low, high if high > low else low + 1)


def fit_y(points: Sequence[tuple[float, float]], kind: Kind) -> Scale:
    """Returns the range of a y axis for points (x, y)."""
    values = sorted(y for _, y in points)
    if kind == "accuracy" and 0 <= values[0] <= values[-1] <= 1:
        return _fit_accuracy(points)
    if kind == "loss" and (scale := _fit_log(values)) is not None:
        return scale
    return _fit_linear(sorted([*values, 0.0]) if kind == "from_zero" else values)


def _fit_linear(ordered: Sequence[float]) -> Scale:
    """Cuts off rare outliers: the first loss, or that of one bad step, can be many times larger than all others."""
    low, high = ordered[0], ordered[-1]
    percentile_98 = ordered[int(0.98 * (len(ordered) - 1))]
    if len(ordered) > 50 and high - low > 4 * (percentile_98 - low) > 0:
        high = low + 2 * (percentile_98 - low)
    if high <= low:
        margin = abs(low) / 10 or 1.0
        return Scale(low - margin, high + margin)
    return Scale(low, high)


def _fit_log(ordered: Sequence[float]) -> Scale | None:
    """Returns a logarithmic range, or None if a linear one shows the values better."""
    positive = [value for value in ordered if value > 0]
    if len(positive) < 0.9 * len(ordered) or positive[-1] < _LOG_RATIO * positive[0]:
        return None
    median = positive[len(positive) // 2]
    low = max(positive[0], median / 10 ** (_MAX_DECADES / 2))
    return Scale(low, min(positive[-1], median * 10 ** (_MAX_DECADES / 2)), is_log=True)


def _fit_accuracy(points: Sequence[tuple[float, float]]) -> Scale:
    """Returns a range that the later part of the training fills, up to 100 % if it comes near."""
    start = min(x for x, _ in points)
    end = max(x for x, _ in points)
    is_long = len({x for x, _ in points}) >= _MIN_POINTS_TO_CUT
    late = sorted(y for x, y in points if not is_long or x >= start + _EARLY_SHARE * (end - start))
    lowest, highest = min(y for _, y in points), max(y for _, y in points)
    low = late[len(late) // 50]
    high = 1.0 if highest - low >= (1 - low) / 2 else highest + (highest - low) / 20
    if high <= low:
        high, low = low + 0.01, low - 0.01
    if high == 1.0:
        low = min(low, 0.99)
    if lowest >= low - (high - low) / 3:
        low = lowest
    step = _tick_step(low, high, 5)
    return Scale(math.floor(low / step + 1e-9) * step, high)
