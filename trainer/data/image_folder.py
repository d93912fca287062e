"""Loads a data set of image files that are sorted into class folders.

    root/train/<class>/**/*.jpg|png|...      root/test/<class>/**/*.jpg|png|...

Decoded images are cached in a file (cache.py) whose name is a hash over the names, sizes and modification times of all
image files, so that a changed file is never read from the cache.
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
CHANNELS = 3
_CACHE_FORMAT = 1


@dataclass(frozen=True, slots=True)
class _ImageFile:
    path: str
    """Relative to data.root."""
    size_bytes: int
    modified_ns: int
    label: int


def load(data: DataSettings) -> ArrayDataset:
    """Returns the images under root/train and root/test, from the cache if no file has changed since it was written.

    Raises DataError when a folder is missing or empty, a class is missing from one split, or a file is not an image.
    """
    root = Path(data.root).expanduser()
    channels = 1 if data.channels == 1 else 3
    classes = _list_classes(root)
    splits = {split: _list_split(root, split, classes) for split in ("train", "test")}
    splits["train"] = _interleave_classes(splits["train"])
    cache_folder = Path(data.cache_dir).expanduser() if data.cache_dir else root / ".samecurve"
    cache_file = cache_folder / f"{_fingerprint(data.side_pixels, channels, classes, splits)}.npy"
    files = [*splits["train"], *splits["test"]]
    paths = [os.path.join(root, file.path) for file in files]
    images, notes = load_or_decode(cache_file, paths, data.side_pixels, channels)
    labels = np.array([file.label for file in files], dtype=np.int64)
    num_train = len(splits["train"])
    train = ArraySplit(images[:num_train], labels[:num_train])
    test = ArraySplit(images[num_train:], labels[num_train:])
    return ArrayDataset(train, test, classes, notes)


def count_per_class(data: DataSettings) -> list[int]:
    """Returns the number of training images of each class, without decoding any. Raises DataError as load does."""
    root = Path(data.root).expanduser()
    classes = _list_classes(root)
    counts = Counter(file.label for file in _list_split(root, "train", classes))
    return [counts[label] for label in range(len(classes))]


def check_files(data: DataSettings) -> None:
    """Raises DataError as load does for folders and their files, without reading an image."""
    root = Path(data.root).expanduser()
    classes = _list_classes(root)
    for split in ("train", "test"):
        _list_split(root, split, classes)


def _list_classes(root: Path) -> tuple[str, ...]:
    """Returns the names of the class folders, sorted. Raises DataError when train/ and test/ have different ones."""
    classes_of_split: dict[str, set[str]] = {}
    for split in ("train", "test"):
        folder = root / split
        if not folder.is_dir():
            raise DataError(
                f"no folder {folder}: expected train/<class>/ and test/<class>/ with image files. "
                "Set data.root to the folder that contains train/ and test/"
            )
        with os.scandir(folder) as entries:
            names = {entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")}
        classes_of_split[split] = names
    train_classes, test_classes = classes_of_split["train"], classes_of_split["test"]
    if not train_classes:
        raise DataError(
            f"no class folders in {root / 'train'}: expected one folder per class with image files in it. "
            "Create them, or set data.root to another folder"
        )
    for name in sorted(train_classes | test_classes):
        if not name.isprintable():
            raise DataError(f"class folder {name!a} in {root} has a name that is not readable UTF-8 text; rename it")
    for split, other_split in (("test", "train"), ("train", "test")):
        missing = sorted(classes_of_split[other_split] - classes_of_split[split])
        if missing:
            raise DataError(
                f"class {', '.join(missing)} is in {root / other_split} but missing from {root / split}: "
                "expected the same class folders in both; add it there or remove it here"
            )
    return tuple(sorted(train_classes))


def _list_split(root: Path, split: str, classes: tuple[str, ...]) -> list[_ImageFile]:
    """Returns every image file of a split, sorted by class, then by path. Raises DataError for an empty class."""
    files = []
    for label, name in enumerate(classes):
        class_files = sorted(_walk(root / split / name, f"{split}/{name}", label), key=lambda file: file.path)
        if not class_files:
            raise DataError(
                f"class folder {root / split / name} is empty: expected image files ({', '.join(EXTENSIONS)}); "
                "add some or remove the folder from train/ and test/"
            )
        files += class_files
    return files


def _walk(folder: Path | str, relative_path: str, label: int) -> list[_ImageFile]:
    """Returns the image files under a folder, at any depth. Follows links."""
    files = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                path = f"{relative_path}/{entry.name}"
                if entry.is_dir():
                    files += _walk(entry.path, path, label)
                elif entry.name.lower().endswith(EXTENSIONS):
                    status = entry.stat()
                    files.append(_ImageFile(path, status.st_size, status.st_mtime_ns, label))
    except OSError as error:  # a dangling or circular link, or a folder without permission
        raise DataError(f"cannot read {error.filename} ({error.strerror}); repair or remove it") from None
    return files


def _interleave_classes(files: list[_ImageFile]) -> list[_ImageFile]:
    """Spreads the files of each class evenly over the list.

    With data.shuffle=false an epoch follows this order. In the folders' order it would be one class after the other,
    and no network trains on that.
    """
    files_of_class: dict[int, list[_ImageFile]] = {}
    for file in files:
        files_of_class.setdefault(file.label, []).append(file)
    positioned_files = [
        ((index + 0.5) / len(class_files), file)
        for class_files in files_of_class.values()
        for index, file in enumerate(class_files)
    ]
    return [file for _, file in sorted(positioned_files, key=lambda item: (item[0], item[1].label))]


def _fingerprint(image_size: int, channels: int, classes: tuple[str, ...], splits: dict[str, list[_ImageFile]]) -> str:
    """Returns a hash that changes with the path, size or modification time of any file, and with the image format."""
    digest = hashlib.sha256(json.dumps([_CACHE_FORMAT, image_size, channels, classes]).encode())
    for split, files in splits.items():
        digest.update(f"\n{split}\n".encode())
        lines = (f"{file.path}\0{file.size_bytes}\0{file.modified_ns}" for file in files)
        digest.update("\n".join(lines).encode(errors="surrogateescape"))
    return digest.hexdigest()[:32]
