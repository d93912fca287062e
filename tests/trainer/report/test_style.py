"""Colors of the report: visible on their background, and told apart by people with each kind of color blindness."""

import itertools
import math

import pytest

from trainer.report import style

# Machado, Oliveira and Fernandes 2009, severity 1: linear RGB as people without one kind of cone see it.
VISIONS = {
    "normal": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "no red": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "no green": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "no blue": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def linear(color: str) -> list[float]:
    shares = [int(color[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    return [share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares]


def luminance(rgb: list[float]) -> float:
    return 0.2126 * rgb[0] + 0.7152 * rgb[1] + 0.0722 * rgb[2]


def contrast(one: str, other: str) -> float:
    """Contrast ratio of WCAG 2."""
    darker, lighter = sorted(luminance(linear(color)) for color in (one, other))
    return (lighter + 0.05) / (darker + 0.05)


def lab(rgb: list[float]) -> tuple[float, float, float]:
    red, green, blue = (min(1.0, max(0.0, value)) for value in rgb)
    x = (0.4124 * red + 0.3576 * green + 0.1805 * blue) / 0.9505
    z = (0.0193 * red + 0.1192 * green + 0.9505 * blue) / 1.089
    roots = [
        value ** (1 / 3) if value > 0.008856 else 7.787 * value + 16 / 116
        for value in (x, luminance([red, green, blue]), z)
    ]
    return 116 * roots[1] - 16, 500 * (roots[0] - roots[1]), 200 * (roots[1] - roots[2])


@pytest.mark.parametrize(
    ("colors", "paper"),
    [(style.LIGHT_COLORS, style.LIGHT_PAPER), (style.DARK_COLORS, style.DARK_PAPER)],
    ids=["light", "dark"],
)
def test_colors_are_visible_and_told_apart_by_everybody(colors: tuple[str, ...], paper: str) -> None:
    assert all(contrast(color, paper) >= 3 for color in colors)
    for name, matrix in VISIONS.items():
        seen = [lab([sum(map(float.__mul__, map(float, row), linear(color))) for row in matrix]) for color in colors]
        assert min(math.dist(one, other) for one, other in itertools.combinations(seen, 2)) > 18, name
        assert min(math.dist(one, other) for one, other in itertools.combinations(seen[:3], 2)) > 40, name
