"""Shows a confusion matrix: as a table for few classes, as a picture with a list of the most confused pairs for many.

Mistakes have another color than correct predictions, and even a single one is visible. Zeros are faint.
"""

import base64
import heapq
import html
import io
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from trainer.report.style import table

MAX_TABLE_CLASSES = 30  # the numbers in the cells of a larger matrix are too small to read
_MAX_CONFUSED_PAIRS = 30
_MAP_SIZE = 600  # pixels; a cell has at least one
_CORRECT, _MISTAKE = (42, 121, 214), (222, 94, 30)  # visible on white and on black
_LEVELS = 100
_SMALL_CELL = 2  # pixels; faint colors are not seen in it


def confusion_html(names: Sequence[str], confusion: Sequence[Sequence[int]]) -> str:
    """Returns a heading and the matrix confusion[true class][predicted class] of counts."""
    if len(names) <= MAX_TABLE_CLASSES:
        return _table(names, confusion)
    return _picture(confusion) + most_confused_pairs(names, confusion)


def shares(confusion: Sequence[Sequence[int]]) -> NDArray[np.float64]:
    """Returns the cells' shares of their rows: [true, predicted], in [0, 1]."""
    counts = np.array(confusion, dtype=np.float64)
    totals: NDArray[np.float64] = np.maximum(1, counts.sum(1, keepdims=True))
    return counts / totals


def color_cells(confusion: Sequence[Sequence[int]], faintest: float = 0.34) -> NDArray[np.float64]:
    """Returns RGBA in [0, 1] for each cell: correct predictions blue, mistakes orange, zeros transparent.

    faintest: opacity of the rarest mistakes.
    """
    cell_shares = shares(confusion)
    is_correct = np.eye(len(cell_shares), dtype=bool)
    colors = np.where(is_correct[..., None], _CORRECT, _MISTAKE) / 255
    opacity = np.where(is_correct, cell_shares, faintest + (1 - faintest) * np.sqrt(cell_shares)) * (cell_shares > 0)
    return np.concatenate([colors, opacity[..., None]], axis=2)


def _table(names: Sequence[str], confusion: Sequence[Sequence[int]]) -> str:
    header = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in names)
    body = ""
    for true, (name, row) in enumerate(zip(names, confusion, strict=True)):
        total = max(1, sum(row))
        cells = "".join(_cell(count, total, true == predicted) for predicted, count in enumerate(row))
        body += f'<tr><th scope="row" title="{html.escape(name)}">{html.escape(name)}</th>{cells}</tr>'
    return (
        "<h3>Confusion matrix</h3><p>rows: true class; columns: predicted class</p>"
        '<p class="hint">scroll sideways for more columns</p>'
        f'<div class="wide"><table class="confusion"><tr><td></td>{header}</tr>{body}</table></div>'
    )


def _cell(count: int, total: int, is_correct: bool) -> str:
    """The style sheet colors a cell by its share of its row. The root makes rare mistakes visible."""
    if not count:
        return '<td class="zero">0</td>'
    share = count / total if is_correct else (count / total) ** 0.5
    return f'<td class="{"hit" if is_correct else "miss"}" style="--share:{100 * share:.0f}%">{count:,}</td>'


def _picture(confusion: Sequence[Sequence[int]]) -> str:
    scale = max(1, _MAP_SIZE // len(confusion))
    size = scale * len(confusion)
    return (
        "<h3>Confusion matrix</h3><p>rows: true class; columns: predicted class; blue: correct; orange: mistakes, "
        'at least one image each</p><p class="hint">scroll sideways for more columns</p>'
        f'<div class="wide"><img class="map" width="{size}" height="{size}" alt="confusion matrix" '
        f'src="data:image/png;base64,{_png(confusion, scale)}"></div>'
    )


def _png(confusion: Sequence[Sequence[int]], scale: int) -> str:
    """Returns base64 of a PNG file with a palette: thousands of classes make it megabytes otherwise."""
    colors = color_cells(confusion, faintest=0.34 if scale > _SMALL_CELL else 0.7)
    levels = np.ceil(colors[..., 3] * _LEVELS).astype(np.uint8)
    indices = levels + np.where(np.eye(len(levels), dtype=bool), 0, _LEVELS + 1).astype(np.uint8) * (levels > 0)
    image = Image.fromarray(indices.repeat(scale, 0).repeat(scale, 1), "P")
    image.putpalette([*_CORRECT * (_LEVELS + 1), *_MISTAKE * (_LEVELS + 1)])
    opacities = bytes(round(255 * level / _LEVELS) for level in range(_LEVELS + 1))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", transparency=opacities * 2, optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def most_confused_pairs(names: Sequence[str], confusion: Sequence[Sequence[int]]) -> str:
    """Returns a table of the most frequent mistakes."""
    mistakes = (
        (count, names[true], names[predicted])
        for true, row in enumerate(confusion)
        for predicted, count in enumerate(row)
        if count and true != predicted
    )
    most_frequent = heapq.nlargest(_MAX_CONFUSED_PAIRS, mistakes)
    rows = [[true, predicted, f"{count:,}"] for count, true, predicted in most_frequent]
    content = table(("true class", "predicted class", "images"), rows) if rows else "<p>no mistakes</p>"
    return f"<h3>Most frequent mistakes</h3>{content}"
