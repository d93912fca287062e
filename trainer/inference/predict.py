"""Image files of any kind and size in, the most probable classes of each out; `samecurve predict`, and from Python:

for found in trainer.predict.load("runs/cifar10").predict(["cat.png", "folder/"]):
    print(found.image, found.top[0].name, found.top[0].probability)
"""

import csv
import itertools
import json
import os
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from trainer.data.decode import fit_image
from trainer.data.image_folder import EXTENSIONS
from trainer.distributed.environment import available_cores
from trainer.errors import DataError
from trainer.inference.saved_model import SavedModel, load_model
from trainer.run.files import finite_json

Picture = str | Path | Image.Image | NDArray[np.uint8]
_PIXELS_AT_ONCE = 256 * 32 * 32
_EXTENSIONS = (*EXTENSIONS, ".avif", ".ico", ".jfif", ".jp2", ".jpe", ".pbm", ".tga")
_MOST_READERS = 8


@dataclass(frozen=True, slots=True)
class ClassProbability:
    name: str
    probability: float
    """in [0, 1]"""


@dataclass(frozen=True, slots=True)
class Prediction:
    image: str
    """its path, or its place among those that were given"""
    top: tuple[ClassProbability, ...]
    """the most probable first; empty for an image that cannot be read"""
    problem: str = ""
    """why it cannot be read"""


class Predictor:
    def __init__(self, network: SavedModel, images_at_once: int | None = None) -> None:
        """images_at_once: in one forward pass; by default fewer of large ones."""
        self.trained = network
        self._images_at_once = images_at_once or max(8, _PIXELS_AT_ONCE // network.about.image_size**2)

    @property
    def classes(self) -> tuple[str, ...]:
        return self.trained.about.classes

    def predict(self, images: Iterable[Picture] | Picture, top: int = 5) -> list[Prediction]:
        """Of image files, folders of them, PIL images, or arrays uint8 [H, W] or [H, W, C]; `top` classes of each.

        Raises DataError at the first that is no image.
        """
        found = []
        single = isinstance(images, (str, Path, Image.Image, np.ndarray))
        given = expand_paths([images] if single else images)  # type: ignore[list-item, arg-type]
        for prediction in self.each(given, top):
            if prediction.problem:
                raise DataError(f"{prediction.image}: {prediction.problem}")
            found.append(prediction)
        return found

    def each(self, images: Iterable[Picture], top: int = 5) -> Iterator[Prediction]:
        """The same of images alone, one after the other, in their order; one that cannot be read has a `problem`."""
        named = iter(enumerate(images))
        with ThreadPoolExecutor(min(_MOST_READERS, available_cores())) as readers:
            while some := list(itertools.islice(named, self._images_at_once)):
                yield from self._some(some, readers, top)

    def _some(self, some: list[tuple[int, Picture]], readers: ThreadPoolExecutor, top: int) -> Iterator[Prediction]:
        read = list(readers.map(self._read, (picture for _, picture in some)))
        pixels = [one for one in read if not isinstance(one, str)]
        guesses: Iterator[tuple[ClassProbability, ...]] = iter(())
        if pixels:
            images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)
            guesses = iter(self._guesses(images, top))
        for (place, picture), one in zip(some, read, strict=True):
            name = str(picture) if isinstance(picture, (str, Path)) else f"image {place}"
            yield Prediction(name, (), one) if isinstance(one, str) else Prediction(name, next(guesses))

    def _guesses(self, images: torch.Tensor, top: int) -> list[tuple[ClassProbability, ...]]:
        probabilities = self.trained.logits(images).double().softmax(1)
        best = probabilities.topk(min(top, len(self.classes)), 1)
        return [
            tuple(ClassProbability(self.classes[index], value) for index, value in zip(indices, values, strict=True))
            for indices, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]

    def _read(self, picture: Picture) -> NDArray[np.uint8] | str:
        """uint8 [image_size, image_size, channels] as in training, or why not."""
        about = self.trained.about
        try:
            if isinstance(picture, np.ndarray):
                picture = Image.fromarray(picture.squeeze(2) if picture.shape[2:] == (1,) else picture)
            if isinstance(picture, Image.Image):
                return fit_image(picture, about.image_size, about.channels)
            with Image.open(picture) as opened:
                return fit_image(opened, about.image_size, about.channels)
        except UnidentifiedImageError:
            return "no kind of image that is known here"
        except (OSError, SyntaxError, ValueError, TypeError, Image.DecompressionBombError) as error:
            return " ".join(str(error).split()) or type(error).__name__
        except MemoryError:
            raise
        except Exception as error:  # each of Pillow's decoders has its own for a damaged file: told of it, by its name
            return " ".join(f"{type(error).__name__}: {error}".split())


def load_predictor(
    run: str | Path, which: str = "auto", device: str | None = None, allow_pickle: bool = False
) -> Predictor:
    """The network of a run's folder, a checkpoint's, or a file of weights, as trained.load finds it; a run of a GPU
    predicts on a CPU too. device: as torch names it. Raises FolderError."""
    return Predictor(load_model(Path(run), which, torch.device(device) if device else None, allow_pickle))


def expand_paths(given: Iterable[Picture]) -> list[Picture]:
    """Files as they are, and for a folder the image files in it and below it, by name. Raises DataError for a path
    where nothing is, or a folder without images."""
    found: list[Picture] = []
    for one in given:
        if not isinstance(one, (str, Path)):
            found.append(one)
            continue
        path = Path(one)
        if path.is_dir():
            inside = [Path(top) / name for top, _, names in os.walk(path) for name in names]
            images = sorted(file for file in inside if file.name.lower().endswith(_EXTENSIONS))
            if not images:
                raise DataError(f"no image files in folder {path}: wanted {', '.join(_EXTENSIONS)}")
            found += images
        elif path.exists():
            found.append(path)
        else:
            raise DataError(f"no image {path}: wanted image files or folders of them")
    return found


def print_predictions(predictions: Iterator[Prediction], form: str, total: int) -> int:
    """Prints each as it comes, with a progress bar on a terminal that is not printed on; returns how many could not be
    read. form: text, json or csv."""
    from rich.console import Console
    from rich.progress import track

    terminal = Console(stderr=True)
    hidden = not terminal.is_terminal or sys.stdout.isatty() or total < 2
    tracked = track(predictions, "predicting", total, console=terminal, disable=hidden, transient=True)
    writer = {"text": _text, "json": _json, "csv": _csv}[form]
    return writer(tracked)


def _printable(name: str) -> str:
    return name if name.isprintable() else ascii(name)


def _text(predictions: Iterable[Prediction]) -> int:
    problems = 0
    for one in predictions:
        problems += bool(one.problem)
        guesses = "  ".join(f"{_printable(guess.name)} {guess.probability:.1%}" for guess in one.top)
        print(f"{_printable(one.image)}: {guesses or one.problem}")
    return problems


def _json(predictions: Iterable[Prediction]) -> int:
    """One list, with a line for each image."""
    problems, before = 0, "["
    for one in predictions:
        problems += bool(one.problem)
        guesses = [{"class": guess.name, "probability": guess.probability} for guess in one.top]
        content: dict[str, Any] = {"image": one.image} | ({"error": one.problem} if one.problem else {"top": guesses})
        print(f"{before}\n{json.dumps(finite_json(content), allow_nan=False)}", end="")
        before = ","
    print("\n]")
    return problems


def _csv(predictions: Iterable[Prediction]) -> int:
    """A row for each guess: image, rank (from 1), class, probability, error."""
    problems, writer = 0, csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(["image", "rank", "class", "probability", "error"])
    for one in predictions:
        problems += bool(one.problem)
        if one.problem:
            writer.writerow([_printable(one.image), "", "", "", one.problem])
        for rank, guess in enumerate(one.top, 1):
            writer.writerow([_printable(one.image), rank, _printable(guess.name), f"{guess.probability:.6g}", ""])
    return problems
