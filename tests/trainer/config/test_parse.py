"""Tests the text formats of times, step ranges and named learning rates."""

import math

import pytest

from trainer.config.parse import parse_name_and_rate, parse_seconds, parse_step_range


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("5400", 5400), ("90m", 5400), ("1h30m", 5400), ("1:30:00", 5400), ("90:00", 5400), ("2d3s", 172803),
        ("2-12:00:00", 216000), ("2-12:00", 216000), (" 5s ", 5),
        ("", None), ("soon", None), ("1.5h", None), ("-5", None),
    ],
)  # fmt: skip
def test_seconds(text: str, seconds: float | None) -> None:
    assert parse_seconds(text) == seconds


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("steps 10-20", (10, 20)),
        ("10 - 20", (10, 20)),
        ("step 3-3", (3, 3)),
        ("0-5", None),
        ("20-10", None),
        ("x", None),
    ],
)
def test_step_range(text: str, steps: tuple[int, int] | None) -> None:
    assert parse_step_range(text) == steps


def test_name_and_rate() -> None:
    assert parse_name_and_rate("features.0=1e-3") == ("features.0", 0.001)
    name, rate = parse_name_and_rate("features=fast")
    assert name == "features=fast" and math.isnan(rate)
