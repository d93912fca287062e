"""Draws a run's PNG figures with matplotlib: curves, class scores, confusion matrix, mistakes, first batch, features.

The charts of report.html are in results.py and svg.py.

Does not import torch. Does not use matplotlib.pyplot, which looks for a display.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from trainer.run.files import replace_file
from trainer.run.record import RunRecord
from trainer.tracking.example import Example

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from trainer.tracking.tracker import Picture  # uint8 [H, W, 3]; not imported at run time because it imports torch

FIGURES_FOLDER = "figures"
FIRST_BATCH_FIGURE = "samples"
EVALUATION_FIGURES = ("classes", "confusion", "mistakes")
CURVES = (("loss", "loss"), ("accuracy", "accuracy"), ("lr", "learning rate"), ("samples_per_second", "images/s"))
"""(key of a row of metrics.jsonl, title of its chart)"""
MAX_CONFUSION_CLASSES = 30  # the numbers in the cells of a larger matrix are too small to read

_DOTS_PER_INCH = 110
_MAX_BARS = 50
_MAX_TILES = 64
_MISTAKES_PER_ROW = 6
_CELL_WIDTH, _CELL_HEIGHT, _TILE_SIZE, _GAP = 165, 180, 128, 6  # pixels, of the figure of mistakes


def draw_run_figures(record: RunRecord, mistakes: Sequence[Example]) -> "dict[str, Picture]":
    """Returns `curves`, `classes`, `confusion` and `mistakes`, without those that the run has no data for yet."""
    pictures = {}
    if record.rows:
        pictures["curves"] = _draw_curves(record)
    if classes := record.evaluation.get("classes", []):
        pictures["classes"] = _draw_classes(classes)
        pictures["confusion"] = _draw_confusion([row["name"] for row in classes], record.evaluation["confusion"])
    if mistakes:
        pictures["mistakes"] = _draw_mistakes(mistakes)
    return pictures


def write_figures(pictures: "Mapping[str, Picture]", folder: Path) -> None:
    """Writes folder/NAME.png for each picture, atomically. Raises OSError."""
    for name, picture in pictures.items():
        path = folder / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(picture)
        replace_file(path, lambda partial, image=image: image.save(partial, "PNG"))  # type: ignore[misc]


def draw_first_batch(stored: NDArray[np.uint8], trained_on: NDArray[np.uint8]) -> "Picture":
    """Draws the stored images beside the images that the network gets. Both are uint8 [n, H, W, C]."""
    figure = _new_figure(8, 4.6)
    for column, (title, images) in enumerate((("stored images", stored), ("augmented training input", trained_on))):
        axes = figure.add_subplot(1, 2, column + 1)
        axes.imshow(_tile(images), interpolation="nearest")
        axes.set_title(title, fontsize=10)
        axes.set_axis_off()
    return _render(figure)


def draw_feature_maps(layer: str, image: NDArray[np.uint8], maps: NDArray[np.float32]) -> "Picture":
    """Draws an image beside the first 64 feature maps of a layer, each map scaled to its own range.

    image: uint8 [H, W, C]. maps: float32 [channels, h, w].
    """
    import matplotlib

    shown = maps[:_MAX_TILES]
    low, high = (limit(axis=(1, 2), keepdims=True) for limit in (shown.min, shown.max))
    span = np.where(high > low, high - low, 1)
    colored = matplotlib.colormaps["viridis"]((shown - low) / span, bytes=True)[..., :3]
    figure = _new_figure(8, 5.6)
    left, right = figure.subplots(1, 2, width_ratios=[1, 4])
    left.imshow(_tile(image[None]), interpolation="nearest")
    left.set_title("input image", fontsize=10)
    right.imshow(_tile(colored), interpolation="nearest")
    count = f"{len(shown)} of {len(maps)}" if len(shown) < len(maps) else str(len(maps))
    right.set_title(f"{layer}: {count} feature maps, {maps.shape[1]} x {maps.shape[2]} pixels", fontsize=10)
    for axes in (left, right):
        axes.set_axis_off()
    return _render(figure)


def _draw_curves(record: RunRecord) -> "Picture":
    num_rows = math.ceil(len(CURVES) / 2)
    figure = _new_figure(9, 3 * num_rows, layout=None)
    figure.subplots_adjust(left=0.09, right=0.98, bottom=0.08, top=0.95, wspace=0.2, hspace=0.32)
    for index, (key, title) in enumerate(CURVES):
        axes = figure.add_subplot(num_rows, 2, index + 1)
        for split in ("train", "test", "validation"):
            if points := record.points(split, key):
                axes.plot(*zip(*points, strict=True), label=split, marker="o" if len(points) < 30 else None, ms=3)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize=8)
        if key == "samples_per_second":
            axes.set_ylim(bottom=0)
    return _render(figure)


def _draw_classes(classes: Sequence[Mapping[str, Any]]) -> "Picture":
    """Draws bars of precision, recall and F1 for each class."""
    shown = classes[:_MAX_BARS]
    figure = _new_figure(7, 1.2 + 0.42 * len(shown))
    axes = figure.add_subplot()
    rows = np.arange(len(shown))
    for offset, key in ((-0.27, "precision"), (0.0, "recall"), (0.27, "f1")):
        axes.barh(rows + offset, [row[key] for row in shown], height=0.25, label=key)
    axes.set_yticks(rows, [row["name"] for row in shown])
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize=8, loc="lower right", bbox_to_anchor=(1, 1), ncols=3, frameon=False)
    limit = f" (first {len(shown)} of {len(classes)})" if len(shown) < len(classes) else ""
    axes.set_title(f"test set by class{limit}", fontsize=10, loc="left")
    return _render(figure)


def _draw_confusion(names: Sequence[str], matrix: Sequence[Sequence[int]]) -> "Picture":
    """Draws matrix[true class][predicted class]. A cell's color is its share of its row."""
    counts = np.array(matrix, dtype=np.float64)
    shares = counts / np.maximum(1, counts.sum(1, keepdims=True))
    size = min(12.0, 3.0 + 0.5 * len(names))
    figure = _new_figure(size, size)
    axes = figure.add_subplot()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    axes.set_title("confusion matrix, test set", fontsize=10)
    if len(names) <= MAX_CONFUSION_CLASSES:
        axes.set_xticks(range(len(names)), names, rotation=60, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(len(names)), names)
        for (row, column), count in np.ndenumerate(counts):
            if count:
                color = "white" if shares[row, column] > 0.5 else "black"
                text = axes.text(column, row, f"{count:.0f}", ha="center", va="center", fontsize=8, color=color)
                text.set_in_layout(False)  # it fits its cell, and the layout of 100 texts is slow
    return _render(figure)


def _draw_mistakes(mistakes: Sequence[Example]) -> "Picture":
    """Pastes all images into one sheet: separate axes for each image take five times as long."""
    columns = min(_MISTAKES_PER_ROW, len(mistakes))
    rows = -(-len(mistakes) // columns)
    sheet = np.full((rows * _CELL_HEIGHT, columns * _CELL_WIDTH, 3), 255, dtype=np.uint8)
    sheet_height, sheet_width = sheet.shape[:2]
    figure = _new_figure(sheet_width / _DOTS_PER_INCH, sheet_height / _DOTS_PER_INCH, layout=None)
    for index, mistake in enumerate(mistakes):
        cell_row, cell_column = divmod(index, columns)
        image = mistake.image().convert("RGB")
        image.thumbnail((_TILE_SIZE, _TILE_SIZE))
        scale = max(1, _TILE_SIZE // max(image.size))
        tile = np.asarray(image).repeat(scale, axis=0).repeat(scale, axis=1)
        height, width = tile.shape[:2]
        bottom = (cell_row + 1) * _CELL_HEIGHT - _GAP
        center = cell_column * _CELL_WIDTH + _CELL_WIDTH // 2
        top, left = bottom - height, center - width // 2
        sheet[top:bottom, left : left + width] = tile
        caption = f"{mistake.predicted} {mistake.probability:.0%}\ntrue: {mistake.label}"
        figure.text(center / sheet_width, 1 - (top - _GAP) / sheet_height, caption, fontsize=7, ha="center")
    figure.figimage(sheet)
    return _render(figure)


def _tile(images: NDArray[np.uint8]) -> "Picture":
    """Tiles the first 64 images, uint8 [n, H, W, C], into a nearly square grid with white lines between them."""
    images = images[:_MAX_TILES]
    count, height, width, channels = images.shape
    columns = math.ceil(math.sqrt(count))
    rows = -(-count // columns)
    grid = np.full((rows * (height + 1) - 1, columns * (width + 1) - 1, 3), 255, dtype=np.uint8)
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        top, left = row * (height + 1), column * (width + 1)
        grid[top : top + height, left : left + width] = image if channels == 3 else image[..., :1]
    return grid


def _new_figure(width: float, height: float, layout: Literal["constrained"] | None = "constrained") -> "Figure":
    """Returns an empty figure. width, height: inches. layout: "constrained" fits long names and takes twice as long."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # lazy import: 0.5 s
    from matplotlib.figure import Figure

    matplotlib.rcParams["text.parse_math"] = False  # a class name may contain dollar signs
    figure = Figure(figsize=(width, height), dpi=_DOTS_PER_INCH, layout=layout)
    FigureCanvasAgg(figure)
    return figure


def _render(figure: "Figure") -> "Picture":
    canvas: Any = figure.canvas
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the font lacks some scripts and draws boxes instead
        canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
