"""Image files in folders of their class in, a data set out.

    root/train/<class>/**/*.jpg|png|...      root/test/<class>/**/*.jpg|png|...

Decoded images are kept in a pack (pack.py) that is named by the folder's contents, so that a changed file is seen.
"""

import hashlib
import json
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trainer.config.schema import DataSettings
from trainer.data.cache import load_or_decode
from trainer.data.dataset import ArrayDataset, ArraySplit
from trainer.errors import DataError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
_PACK_FORMAT = 1


@dataclass(frozen=True, slots=True)
class _File:
    """One image file: path below root, size in bytes, time of change in ns, class."""

    path: str
    size: int
    changed: int
    label: int


def load(data: DataSettings) -> ArrayDataset:
    """The images of root/train and root/test, from the pack if the files are still those that went into it.

    Raises DataError: a folder is missing or empty, a class is missing from either split, a file is not an image.
    """
    root = Path(data.root).expanduser()
    channels = 1 if data.channels == 1 else 3
    classes = _classes(root)
    splits = {name: _scan(root, name, classes) for name in ("train", "test")}
    splits["train"] = _mixed(splits["train"])
    cache = Path(data.cache_dir).expanduser() if data.cache_dir else root / ".samecurve"
    pack = cache / f"{_fingerprint(data.side_pixels, channels, classes, splits)}.npy"
    files = [*splits["train"], *splits["test"]]
    paths = [os.path.join(root, file.path) for file in files]
    images, notes = load_or_decode(pack, paths, data.side_pixels, channels)
    labels = np.array([file.label for file in files], dtype=np.int64)
    cut = len(splits["train"])
    return ArrayDataset(ArraySplit(images[:cut], labels[:cut]), ArraySplit(images[cut:], labels[cut:]), classes, notes)


def count_per_class(data: DataSettings) -> list[int]:
    """Training images of each class, without decoding one. Raises DataError as load does."""
    root = Path(data.root).expanduser()
    classes = _classes(root)
    counts = Counter(file.label for file in _scan(root, "train", classes))
    return [counts[label] for label in range(len(classes))]


def _classes(root: Path) -> tuple[str, ...]:
    """The class folders of train/, by name; test/ must have the same."""
    found = {}
    for split in ("train", "test"):
        folder = root / split
        if not folder.is_dir():
            raise DataError(
                f"no folder {folder}: wanted train/<class>/ and test/<class>/ with image files. "
                "Set data.root to the folder that holds train/ and test/"
            )
        found[split] = {entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith(".")}
    if not found["train"]:
        raise DataError(f"no class folders in {root / 'train'}: wanted one folder a class with image files in it")
    for name in sorted(found["train"] | found["test"]):
        if not name.isprintable():
            raise DataError(f"class folder {name!a} in {root} has a name that is no readable text (UTF-8); rename it")
    for split, other in (("test", "train"), ("train", "test")):
        missing = sorted(found[other] - found[split])
        if missing:
            raise DataError(
                f"class {', '.join(missing)} is in {root / other} but missing from {root / split}: "
                "wanted the same class folders in both; add it there or remove it here"
            )
    return tuple(sorted(found["train"]))


def _scan(root: Path, split: str, classes: tuple[str, ...]) -> list[_File]:
    """Every image file of a split, class by class, by name."""
    files = []
    for label, name in enumerate(classes):
        found = sorted(_walk(root / split / name, f"{split}/{name}", label), key=lambda file: file.path)
        if not found:
            raise DataError(
                f"class folder {root / split / name} is empty: wanted image files ({', '.join(EXTENSIONS)}); "
                "add some or remove the folder from train/ and test/"
            )
        files += found
    return files


def _mixed(files: list[_File]) -> list[_File]:
    """The same files with each class spread evenly over the whole: without data.shuffle an epoch in the folders'
    order would be one class after the other, which no network survives."""
    by_class: dict[int, list[_File]] = {}
    for file in files:
        by_class.setdefault(file.label, []).append(file)
    placed = [
        ((place + 0.5) / len(members), file) for members in by_class.values() for place, file in enumerate(members)
    ]
    return [file for _, file in sorted(placed, key=lambda item: (item[0], item[1].label))]


def _walk(folder: Path | str, below_root: str, label: int) -> list[_File]:
    """The image files in a folder and those below it; a link counts as what it points to."""
    files = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                path = f"{below_root}/{entry.name}"
                if entry.is_dir():
                    files += _walk(entry.path, path, label)
                elif entry.name.lower().endswith(EXTENSIONS):
                    status = entry.stat()
                    files.append(_File(path, status.st_size, status.st_mtime_ns, label))
    except OSError as error:  # a link to nothing or in a circle, a folder that may not be read
        raise DataError(f"{error.filename} cannot be read ({error.strerror}); mend or remove it") from None
    return files


def _fingerprint(image_size: int, channels: int, classes: tuple[str, ...], splits: dict[str, list[_File]]) -> str:
    """Changes with any file's name, size or time of change, and with what is made of them."""
    digest = hashlib.sha256(json.dumps([_PACK_FORMAT, image_size, channels, classes]).encode())
    for split, files in splits.items():
        digest.update(f"\n{split}\n".encode())
        lines = (f"{file.path}\0{file.size}\0{file.changed}" for file in files)
        digest.update("\n".join(lines).encode(errors="surrogateescape"))
    return digest.hexdigest()[:32]
