"""Tests the formats of durations."""

import pytest

from trainer.format import format_duration


@pytest.mark.parametrize(
    ("seconds", "text"), [(5.23, "5.2 s"), (59.4, "59.4 s"), (59.6, "1:00"), (475, "7:55"), (11275, "3:07:55")]
)
def test_duration_format(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
