"""Paths of image files in, their pixels out: decoded once, by all cores, and kept in one file for the next start."""

import io
import os
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from trainer import rank_env
from trainer.datasets.pixels import fit
from trainer.errors import DataError

_Images = NDArray[np.uint8]
_FILES_PER_TASK = 256
_FILES_WORTH_A_POOL = 2000  # starting worker processes takes as long as decoding about so many small files


class _Task(NamedTuple):
    paths: Sequence[str]
    image_size: int
    channels: int
    out: str
    offset: int
    """in bytes, where the first of them belongs in `out`"""


def decoded(pack: Path, paths: Sequence[str], image_size: int, channels: int) -> tuple[_Images, tuple[str, ...]]:
    """uint8 [len(paths), image_size, image_size, channels], and lines for the user.

    pack: where they are kept; its name must change with the files. Raises DataError.
    """
    shape = (len(paths), image_size, image_size, channels)
    kept = _read(pack, shape)
    if kept is not None:
        return kept, ()
    unwritable = ""
    try:
        pack.parent.mkdir(parents=True, exist_ok=True)
        partial, header_bytes = _reserve(pack.parent, shape)
    except OSError as error:
        unwritable = f"decoded images not kept in {pack.parent} ({error.strerror}); set data.cache_dir"
        try:
            partial, header_bytes = _reserve(Path(tempfile.gettempdir()), shape)
        except OSError as again:
            raise DataError(
                f"{unwritable}, for there is no room in {tempfile.gettempdir()} ({again.strerror})"
            ) from None
    try:
        _decode_all(paths, image_size, channels, partial, header_bytes)
        images: _Images = np.load(partial, allow_pickle=False)
        if not unwritable:
            partial.chmod(0o644)
            partial.replace(pack)  # whole, so that nobody reads half of it
    finally:
        partial.unlink(missing_ok=True)
    return images, (f"{unwritable} to start faster next time",) if unwritable else ()


def _read(pack: Path, shape: tuple[int, ...]) -> _Images | None:
    try:
        images: _Images = np.load(pack, allow_pickle=False)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, EOFError):  # cut off or foreign: made anew
        return None
    return images if images.shape == shape and images.dtype == np.uint8 else None


def _reserve(folder: Path, shape: tuple[int, ...]) -> tuple[Path, int]:
    """A new .npy file with room for them all, and where they begin in it. Raises OSError when there is none."""
    with tempfile.NamedTemporaryFile(dir=folder, suffix=".partial", delete=False) as file:
        try:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            file.flush()
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), file.tell(), max(1, int(np.prod(shape))))
        except OSError:
            Path(file.name).unlink()
            raise
        return Path(file.name), file.tell()


def _decode_all(paths: Sequence[str], image_size: int, channels: int, out: Path, header_bytes: int) -> None:
    """Into `out`, by all cores, with a progress bar on a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    bytes_each = image_size * image_size * channels
    tasks = [
        _Task(paths[at : at + _FILES_PER_TASK], image_size, channels, str(out), header_bytes + at * bytes_each)
        for at in range(0, len(paths), _FILES_PER_TASK)
    ]
    columns = (TextColumn("decoding images"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("", total=len(paths))
        for task, problem in zip(tasks, _problems(tasks, len(paths)), strict=True):
            if problem:
                raise DataError(problem)
            progress.advance(bar, len(task.paths))


def _problems(tasks: list[_Task], num_files: int) -> Iterator[str]:
    workers = rank_env.cores()
    if num_files < _FILES_WORTH_A_POOL or workers == 1:
        yield from map(_decode, tasks)
        return
    # Spawned, not forked: this process may hold threads and a GPU, of which a fork would take broken copies.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        yield from pool.map(_decode, tasks)


def _decode(task: _Task) -> str:
    """Writes the task's images where they belong; returns what is wrong, of the first file that is no image."""
    size, channels = task.image_size, task.channels
    images = np.empty((len(task.paths), size, size, channels), dtype=np.uint8)
    for place, path in enumerate(task.paths):
        try:
            # Read at once: Pillow's own reading of a path takes half as long as a small JPEG's decoding.
            with io.FileIO(path) as file, Image.open(io.BytesIO(file.read())) as picture:
                images[place] = fit(picture, size, channels)
        except UnidentifiedImageError:
            return f"corrupt image {path} (no kind of image that is known here); replace or remove that file"
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            problem = " ".join(str(error).split()) or type(error).__name__
            return f"corrupt image {path} ({problem}); replace or remove that file"
    try:
        with Path(task.out).open("r+b") as out:
            out.seek(task.offset)
            out.write(images.data)
    except OSError as error:
        return (
            f"decoded images cannot be written to {task.out} ({error.strerror}); set data.cache_dir to another folder"
        )
    return ""
