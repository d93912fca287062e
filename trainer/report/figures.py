"""Draws a run's figures with matplotlib: curves, class scores, confusion matrix, mistakes, first batch, features.

All are PNG files. `samecurve report` writes curves, class scores and confusion matrix as SVG and PDF too, for papers; a
run does not, because that takes a second. The charts of report.html are in results.py and svg.py.

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

from trainer.report.confusion import MAX_TABLE_CLASSES, color_cells
from trainer.report.examples import read_examples
from trainer.report.scales import fit_y
from trainer.report.style import LIGHT_COLORS
from trainer.run.files import replace_file
from trainer.run.record import RunRecord, is_file
from trainer.tracking.example import Example

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from trainer.tracking.tracker import Picture  # uint8 [H, W, 3]; not imported at run time because it imports torch

FIGURES_FOLDER = "figures"
FIRST_BATCH_FIGURE = "samples"
EVALUATION_FIGURES = ("classes", "confusion", "mistakes")
CURVES = (("loss", "loss"), ("accuracy", "accuracy"), ("lr", "learning rate"), ("samples_per_second", "images/s"))
"""(key of a row of metrics.jsonl, title of its chart)"""

_DOTS_PER_INCH = 110
_MAX_SCORES = 50
_MAX_TILES = 64
_MISTAKES_PER_ROW = 6
_CELL_WIDTH, _CELL_HEIGHT, _TILE_SIZE, _GAP = 165, 180, 128, 6  # pixels, of the figure of mistakes
_TITLE_HEIGHT = 30  # pixels
_GRAY = "#7d848d"  # of titles without a background: readable on white and on black
_SPLITS = ("train", "test", "validation")


def draw_run_figures(record: RunRecord, mistakes: Sequence[Example]) -> "dict[str, Picture]":
    """Returns `curves`, `classes`, `confusion` and `mistakes`, without those that the run has no data for yet."""
    pictures = {name: flatten(_render(figure)) for name, figure in _vector_figures(record).items()}
    if mistakes:
        pictures["mistakes"] = flatten(_draw_mistakes(mistakes, _title(record, "most confident mistakes")))
    return pictures


def write_run_figures(folder: Path) -> None:
    """Writes the figures of a run again, as PNG, SVG and PDF files. Raises OSError, and FolderError as RunRecord."""
    record = RunRecord(folder)
    write_figures(draw_run_figures(record, read_examples(folder).mistakes), folder / FIGURES_FOLDER)
    for name, figure in _vector_figures(record).items():
        for ending, date in (("svg", "Date"), ("pdf", "CreationDate")):
            _save(figure, folder / FIGURES_FOLDER / f"{name}.{ending}", {date: None})  # equal files for equal runs


def _save(figure: "Figure", path: Path, metadata: dict[str, Any]) -> None:
    import matplotlib

    settings: Any = {"svg.fonttype": "none", "pdf.fonttype": 42, "svg.hashsalt": "samecurve"}
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")
        replace_file(path, lambda partial: figure.savefig(partial, format=path.suffix[1:], metadata=metadata))


def _vector_figures(record: RunRecord) -> "dict[str, Figure]":
    figures = {}
    if record.rows:
        figures["curves"] = _draw_curves(record)
    if classes := record.evaluation.get("classes"):
        step = record.evaluation.get("step")
        title = _title(record, "test set" + ("" if step is None else f" at step {step:,}"))
        figures["classes"] = _draw_classes(classes, title)
        figures["confusion"] = _draw_confusion([row["name"] for row in classes], record.evaluation["confusion"], title)
    return figures


def _title(record: RunRecord, text: str) -> str:
    name = record.name if is_file(record.path / "config.yaml") else record.path.name
    return f"{name}: {text}"


def write_figures(pictures: Mapping[str, NDArray[np.uint8]], folder: Path) -> None:
    """Writes folder/NAME.png for each picture, uint8 [H, W, 3 or 4], atomically. Raises OSError."""
    for name, picture in pictures.items():
        path = folder / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(picture)
        replace_file(path, lambda partial, image=image: image.save(partial, "PNG"))  # type: ignore[misc]


def draw_first_batch(stored: NDArray[np.uint8], trained_on: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Draws the stored images beside the images that the network gets. Both are uint8 [n, H, W, C].

    Returns uint8 [H, W, 4] without a background, for light and dark pages.
    """
    figure = _new_figure(8, 4.6, is_transparent=True)
    for column, (title, images) in enumerate((("stored images", stored), ("augmented training input", trained_on))):
        axes = figure.add_subplot(1, 2, column + 1)
        _show_tiles(axes, images, title)
    return _render(figure)


def draw_feature_maps(layer: str, image: NDArray[np.uint8], maps: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Draws an image beside the first 64 feature maps of a layer, each map scaled to its own range.

    image: uint8 [H, W, C]. maps: float32 [channels, h, w]. Returns uint8 [H, W, 4] without a background.
    """
    import matplotlib

    shown = maps[:_MAX_TILES]
    low, high = (limit(axis=(1, 2), keepdims=True) for limit in (shown.min, shown.max))
    span = np.where(high > low, high - low, 1)
    colored = matplotlib.colormaps["viridis"]((shown - low) / span, bytes=True)[..., :3]
    figure = _new_figure(8, 5.6, is_transparent=True)
    left, right = figure.subplots(1, 2, width_ratios=[1, 4])
    _show_tiles(left, image[None], "input image")
    count = f"{len(shown)} of {len(maps)}" if len(shown) < len(maps) else str(len(maps))
    _show_tiles(right, colored, f"{layer}: {count} feature maps, {maps.shape[1]} x {maps.shape[2]} pixels")
    return _render(figure)


def _show_tiles(axes: "Axes", images: NDArray[np.uint8], title: str) -> None:
    axes.imshow(_tile(images), interpolation="nearest")
    axes.set_title(title, fontsize=10, color=_GRAY)
    axes.set_axis_off()


def _draw_curves(record: RunRecord) -> "Figure":
    num_rows = math.ceil(len(CURVES) / 2)
    figure = _new_figure(9, 3 * num_rows + 0.3, layout=None)
    figure.subplots_adjust(left=0.09, right=0.98, bottom=0.08, top=0.9, wspace=0.2, hspace=0.32)
    figure.suptitle(_title(record, "curves"), fontsize=11)
    best = record.best
    for index, (key, title) in enumerate(CURVES):
        axes = figure.add_subplot(num_rows, 2, index + 1)
        for split, color in zip(_SPLITS, LIGHT_COLORS, strict=False):
            if points := record.points(split, key):
                marker = "o" if len(points) < 30 else None
                axes.plot(*zip(*points, strict=True), label=split, marker=marker, ms=3, color=color)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.3)
        if not axes.lines:
            continue
        if key in ("loss", "accuracy"):
            _fit_axis(axes, record, key)
            if best is not None and best.epoch is not None:
                label = f"best {best.split} accuracy, step {best.step:,}"
                axes.axvline(best.epoch, color=_GRAY, linestyle=":", linewidth=1, label=label)
        axes.legend(fontsize=8)
        if key == "samples_per_second":
            axes.set_ylim(bottom=0)
    return figure


def _fit_axis(axes: "Axes", record: RunRecord, key: str) -> None:
    """Sets the axis of loss or accuracy as the charts of the report do."""
    scale = fit_y(
        [point for split in _SPLITS for point in record.points(split, key)], "loss" if key == "loss" else "accuracy"
    )
    if scale.is_log:
        axes.set_yscale("log")
        axes.set_yticks(scale.ticks(5), [f"{tick:g}" for tick in scale.ticks(5)])
        axes.set_yticks([], minor=True)
    margin = 0.02 * (scale.high - scale.low)
    axes.set_ylim(
        scale.low if scale.is_log else scale.low - margin, scale.high if scale.is_log else scale.high + margin
    )
    if key == "accuracy":
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.4g} %")


def _draw_classes(classes: Sequence[Mapping[str, Any]], title: str) -> "Figure":
    """Draws precision, recall and F1 of each class as dots. The axis begins near the lowest, to show differences."""
    shown = classes[:_MAX_SCORES]
    figure = _new_figure(7, 1.4 + 0.3 * len(shown))
    axes = figure.add_subplot()
    rows = np.arange(len(shown))
    for key, marker, color in (("precision", ">", 0), ("recall", "<", 1), ("f1", "o", 2)):
        axes.plot([row[key] for row in shown], rows, marker, label=key, color=LIGHT_COLORS[color], alpha=0.85, ms=6)
    lowest = min(row[key] for row in shown for key in ("precision", "recall", "f1"))
    axes.set_xlim(max(0.0, lowest - 0.05 * max(0.1, 1 - lowest)), 1 + 0.02 * max(0.1, 1 - lowest))
    axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.4g} %")
    axes.set_yticks(rows, [row["name"] for row in shown])
    axes.set_ylim(len(shown) - 0.5, -0.5)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="lower right", bbox_to_anchor=(1, 1), ncols=3, frameon=False)
    limit = f" (first {len(shown)} of {len(classes)} classes)" if len(shown) < len(classes) else ""
    figure.suptitle(f"{title}{limit}", fontsize=10)
    return figure


def _draw_confusion(names: Sequence[str], matrix: Sequence[Sequence[int]], title: str = "") -> "Figure":
    """Draws matrix[true class][predicted class]: correct predictions blue, mistakes orange, however rare."""
    counts, colors = np.array(matrix), color_cells(matrix)
    size = min(12.0, 3.0 + 0.5 * len(names))
    figure = _new_figure(size, size)
    axes = figure.add_subplot()
    axes.imshow(colors, interpolation="nearest")
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    axes.set_title(title, fontsize=10)
    if len(names) <= MAX_TABLE_CLASSES:
        axes.set_xticks(range(len(names)), names, rotation=60, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(len(names)), names)
        for (row, column), count in np.ndenumerate(counts):
            if count:
                color = "white" if colors[row, column, 3] > 0.6 else "black"
                text = axes.text(column, row, f"{count:,}", ha="center", va="center", fontsize=8, color=color)
                text.set_in_layout(False)  # it fits its cell, and the layout of 100 texts is slow
    return figure


def _draw_mistakes(mistakes: Sequence[Example], title: str) -> NDArray[np.uint8]:
    """Pastes all images into one sheet: separate axes for each image take five times as long."""
    columns = min(_MISTAKES_PER_ROW, len(mistakes))
    rows = -(-len(mistakes) // columns)
    sheet = np.full((_TITLE_HEIGHT + rows * _CELL_HEIGHT, columns * _CELL_WIDTH, 3), 255, dtype=np.uint8)
    sheet_height, sheet_width = sheet.shape[:2]
    figure = _new_figure(sheet_width / _DOTS_PER_INCH, sheet_height / _DOTS_PER_INCH, layout=None)
    figure.text(_GAP / sheet_width, 1 - 20 / sheet_height, title, fontsize=9)
    for index, mistake in enumerate(mistakes):
        cell_row, cell_column = divmod(index, columns)
        image = mistake.image().convert("RGB")
        image.thumbnail((_TILE_SIZE, _TILE_SIZE))
        scale = max(1, _TILE_SIZE // max(image.size))
        tile = np.asarray(image).repeat(scale, axis=0).repeat(scale, axis=1)
        height, width = tile.shape[:2]
        bottom = _TITLE_HEIGHT + (cell_row + 1) * _CELL_HEIGHT - _GAP
        center = cell_column * _CELL_WIDTH + _CELL_WIDTH // 2
        top, left = bottom - height, center - width // 2
        sheet[top:bottom, left : left + width] = tile
        caption = f"predicted: {mistake.predicted} {mistake.probability:.0%}\ntrue: {mistake.label}"
        figure.text(center / sheet_width, 1 - (top - _GAP) / sheet_height, caption, fontsize=7, ha="center")
    figure.figimage(sheet)
    return _render(figure)


def _tile(images: NDArray[np.uint8]) -> "Picture":
    """Tiles the first 64 images, uint8 [n, H, W, C], into a nearly square grid with gray lines between them."""
    images = images[:_MAX_TILES]
    count, height, width, channels = images.shape
    columns = math.ceil(math.sqrt(count))
    rows = -(-count // columns)
    grid = np.full((rows * (height + 1) - 1, columns * (width + 1) - 1, 3), 128, dtype=np.uint8)
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        top, left = row * (height + 1), column * (width + 1)
        grid[top : top + height, left : left + width] = image if channels == 3 else image[..., :1]
    return grid


def _new_figure(
    width: float,
    height: float,
    layout: Literal["constrained"] | None = "constrained",
    is_transparent: bool = False,
) -> "Figure":
    """Returns an empty figure. width, height: inches. layout: "constrained" fits long names and takes twice as long."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # lazy import: 0.5 s
    from matplotlib.figure import Figure

    matplotlib.rcParams["text.parse_math"] = False  # a class name may contain dollar signs
    color = "none" if is_transparent else "white"
    figure = Figure(figsize=(width, height), dpi=_DOTS_PER_INCH, layout=layout, facecolor=color)
    FigureCanvasAgg(figure)
    return figure


def _render(figure: "Figure") -> NDArray[np.uint8]:
    """Returns uint8 [H, W, 4]."""
    canvas: Any = figure.canvas
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the font lacks some scripts and draws boxes instead
        canvas.draw()
    return np.asarray(canvas.buffer_rgba()).copy()


def flatten(picture: NDArray[np.uint8]) -> "Picture":
    """Returns a picture, uint8 [H, W, 4], on white: uint8 [H, W, 3]."""
    opacity = picture[..., 3:].astype(np.float32) / 255
    if opacity.min() == 1:
        return picture[..., :3].copy()
    return np.asarray(np.rint(picture[..., :3] * opacity + 255 * (1 - opacity)), dtype=np.uint8)
