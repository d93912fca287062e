"""Confusion matrices: a table for few classes, a picture and the most confused pairs for many."""

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image
from support.html_page import HtmlPage

from trainer.report.confusion import color_cells, confusion_html


def matrix(size: int) -> tuple[list[str], list[list[int]]]:
    """Returns names and counts: 50 correct predictions of each class, one mistake of class 3 as 5."""
    counts = [[50 * (true == predicted) for predicted in range(size)] for true in range(size)]
    counts[3][5] = 1
    return [f"class {number}" for number in range(size)], counts


def test_table_dims_zeros_and_shows_a_single_mistake() -> None:
    content = confusion_html(*matrix(10))
    assert content.count('<td class="zero">0</td>') == 89
    assert re.findall(r'<td class="miss" style="--share:(\d+)%">1</td>', content) == ["14"]
    assert re.findall(r'<td class="hit" style="--share:(\d+)%">50</td>', content)[:4] == ["100"] * 3 + ["98"]
    assert "scroll sideways" in HtmlPage(content).text


@pytest.mark.parametrize("size", [31, 100, 1000])
def test_picture_of_many_classes_has_a_visible_pixel_for_a_single_mistake(size: int) -> None:
    names, counts = matrix(size)
    content = confusion_html(names, counts)
    assert '<table class="confusion"' not in content
    assert HtmlPage(content).text.endswith("true class predicted class images class 3 class 5 1")
    ((width, data),) = re.findall(r'<img class="map" width="(\d+)".*?base64,([^"]*)"', content)
    assert 500 <= int(width) <= 1000 and len(data) < 100_000
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGBA"))
    cell = int(width) // size
    red, _, blue, opacity = pixels[3 * cell, 5 * cell]
    assert red > blue and opacity > 85  # orange; the rest of the row is not
    assert tuple(pixels[3 * cell, 3 * cell][:3]) == (42, 121, 214) and pixels[3 * cell, 6 * cell][3] == 0


def test_classes_without_mistakes_or_images_are_drawn() -> None:
    names = [f"c{index}" for index in range(40)]
    assert "no mistakes" in confusion_html(names, np.zeros((40, 40), dtype=int).tolist())
    colors = color_cells([[0, 0], [1, 3]])
    assert colors[0, :, 3].tolist() == [0, 0] and colors[1, 1, 3] == 0.75 and colors[1, 0, 3] == pytest.approx(0.67)
