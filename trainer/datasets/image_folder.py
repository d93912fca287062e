"""Image files in folders of their class in, one packed array out, kept for the next start.

    root/train/<class>/**/*.jpg|png|...      root/test/<class>/**/*.jpg|png|...

Decoding is done once, by all cores; the pack is keyed by the folder's contents, so a changed file is seen.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from trainer import rank_env
from trainer.datasets.dataset import Dataset, Split
from trainer.datasets.pixels import fit
from trainer.errors import DataError
from trainer.settings import Data

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
_PACK_FORMAT = 1
_Task = tuple[list[str], int, int]  # paths, image_size, channels
_FILES_PER_TASK = 256
_FILES_WORTH_A_POOL = 2000  # starting worker processes takes as long as decoding about so many small files


@dataclass(frozen=True, slots=True)
class _File:
    """One image file: path below root, size in bytes, time of change in ns, class."""

    path: str
    size: int
    changed: int
    label: int


def load(data: Data) -> Dataset:
    """The images of root/train and root/test, from the pack if the files are still those that went into it.

    Raises DataError: a folder is missing or empty, a class is missing from either split, a file is not an image.
    """
    root = Path(data.root).expanduser()
    channels = 1 if data.channels == 1 else 3
    classes = _classes(root)
    splits = {name: _scan(root, name, classes) for name in ("train", "test")}
    splits["train"] = _mixed(splits["train"])
    cache = Path(data.cache_dir).expanduser() if data.cache_dir else root / ".samecurve"
    pack = cache / f"{_fingerprint(data.image_size, channels, classes, splits)}.npy"
    files = [*splits["train"], *splits["test"]]
    notes: tuple[str, ...] = ()
    images = _read_pack(pack, (len(files), data.image_size, data.image_size, channels))
    if images is None:
        images = _decode_all(root, files, data.image_size, channels)
        notes = _write_pack(pack, images)
    labels = np.array([file.label for file in files], dtype=np.int64)
    cut = len(splits["train"])
    return Dataset(Split(images[:cut], labels[:cut]), Split(images[cut:], labels[cut:]), classes, notes)


def training_labels(data: Data) -> list[int]:
    """The class of each training image, without decoding one. Raises DataError as load does."""
    root = Path(data.root).expanduser()
    return [file.label for file in _scan(root, "train", _classes(root))]


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


def _read_pack(pack: Path, shape: tuple[int, ...]) -> NDArray[np.uint8] | None:
    try:
        images: NDArray[np.uint8] = np.load(pack, allow_pickle=False)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, EOFError):  # cut off or foreign: made anew
        return None
    return images if images.shape == shape and images.dtype == np.uint8 else None


def _write_pack(pack: Path, images: NDArray[np.uint8]) -> tuple[str, ...]:
    """Written beside its place and renamed, so that nobody reads half of it; a line for the user when it cannot be."""
    try:
        pack.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=pack.parent, suffix=".partial", delete=False) as file:
            np.save(file, images, allow_pickle=False)
        Path(file.name).chmod(0o644)
        Path(file.name).replace(pack)
    except OSError as error:
        problem = f"decoded images not kept in {pack.parent} ({error.strerror})"
        return (f"{problem}; set data.cache_dir to start faster next time",)
    return ()


def _decode_all(root: Path, files: list[_File], image_size: int, channels: int) -> NDArray[np.uint8]:
    """uint8 [N, image_size, image_size, channels], by all cores, with a progress bar on a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    paths = [os.path.join(root, file.path) for file in files]
    tasks = [(paths[at : at + _FILES_PER_TASK], image_size, channels) for at in range(0, len(paths), _FILES_PER_TASK)]
    out = np.empty((len(paths), image_size, image_size, channels), dtype=np.uint8)
    columns = (TextColumn("decoding images"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("", total=len(paths))
        done = 0
        for images, broken in _results(tasks, len(paths)):
            if broken:
                raise DataError(f"{broken}; replace or remove that file")
            out[done : done + len(images)] = images
            done += len(images)
            progress.update(bar, completed=done)
    return out


def _results(tasks: list[_Task], num_files: int) -> Iterator[tuple[NDArray[np.uint8], str]]:
    workers = rank_env.cores()
    if num_files < _FILES_WORTH_A_POOL or workers == 1:
        yield from map(_decode, tasks)
        return
    # Spawned, not forked: this process may hold threads and a GPU, of which a fork would take broken copies.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        yield from pool.map(_decode, tasks)


def _decode(task: _Task) -> tuple[NDArray[np.uint8], str]:
    """Images of one task, and the first file that is none, with what is wrong with it."""
    paths, image_size, channels = task
    out = np.empty((len(paths), image_size, image_size, channels), dtype=np.uint8)
    for place, path in enumerate(paths):
        try:
            with Image.open(path) as picture:
                out[place] = fit(picture, image_size, channels)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            return out, f"corrupt image {path} ({' '.join(str(error).split()) or type(error).__name__})"
    return out, ""
