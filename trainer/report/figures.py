"""What a run's files tell in, pictures for papers, slides and trackers out, by matplotlib. No torch.

matplotlib's pyplot is left alone: it would look for a display.
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
from trainer.run.record import Example, RunRecord
from trainer.tracking.tracker import Picture

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FIGURES_FOLDER = "figures"
EVALUATION_FIGURES = ("classes", "confusion", "mistakes")
_CURVES = (("loss", "loss"), ("accuracy", "accuracy"), ("lr", "learning rate"), ("samples_per_second", "images/s"))
_DOTS_PER_INCH = 110
_MOST_CELLS = 30  # classes of a confusion matrix whose numbers can be read
_MOST_BARS = 50
_MOST_TILES = 64
# Of mistakes, in pixels.
_MISTAKES_PER_ROW = 6
_CELL_WIDTH, _CELL_HEIGHT, _TILE, _GAP = 165, 180, 128, 6


def run_figures(run: RunRecord) -> dict[str, Picture]:
    """`curves`, and of the last evaluation `classes`, `confusion` and `mistakes`, as far as the run has got."""
    pictures = {}
    if run.lines:
        pictures["curves"] = _curves(run)
    if classes := run.evaluation.get("classes", []):
        pictures["classes"] = _classes(classes)
        pictures["confusion"] = _confusion([row["name"] for row in classes], run.evaluation["confusion"])
    if run.mistakes:
        pictures["mistakes"] = _mistakes(run.mistakes)
    return pictures


def write(pictures: Mapping[str, Picture], folder: Path) -> None:
    """folder/NAME.png of each, whole or absent. Raises OSError."""
    for name, picture in pictures.items():
        path = folder / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, lambda at, image=picture: Image.fromarray(image).save(at, "PNG"))  # type: ignore[misc]


def samples(stored: NDArray[np.uint8], trained_on: NDArray[np.uint8]) -> Picture:
    """Images as they are stored, and the same as the network was given them: uint8 [n, H, W, C] each."""
    figure = _figure(8, 4.6)
    for place, (title, images) in enumerate((("as they are stored", stored), ("as they are trained on", trained_on))):
        axes = figure.add_subplot(1, 2, place + 1)
        axes.imshow(_tiles(images), interpolation="nearest")
        axes.set_title(title, fontsize=10)
        axes.set_axis_off()
    return _drawn(figure)


def feature_maps(name: str, image: NDArray[np.uint8], maps: NDArray[np.float32]) -> Picture:
    """What a layer makes of an image: uint8 [H, W, C] and float32 [channels, h, w], of which 64 are shown, each from
    its own least to its largest value."""
    import matplotlib

    shown = maps[:_MOST_TILES]
    least, most = (end(axis=(1, 2), keepdims=True) for end in (shown.min, shown.max))
    span = np.where(most > least, most - least, 1)
    coloured = matplotlib.colormaps["viridis"]((shown - least) / span, bytes=True)[..., :3]
    figure = _figure(8, 5.6)
    left, right = figure.subplots(1, 2, width_ratios=[1, 4])
    left.imshow(_tiles(image[None]), interpolation="nearest")
    left.set_title("the image", fontsize=10)
    right.imshow(_tiles(coloured), interpolation="nearest")
    count = f"{len(shown)} of {len(maps)}" if len(shown) < len(maps) else str(len(maps))
    right.set_title(f"{name}: {count} maps of {maps.shape[1]} x {maps.shape[2]}", fontsize=10)
    for axes in (left, right):
        axes.set_axis_off()
    return _drawn(figure)


def _curves(run: RunRecord) -> Picture:
    figure = _figure(9, 6, layout=None)
    figure.subplots_adjust(left=0.09, right=0.98, bottom=0.08, top=0.95, wspace=0.2, hspace=0.32)
    for place, (key, title) in enumerate(_CURVES):
        axes = figure.add_subplot(2, 2, place + 1)
        for split in ("train", "test", "validation"):
            if points := run.points(split, key):
                axes.plot(*zip(*points, strict=True), label=split, marker="o" if len(points) < 30 else None, ms=3)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize=8)
        if key == "samples_per_second":
            axes.set_ylim(bottom=0)
    return _drawn(figure)


def _classes(classes: Sequence[Mapping[str, Any]]) -> Picture:
    """Precision, recall and F1 of each class, as bars."""
    shown = classes[:_MOST_BARS]
    figure = _figure(7, 1.2 + 0.42 * len(shown))
    axes = figure.add_subplot()
    places = np.arange(len(shown))
    for offset, key in ((-0.27, "precision"), (0.0, "recall"), (0.27, "f1")):
        axes.barh(places + offset, [row[key] for row in shown], height=0.25, label=key)
    axes.set_yticks(places, [row["name"] for row in shown])
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize=8, loc="lower right", bbox_to_anchor=(1, 1), ncols=3, frameon=False)
    more = f", the first {len(shown)} of {len(classes)}" if len(shown) < len(classes) else ""
    axes.set_title(f"test set, by class{more}", fontsize=10, loc="left")
    return _drawn(figure)


def _confusion(names: Sequence[str], matrix: Sequence[Sequence[int]]) -> Picture:
    counts = np.array(matrix, dtype=np.float64)
    shares = counts / np.maximum(1, counts.sum(1, keepdims=True))
    size = min(12.0, 3.0 + 0.5 * len(names))
    figure = _figure(size, size)
    axes = figure.add_subplot()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_xlabel("was taken for")
    axes.set_ylabel("is")
    axes.set_title("confusion matrix of the test set", fontsize=10)
    if len(names) <= _MOST_CELLS:
        axes.set_xticks(range(len(names)), names, rotation=60, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(len(names)), names)
        for (row, column), count in np.ndenumerate(counts):
            if count:
                colour = "white" if shares[row, column] > 0.5 else "black"
                text = axes.text(column, row, f"{count:.0f}", ha="center", va="center", fontsize=8, color=colour)
                text.set_in_layout(False)  # within its cell: 100 of them need no place kept
    return _drawn(figure)


def _mistakes(shown: Sequence[Example]) -> Picture:
    """One sheet and its captions: axes of its own for each would take five times as long."""
    columns = min(_MISTAKES_PER_ROW, len(shown))
    rows = -(-len(shown) // columns)
    sheet = np.full((rows * _CELL_HEIGHT, columns * _CELL_WIDTH, 3), 255, dtype=np.uint8)
    figure = _figure(sheet.shape[1] / _DOTS_PER_INCH, sheet.shape[0] / _DOTS_PER_INCH, layout=None)
    for place, each in enumerate(shown):
        top, left = place // columns * _CELL_HEIGHT, place % columns * _CELL_WIDTH
        image = each.image().convert("RGB")
        image.thumbnail((_TILE, _TILE))
        scale = max(1, _TILE // max(image.size))
        tile = np.asarray(image).repeat(scale, axis=0).repeat(scale, axis=1)
        bottom, middle = top + _CELL_HEIGHT - _GAP, left + _CELL_WIDTH // 2
        begin = middle - tile.shape[1] // 2
        sheet[bottom - tile.shape[0] : bottom, begin : begin + tile.shape[1]] = tile
        where = (middle / sheet.shape[1], 1 - (bottom - tile.shape[0] - _GAP) / sheet.shape[0])
        figure.text(*where, f"{each.predicted} {each.probability:.0%}\nis {each.label}", fontsize=7, ha="center")
    figure.figimage(sheet)
    return _drawn(figure)


def _tiles(images: NDArray[np.uint8]) -> Picture:
    """uint8 [n, H, W, C], 64 of them, as one picture, near enough square."""
    images = images[:_MOST_TILES]
    count, height, width, channels = images.shape
    columns = math.ceil(math.sqrt(count))
    rows = -(-count // columns)
    picture = np.full((rows * (height + 1) - 1, columns * (width + 1) - 1, 3), 255, dtype=np.uint8)
    for place in range(count):
        top, left = place // columns * (height + 1), place % columns * (width + 1)
        picture[top : top + height, left : left + width] = images[place] if channels == 3 else images[place][..., :1]
    return picture


def _figure(width: float, height: float, layout: Literal["constrained"] | None = "constrained") -> "Figure":
    """width, height: inches; layout: constrained makes place for names of any length, at twice the time."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # late: half a second
    from matplotlib.figure import Figure

    matplotlib.rcParams["text.parse_math"] = False  # a class may have dollars in its name
    figure = Figure(figsize=(width, height), dpi=_DOTS_PER_INCH, layout=layout)
    FigureCanvasAgg(figure)
    return figure


def _drawn(figure: "Figure") -> Picture:
    canvas: Any = figure.canvas
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # of a name in another script: boxes
        canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
