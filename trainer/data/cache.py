"""Decodes image files on all cores and caches their pixels in one .npy file for the next start."""

import io
import os
import secrets
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from trainer.data.decode import decode_plain_jpeg, fit_image
from trainer.distributed.environment import available_cores
from trainer.errors import DataError

_Images = NDArray[np.uint8]
_ABANDONED_SECONDS = 86400.0
_FIRST_TASK_FILES = 16  # their decoding time predicts that of the remaining files
_FILES_PER_TASK = 64
_MIN_SECONDS_FOR_POOL = 2.0  # worker processes take a second to start, so they must save more than that


class _Task(NamedTuple):
    """Files that one call of _decode_task decodes."""

    paths: Sequence[str]
    image_size: int
    channels: int
    output_file: Path | None
    """The file to write the images to. None returns them, which takes longer from a worker process."""
    offset: int
    """Position of the first image in output_file, in bytes."""


def load_or_decode(
    cache_file: Path, paths: Sequence[str], image_size: int, channels: int
) -> tuple[_Images, tuple[str, ...]]:
    """Returns the images from the cache, or decodes the files and writes the cache.

    cache_file: its name must change with the content of the files.
    Returns uint8 [len(paths), image_size, image_size, channels] and lines to print for the user. Raises DataError for a
    corrupt image. A cache that cannot be written is no error: a line for the user reports it.
    """
    shape = (len(paths), image_size, image_size, channels)
    cached = _read(cache_file, shape)
    if cached is not None:
        return cached, ()
    partial_file = cache_file.with_name(f".{cache_file.stem}.{secrets.token_hex(4)}.partial")
    try:
        try:
            cache_file.parent.mkdir(parents=True, exist_ok=True)
            _delete_abandoned(cache_file.parent)
            header_bytes = _reserve(partial_file, shape)
            _decode_all(paths, shape, partial_file, header_bytes)
            images: _Images = np.load(partial_file, allow_pickle=False)
            partial_file.replace(cache_file)  # atomic, so that no process reads an incomplete cache
        finally:
            partial_file.unlink(missing_ok=True)
    except OSError as error:
        problem = f"cannot cache decoded images in {cache_file.parent} ({error.strerror})"
        return _decode_all(paths, shape), (f"{problem}; set data.cache_dir to start faster next time",)
    return images, ()


def _delete_abandoned(folder: Path) -> None:
    """Deletes partial files of killed processes. Younger ones may belong to a process that still decodes."""
    for path in folder.glob(".*.partial"):
        if time.time() - path.stat().st_mtime > _ABANDONED_SECONDS:
            path.unlink()


def _read(cache_file: Path, shape: tuple[int, ...]) -> _Images | None:
    """Returns the cached images, or None when the cache is missing, damaged or of another shape."""
    try:
        images: _Images = np.load(cache_file, allow_pickle=False)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, EOFError):  # truncated, or no .npy file
        return None
    return images if images.shape == shape and images.dtype == np.uint8 else None


def _reserve(path: Path, shape: tuple[int, ...]) -> int:
    """Creates a .npy file with disk space for all images and returns the size of its header in bytes.

    Raises OSError when the disk is full: before anything is decoded, not after.
    """
    with path.open("xb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        file.flush()
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), file.tell(), max(1, int(np.prod(shape))))
        return file.tell()


def _decode_all(
    paths: Sequence[str], shape: tuple[int, ...], output_file: Path | None = None, header_bytes: int = 0
) -> _Images:
    """Decodes all files, with a progress bar on a terminal.

    Returns the images, or an empty array after writing them to output_file. Raises DataError for a corrupt image.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    images = np.empty(shape if output_file is None else (0,), dtype=np.uint8)
    tasks = _make_tasks(paths, shape, output_file, header_bytes)
    columns = (TextColumn("decoding images"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar, num_decoded = progress.add_task("", total=len(paths)), 0
        for task, (task_images, problem) in zip(tasks, _run_tasks(tasks), strict=True):
            if problem:
                raise DataError(f"{problem}; replace or remove that file")
            if output_file is None:
                images[num_decoded : num_decoded + len(task_images)] = task_images
            num_decoded += len(task.paths)
            progress.update(bar, completed=num_decoded)
    return images


def _make_tasks(
    paths: Sequence[str], shape: tuple[int, ...], output_file: Path | None, header_bytes: int
) -> list[_Task]:
    _, image_size, _, channels = shape
    bytes_per_image = image_size * image_size * channels
    bounds = [0, *range(min(_FIRST_TASK_FILES, len(paths)), len(paths), _FILES_PER_TASK), len(paths)]
    return [
        _Task(paths[start:end], image_size, channels, output_file, header_bytes + start * bytes_per_image)
        for start, end in pairwise(bounds)
    ]


def _run_tasks(tasks: Sequence[_Task]) -> Iterator[tuple[_Images, str]]:
    """Yields the result of each task, in order.

    Decodes in this process first, and starts a worker per core when the remaining tasks would take too long here.
    """
    num_workers, start_time = available_cores(), time.perf_counter()
    files_done, files_remaining = 0, sum(len(task.paths) for task in tasks)
    for index, task in enumerate(tasks):
        if files_done and num_workers > 1 and index + 1 < len(tasks):
            seconds_remaining = (time.perf_counter() - start_time) / files_done * files_remaining
            if seconds_remaining > _MIN_SECONDS_FOR_POOL:
                # Spawned, not forked: this process may own threads and a GPU, which do not survive a fork.
                with ProcessPoolExecutor(num_workers, mp_context=get_context("spawn")) as pool:
                    yield from pool.map(_decode_task, tasks[index:])
                return
        yield _decode_task(task)
        files_done += len(task.paths)
        files_remaining -= len(task.paths)


def _decode_task(task: _Task) -> tuple[_Images, str]:
    """Decodes the files of a task, and writes the images if the task names an output file.

    Returns the images, or none after writing them, and the problem of the first corrupt file, or an empty text. Raises
    OSError when the images cannot be written.
    """
    size, channels = task.image_size, task.channels
    images = np.empty((len(task.paths), size, size, channels), dtype=np.uint8)
    no_images = images[:0]
    for index, path in enumerate(task.paths):
        try:
            with io.FileIO(path) as file:  # one read of the whole file is faster than Pillow's reads
                content = file.read()
            if decode_plain_jpeg(content, images[index]):
                continue
            with Image.open(io.BytesIO(content)) as image:
                images[index] = fit_image(image, size, channels)
        except UnidentifiedImageError:
            return no_images, f"corrupt image {path} (unknown image format)"
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            return no_images, f"corrupt image {path} ({' '.join(str(error).split()) or type(error).__name__})"
    if task.output_file is None:
        return images, ""
    with task.output_file.open("r+b") as file:
        file.seek(task.offset)
        file.write(images.data)
    return no_images, ""
