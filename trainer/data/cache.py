"""Paths of image files in, their pixels out: decoded once, by all cores, and kept in one file for the next start."""

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
_FIRST_FILES = 16  # by whose time the others' is told
_FILES_PER_TASK = 64
_SECONDS_WORTH_A_POOL = 2.0  # worker processes are started in one of them, and then have to save more than that


class _Task(NamedTuple):
    paths: Sequence[str]
    image_size: int
    channels: int
    out: Path | None
    """a file to write them to; None: they are returned, which takes longer"""
    offset: int
    """in bytes, where the first of them belongs in it"""


def load_or_decode(pack: Path, paths: Sequence[str], image_size: int, channels: int) -> tuple[_Images, tuple[str, ...]]:
    """uint8 [len(paths), image_size, image_size, channels], and lines for the user.

    pack: where they are kept; its name must change with the files. Raises DataError.
    """
    shape = (len(paths), image_size, image_size, channels)
    kept = _read(pack, shape)
    if kept is not None:
        return kept, ()
    partial = pack.with_name(f".{pack.stem}.{secrets.token_hex(4)}.partial")
    try:
        try:
            pack.parent.mkdir(parents=True, exist_ok=True)
            _sweep(pack.parent)
            header_bytes = _reserve(partial, shape)
            _decode_all(paths, shape, partial, header_bytes)
            images: _Images = np.load(partial, allow_pickle=False)
            partial.replace(pack)  # whole, so that nobody reads half of it
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        problem = f"decoded images not kept in {pack.parent} ({error.strerror})"
        return _decode_all(paths, shape), (f"{problem}; set data.cache_dir to start faster next time",)
    return images, ()


def _sweep(folder: Path) -> None:
    """What a process that was killed has left; others may be at work on theirs."""
    for path in folder.glob(".*.partial"):
        if time.time() - path.stat().st_mtime > _ABANDONED_SECONDS:
            path.unlink()


def _read(pack: Path, shape: tuple[int, ...]) -> _Images | None:
    try:
        images: _Images = np.load(pack, allow_pickle=False)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, EOFError):  # cut off or foreign: made anew
        return None
    return images if images.shape == shape and images.dtype == np.uint8 else None


def _reserve(partial: Path, shape: tuple[int, ...]) -> int:
    """A .npy file with room for them all; where they begin in it. Raises OSError when there is none."""
    with partial.open("xb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        file.flush()
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), file.tell(), max(1, int(np.prod(shape))))
        return file.tell()


def _decode_all(
    paths: Sequence[str], shape: tuple[int, ...], out: Path | None = None, header_bytes: int = 0
) -> _Images:
    """By all cores, with a progress bar on a terminal: into memory, or into `out`, and then none are returned."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    _, image_size, _, channels = shape
    bytes_each = image_size * image_size * channels
    images = np.empty(shape if out is None else (0,), dtype=np.uint8)
    cuts = [0, *range(min(_FIRST_FILES, len(paths)), len(paths), _FILES_PER_TASK), len(paths)]
    tasks = [
        _Task(paths[at:end], image_size, channels, out, header_bytes + at * bytes_each) for at, end in pairwise(cuts)
    ]
    columns = (TextColumn("decoding images"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar, done = progress.add_task("", total=len(paths)), 0
        for task, (found, problem) in zip(tasks, _results(tasks), strict=True):
            if problem:
                raise DataError(f"{problem}; replace or remove that file")
            if out is None:
                images[done : done + len(found)] = found
            done += len(task.paths)
            progress.update(bar, completed=done)
    return images


def _results(tasks: Sequence[_Task]) -> Iterator[tuple[_Images, str]]:
    """One after the other in this process, until what is left would take so long that all cores are asked."""
    workers, began = available_cores(), time.perf_counter()
    files_done, files_left = 0, sum(len(task.paths) for task in tasks)
    for index, task in enumerate(tasks):
        if files_done and workers > 1 and index + 1 < len(tasks):
            seconds_left = (time.perf_counter() - began) / files_done * files_left
            if seconds_left > _SECONDS_WORTH_A_POOL:
                # Spawned, not forked: this process may hold threads and a GPU, of which a fork takes broken copies.
                with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
                    yield from pool.map(_decode, tasks[index:])
                return
        yield _decode(task)
        files_done += len(task.paths)
        files_left -= len(task.paths)


def _decode(task: _Task) -> tuple[_Images, str]:
    """The task's images, or none when they have been written where they belong; what is wrong, of the first file that
    is no image. Raises OSError when they cannot be written."""
    size, channels = task.image_size, task.channels
    images = np.empty((len(task.paths), size, size, channels), dtype=np.uint8)
    nothing = images[:0]
    for place, path in enumerate(task.paths):
        try:
            with io.FileIO(path) as file:  # read at once: Pillow's own reading of a path takes longer
                stored = file.read()
            if decode_plain_jpeg(stored, images[place]):
                continue
            with Image.open(io.BytesIO(stored)) as picture:
                images[place] = fit_image(picture, size, channels)
        except UnidentifiedImageError:
            return nothing, f"corrupt image {path} (no kind of image that is known here)"
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            return nothing, f"corrupt image {path} ({' '.join(str(error).split()) or type(error).__name__})"
    if task.out is None:
        return images, ""
    with task.out.open("r+b") as out:
        out.seek(task.offset)
        out.write(images.data)
    return nothing, ""
