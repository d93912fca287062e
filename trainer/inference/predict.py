"""Predicts the classes of image files, PIL images and arrays with a trained network."""

import csv
import itertools
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from trainer.data.images.decode import ImageError, decode_file, fit_image, image_errors
from trainer.data.images.files import EXTENSIONS, find_images
from trainer.distributed.environment import available_cores
from trainer.errors import DataError
from trainer.inference.saved_model import SavedModel, load_model
from trainer.run.files import finite_json
from trainer.text.escape import escape, escape_cell

ImageInput = str | Path | Image.Image | NDArray[np.uint8]
"""A path, a PIL image, or an array uint8 [H, W] or [H, W, C]."""
_PIXELS_PER_BATCH = 256 * 32 * 32
_SMALLEST_BATCH = 8
_MAX_READER_THREADS = 8


@dataclass(frozen=True, slots=True)
class ClassProbability:
    """A class and its probability for an image."""

    name: str
    probability: float
    """in [0, 1]"""


@dataclass(frozen=True, slots=True)
class Prediction:
    """The most probable classes of an image, or the reason why the image cannot be read."""

    image: str
    """the path, or "image N" for the N-th input (from 0) if it is not a path"""
    top: tuple[ClassProbability, ...]
    """the most probable class first; empty if the image cannot be read"""
    error: str = ""
    """the reason why the image cannot be read"""


class Predictor:
    """Predicts classes with a saved model. See load_predictor for an example."""

    def __init__(self, model: SavedModel, batch_size: int | None = None) -> None:
        """batch_size: images in a forward pass; by default about 256 of 32 x 32 pixels, fewer if they are larger."""
        self.model = model
        image_pixels = model.metadata.image_size**2
        self._batch_size = batch_size or max(_SMALLEST_BATCH, _PIXELS_PER_BATCH // image_pixels)

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the network's classes, in the order of its logits."""
        return self.model.metadata.classes

    def predict(self, images: Iterable[ImageInput] | ImageInput, top: int = 5) -> list[Prediction]:
        """Returns a prediction with the `top` most probable classes for each image.

        images: one or more paths of image files or folders, PIL images, or arrays uint8 [H, W] or [H, W, C]. A folder
        stands for all image files in it and below it. Raises DataError at the first image that cannot be read.
        """
        is_single = isinstance(images, (str, Path, Image.Image, np.ndarray))
        inputs = expand_paths([images] if is_single else images)  # type: ignore[list-item, arg-type]
        predictions = []
        for prediction in self.predict_each(inputs, top):
            if prediction.error:
                raise DataError(f"{prediction.image} cannot be read as an image ({prediction.error}); leave it out")
            predictions.append(prediction)
        return predictions

    def predict_each(self, images: Iterable[ImageInput], top: int = 5) -> Iterator[Prediction]:
        """Yields a prediction for each image, in order. An image that cannot be read has an `error`.

        Unlike predict, takes no folders, keeps only a batch of images in memory, and continues after an error.
        """
        numbered = iter(enumerate(images))
        with ThreadPoolExecutor(min(_MAX_READER_THREADS, available_cores())) as readers:
            while batch := list(itertools.islice(numbered, self._batch_size)):
                yield from self._predict_batch(batch, readers, top)

    def _predict_batch(
        self, batch: list[tuple[int, ImageInput]], readers: ThreadPoolExecutor, top: int
    ) -> Iterator[Prediction]:
        pixels_or_errors = list(readers.map(self._read, (image for _, image in batch)))
        pixels = [result for result in pixels_or_errors if not isinstance(result, str)]
        tops: Iterator[tuple[ClassProbability, ...]] = iter(())
        if pixels:
            tops = iter(self._top_classes(torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2), top))
        for (number, image), result in zip(batch, pixels_or_errors, strict=True):
            name = str(image) if isinstance(image, (str, Path)) else f"image {number}"
            yield Prediction(name, (), result) if isinstance(result, str) else Prediction(name, next(tops))

    def _top_classes(self, images: torch.Tensor, top: int) -> list[tuple[ClassProbability, ...]]:
        """Returns the most probable classes for each of the images, uint8 [B, C, H, W]."""
        probabilities = self.model.logits(images).double().softmax(1)
        highest = probabilities.topk(min(top, len(self.classes)), 1)
        return [
            tuple(ClassProbability(self.classes[index], value) for index, value in zip(indices, values, strict=True))
            for indices, values in zip(highest.indices.tolist(), highest.values.tolist(), strict=True)
        ]

    def _read(self, image: ImageInput) -> NDArray[np.uint8] | str:
        """Returns uint8 [image_size, image_size, channels], resized as in training, or an error message."""
        size, channels = self.model.metadata.image_size, self.model.metadata.channels
        try:
            if isinstance(image, (str, Path)):
                pixels = np.empty((size, size, channels), np.uint8)
                decode_file(Path(image).read_bytes(), pixels)
                return pixels
            with image_errors():
                if isinstance(image, np.ndarray):
                    image = Image.fromarray(image.squeeze(2) if image.shape[2:] == (1,) else image)
                return fit_image(image, size, channels)
        except ImageError as error:
            return str(error)
        except OSError as error:
            return error.strerror or str(error)


def load_predictor(
    run: str | Path, weights: str = "auto", device: str | None = None, allow_pickle: bool = False
) -> Predictor:
    """Returns a predictor for a run folder, a checkpoint folder, or a file of weights.

        from trainer.inference.predict import load_predictor

        predictor = load_predictor("runs/cifar10")
        for prediction in predictor.predict(["cat.png", "folder/"], top=3):
            print(prediction.image, prediction.top[0].name, prediction.top[0].probability)

    weights, allow_pickle: as load_model takes them; device: a torch device such as "cpu" or "cuda:1", by default the
    first GPU, or the CPU if there is none. The device does not have to be the one of the training.
    Raises FolderError if there are no such weights or no such device.
    """
    return Predictor(load_model(Path(run), weights, torch.device(device) if device else None, allow_pickle))


def expand_paths(images: Iterable[ImageInput], skipped: Counter[str] | None = None) -> list[ImageInput]:
    """Replaces each folder by the sorted image files in it and below it.

    skipped: counts the other files of the folders, by kind. Raises DataError for a path that does not exist, and for a
    folder that cannot be read or has no image files.
    """
    expanded: list[ImageInput] = []
    skipped = Counter() if skipped is None else skipped
    for image in images:
        if not isinstance(image, (str, Path)):
            expanded.append(image)
            continue
        path = Path(image)
        if path.is_dir():
            image_files = sorted(path / name for name, _ in find_images(path, skipped))
            if not image_files:
                raise DataError(
                    f"folder {path} has no image files; expected names that end in one of {', '.join(EXTENSIONS)}"
                )
            expanded += image_files
        elif path.exists():
            expanded.append(path)
        else:
            raise DataError(f"image {path} does not exist; give image files, or folders with image files")
    return expanded


def print_predictions(predictions: Iterator[Prediction], format: str, total: int) -> int:
    """Prints each prediction as soon as it is made. Returns the number of images that could not be read.

    format: text, json or csv; total: number of predictions. Shows a progress bar if stderr is a terminal and stdout is
    not.
    """
    from rich.console import Console
    from rich.progress import track

    terminal = Console(stderr=True)
    is_hidden = not terminal.is_terminal or sys.stdout.isatty() or total < 2
    tracked = track(predictions, "predicting", total, console=terminal, disable=is_hidden, transient=True)
    print_all = {"text": _print_text, "json": _print_json, "csv": _print_csv}[format]
    return print_all(tracked)


def _print_text(predictions: Iterable[Prediction]) -> int:
    num_errors = 0
    for prediction in predictions:
        num_errors += bool(prediction.error)
        classes = "  ".join(f"{escape(entry.name)} {entry.probability:.1%}" for entry in prediction.top)
        print(f"{escape(prediction.image)}: {classes or escape(prediction.error)}")
    return num_errors


def _print_json(predictions: Iterable[Prediction]) -> int:
    """Prints a list with one line for each image."""
    num_errors, separator = 0, "["
    for prediction in predictions:
        num_errors += bool(prediction.error)
        content: dict[str, Any] = {"image": prediction.image}
        if prediction.error:
            content["error"] = prediction.error
        else:
            content["top"] = [{"class": entry.name, "probability": entry.probability} for entry in prediction.top]
        print(f"{separator}\n{json.dumps(finite_json(content), allow_nan=False)}", end="")
        separator = ","
    print("\n]")
    return num_errors


def _print_csv(predictions: Iterable[Prediction]) -> int:
    """Prints one row for each class of each image: image, rank (from 1), class, probability, error.

    Texts are in quotes and numbers are not. A spreadsheet takes no text for a formula (trainer/text/escape.py).
    """
    num_errors, writer = 0, csv.writer(sys.stdout, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
    writer.writerow(["image", "rank", "class", "probability", "error"])
    for prediction in predictions:
        num_errors += bool(prediction.error)
        if prediction.error:
            writer.writerow([escape_cell(prediction.image), "", "", "", escape_cell(prediction.error)])
        for rank, entry in enumerate(prediction.top, 1):
            probability = float(f"{entry.probability:.6g}")
            writer.writerow([escape_cell(prediction.image), rank, escape_cell(entry.name), probability, ""])
    return num_errors
