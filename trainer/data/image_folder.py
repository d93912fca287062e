"""Loads a data set of image files that are sorted into class folders.

    root/train/<class>/**/*.jpg|png|...      root/test/<class>/**/*.jpg|png|...

Names of classes and files are compared in Unicode's form NFC, because macOS stores "é" as two characters and Linux as
it was written. docs/data.md says which files are read, and how.
"""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from unicodedata import normalize

import numpy as np

from trainer.config.schema import DataSettings
from trainer.data.dataset import ArrayDataset, ArraySplit, find_labels
from trainer.data.identity import DataIdentity, identify_listed
from trainer.data.images.cache import DecodedFiles, load_or_decode
from trainer.data.images.files import EXTENSIONS, describe_skipped, find_images, is_hidden, unreadable
from trainer.data.images.pack import ImageFile
from trainer.errors import DataError

CHANNELS = 3
_LISTED_FILES = 10


@dataclass(slots=True)
class _Split:
    """The files of one split."""

    name: str
    files: list[ImageFile]
    skipped: Counter[str] = field(default_factory=Counter)


def load(data: DataSettings) -> ArrayDataset:
    """Returns the images under root/train and root/test. Decodes only files that are new or changed.

    Raises DataError when a folder is missing or empty, a class is missing from one split, or files are not images.
    """
    classes, splits = _list_files(data)
    (train, test), notes = _decode(data, splits)
    return ArrayDataset(train, test, classes, notes)


def load_split(data: DataSettings, split: str, classes: Sequence[str]) -> tuple[ArraySplit, tuple[str, ...]]:
    """Returns the images of one split, and lines to print for the user. Needs the folder of that split only.

    classes: the classes of a network, to which the labels refer; the folder may lack some of them. Raises DataError as
    load does, and for a folder of another class.
    """
    root = Path(data.root).expanduser()
    folders = _find_class_folders(root, split)
    names = sorted(folders)
    labels = dict(zip(names, find_labels(names, classes), strict=True))
    files = _list_split(root, split, folders, labels, allow_empty=True)
    if not files.files:
        raise DataError(f"no images in {root / split}: expected {split}/<class>/ with image files. Set data.root")
    (loaded,), notes = _decode(data, [files])
    return loaded, notes


def count_per_class(data: DataSettings) -> list[int]:
    """Returns the number of training images of each class, without decoding any. Raises DataError as load does."""
    classes, (train, _) = _list_files(data)
    counts = Counter(file.label for file in train.files)
    return [counts[label] for label in range(len(classes))]


def check_files(data: DataSettings) -> None:
    """Raises DataError as load does for folders and their files, without reading an image."""
    _list_files(data)


def identify_files(data: DataSettings) -> DataIdentity:
    """Returns what listing the files tells of the data set, without reading any. Raises DataError as load does."""
    classes, splits = _list_files(data)
    return DataIdentity(
        classes,
        {
            split.name: identify_listed(
                [_canonical(file.path) for file in split.files],
                [file.size_bytes for file in split.files],
                [file.label for file in split.files],
                len(classes),
            )
            for split in splits
        },
    )


def _list_files(data: DataSettings) -> tuple[tuple[str, ...], tuple[_Split, _Split]]:
    """Returns the classes and the files of both splits."""
    root = Path(data.root).expanduser()
    folders = {split: _find_class_folders(root, split) for split in ("train", "test")}
    _check_classes(root, *folders.values())
    key = _natural_key if data.class_order == "natural" else None
    classes = tuple(sorted(folders["train"], key=key))
    labels = {name: label for label, name in enumerate(classes)}
    train, test = (_list_split(root, split, folders[split], labels) for split in ("train", "test"))
    return classes, (train, test)


def _find_class_folders(root: Path, split: str) -> dict[str, str]:
    """Returns the name of each class folder of a split, by its name in form NFC."""
    folder = root / split
    if not folder.is_dir():
        raise DataError(
            f"no folder {folder}: expected train/<class>/ and test/<class>/ with image files. "
            "Set data.root to the folder that contains train/ and test/"
        )
    names: dict[str, str] = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            if not entry.is_dir() or is_hidden(entry.name):
                continue
            if not entry.name.isprintable():
                raise DataError(
                    f"class folder {entry.name!a} in {folder} has a name that is not readable UTF-8 text; rename it"
                )
            name = normalize("NFC", entry.name)
            if name in names:
                raise DataError(
                    f"class folders {names[name]!a} and {entry.name!a} in {folder} are one name, {name}, in two "
                    "Unicode forms; rename one, or move its images to the other"
                )
            names[name] = entry.name
    return names


def _check_classes(root: Path, train: dict[str, str], test: dict[str, str]) -> None:
    """Raises DataError when train/ has no classes, or train/ and test/ have different ones."""
    if not train:
        raise DataError(
            f"no class folders in {root / 'train'}: expected one folder per class with image files in it. "
            "Create them, or set data.root to another folder"
        )
    for split, other_split, missing in (("test", "train", train.keys() - test), ("train", "test", test.keys() - train)):
        if missing:
            raise DataError(
                f"class {', '.join(sorted(missing))} is in {root / other_split} but missing from {root / split}: "
                "expected the same class folders in both; add it there or remove it here"
            )


def _natural_key(name: str) -> tuple[list[tuple[int, str]], str]:
    """Returns a key that sorts class2 before class10."""
    parts = re.split(r"([0-9]+)", name)  # text, number, text, ...
    return [(int(part), "") if index % 2 else (-1, part) for index, part in enumerate(parts)], name


def _list_split(
    root: Path, split: str, folders: dict[str, str], labels: dict[str, int], allow_empty: bool = False
) -> _Split:
    """Returns the image files of a split: those of train/ interleaved, those of test/ by class, then by path.

    Raises DataError for a class folder without images, unless they are allowed.
    """
    listed = _Split(split, [])
    _count_outside_classes(root / split, listed.skipped)
    for name in sorted(folders, key=labels.__getitem__):
        folder, files = root / split / folders[name], []
        for path, entry in find_images(folder, listed.skipped, f"{split}/{folders[name]}"):
            try:
                status = entry.stat()
            except OSError as error:  # a dangling link
                raise unreadable(entry.path, error) from None
            files.append(ImageFile(path, status.st_size, status.st_mtime_ns, labels[name]))
        if not files and not allow_empty:
            raise DataError(
                f"class folder {folder} is empty: expected image files ({', '.join(EXTENSIONS)}); "
                "add some or remove the folder from train/ and test/"
            )
        files.sort(key=lambda file: file.path)
        if not all(file.path.isascii() for file in files):
            files.sort(key=lambda file: _canonical(file.path))
        listed.files += files
    if split == "train":
        listed.files = _interleave_classes(listed.files)
    return listed


def _count_outside_classes(folder: Path, skipped: Counter[str]) -> None:
    """Adds the files beside the class folders to `skipped`."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if is_hidden(entry.name):
                skipped["hidden"] += 1
            elif not entry.is_dir():
                skipped["outside the class folders"] += 1


def _canonical(path: str) -> str:
    return path if path.isascii() else normalize("NFC", path)


def _interleave_classes(files: list[ImageFile]) -> list[ImageFile]:
    """Spreads the files of each class evenly over the list.

    With data.shuffle=false an epoch follows this order. In the folders' order it would be one class after the other,
    and no network trains on that.
    """
    files_of_class: dict[int, list[ImageFile]] = {}
    for file in files:
        files_of_class.setdefault(file.label, []).append(file)
    positioned_files = [
        ((index + 0.5) / len(class_files), file)
        for class_files in files_of_class.values()
        for index, file in enumerate(class_files)
    ]
    return [file for _, file in sorted(positioned_files, key=lambda item: (item[0], item[1].label))]


def _decode(data: DataSettings, splits: Sequence[_Split]) -> tuple[list[ArraySplit], tuple[str, ...]]:
    """Returns the images of splits, and lines to print. Raises DataError that names the damaged files of all splits."""
    root = Path(data.root).expanduser()
    if data.cache_dir:
        folder = Path(data.cache_dir).expanduser()
        suffix = "-" + hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:8]  # several data sets may share it
    else:
        folder, suffix = root / ".samecurve", ""
    decoded = [
        load_or_decode(
            folder, split.name + suffix, str(root), split.files, data.side_pixels, 1 if data.channels == 1 else 3
        )
        for split in splits
    ]
    _check_damage(root, splits, decoded)
    skipped = describe_skipped(sum((split.skipped for split in splits), Counter[str]()))
    notes = [f"{skipped} in {root}"] if skipped else []
    notes += dict.fromkeys(note for result in decoded for note in result.notes)
    return [_to_array_split(*pair) for pair in zip(splits, decoded, strict=True)], tuple(notes)


def _check_damage(root: Path, splits: Sequence[_Split], decoded: Sequence[DecodedFiles]) -> None:
    damaged = [
        f"{split.files[position].path} ({reason})"
        for split, result in zip(splits, decoded, strict=True)
        for position, reason in sorted(result.errors.items())
    ]
    if damaged:
        total = sum(len(split.files) for split in splits)
        more = f", and {len(damaged) - _LISTED_FILES:,} more" if len(damaged) > _LISTED_FILES else ""
        raise DataError(
            f"{len(damaged):,} of {total:,} image files in {root} cannot be decoded: "
            f"{', '.join(damaged[:_LISTED_FILES])}{more}; replace or remove them"
        )


def _to_array_split(split: _Split, decoded: DecodedFiles) -> ArraySplit:
    return ArraySplit(
        decoded.images,
        np.array([file.label for file in split.files], dtype=np.int64),
        decoded.checksums,
        tuple(_canonical(file.path) for file in split.files),
        tuple(file.size_bytes for file in split.files),
    )
