"""Decodes many image files, on all cores if that saves time."""

import io
import time
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from trainer.data.images.decode import ImageError, decode_file
from trainer.distributed.environment import available_cores
from trainer.errors import DataError

_FIRST_TASK_FILES = 16  # their decoding time predicts that of the remaining files
_FILES_PER_TASK = 64
_MIN_SECONDS_FOR_POOL = 2.0  # worker processes take a second to start, so they must save more than that


class OutputFile(NamedTuple):
    """The file that decoded images are written to."""

    path: Path
    start: int
    """position of row 0 in bytes"""


@dataclass(slots=True)
class Decoded:
    """Decoded files."""

    checksums: NDArray[np.uint32]
    """[N], CRC-32 of each file"""
    grey_bits: NDArray[np.uint8]
    """[N], what decode_file returns"""
    errors: dict[int, str] = field(default_factory=dict)
    """why a file could not be decoded, by its position"""


class _Task(NamedTuple):
    """Files that one call of _decode_task decodes."""

    paths: Sequence[str]
    rows: Sequence[int]
    image_shape: tuple[int, ...]
    output: OutputFile | None
    """None returns the images, which takes longer from a worker process"""


class _TaskResult(NamedTuple):
    images: NDArray[np.uint8]
    """of all files of the task; none if they were written to the output file"""
    checksums: list[int]
    grey_bits: list[int]
    errors: dict[int, str]
    """by position in the task"""


def decode_files(
    paths: Sequence[str], rows: Sequence[int], image_shape: tuple[int, ...], output: OutputFile | NDArray[np.uint8]
) -> Decoded:
    """Decodes each file to its row of the output, with a progress bar on a terminal.

    image_shape: (image_size, image_size, channels). A file that cannot be decoded leaves its row as it is. Raises
    OSError when the output file cannot be written, and DataError when a worker process was killed.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    bounds = [0, *range(min(_FIRST_TASK_FILES, len(paths)), len(paths), _FILES_PER_TASK), len(paths)]
    output_file = output if isinstance(output, OutputFile) else None
    tasks = [
        _Task(paths[start:end], rows[start:end], image_shape, output_file)
        for start, end in pairwise(bounds)
        if end > start
    ]
    decoded, num_done = Decoded(np.zeros(len(paths), dtype=np.uint32), np.zeros(len(paths), dtype=np.uint8)), 0
    columns = (TextColumn("decoding images"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("", total=len(paths))
        for task, result in zip(tasks, _run_tasks(tasks), strict=True):
            if isinstance(output, np.ndarray):
                output[list(task.rows)] = result.images
            end = num_done + len(task.paths)
            decoded.checksums[num_done:end] = result.checksums
            decoded.grey_bits[num_done:end] = result.grey_bits
            decoded.errors |= {num_done + position: reason for position, reason in result.errors.items()}
            num_done = end
            progress.update(bar, completed=num_done)
    return decoded


def _run_tasks(tasks: Sequence[_Task]) -> Iterator[_TaskResult]:
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
                try:
                    with ProcessPoolExecutor(num_workers, mp_context=get_context("spawn")) as pool:
                        yield from pool.map(_decode_task, tasks[index:])
                except BrokenProcessPool:
                    raise DataError(
                        "a decoding process is gone (probably out of memory); free memory or request more, or allow "
                        "fewer CPU cores, of which each decodes one image at a time"
                    ) from None
                return
        yield _decode_task(task)
        files_done += len(task.paths)
        files_remaining -= len(task.paths)


def _decode_task(task: _Task) -> _TaskResult:
    """Decodes the files of a task, and writes the images if the task names an output file.

    Raises OSError when the images cannot be written.
    """
    images = np.zeros((len(task.paths), *task.image_shape), dtype=np.uint8)
    checksums, grey_bits, errors = [0] * len(task.paths), [0] * len(task.paths), {}
    for position, path in enumerate(task.paths):
        try:
            with io.FileIO(path) as file:  # one read of the whole file is faster than Pillow's reads
                content = file.read()
            checksums[position] = zlib.crc32(content)
            grey_bits[position] = decode_file(content, images[position])
        except ImageError as error:
            errors[position] = str(error)
        except OSError as error:
            errors[position] = error.strerror or str(error)
    if task.output is None:
        return _TaskResult(images, checksums, grey_bits, errors)
    write_rows(task.output, task.rows, images)
    return _TaskResult(images[:0], checksums, grey_bits, errors)


def write_rows(output: OutputFile, rows: Sequence[int], images: NDArray[np.uint8]) -> None:
    """Writes images to their rows of an output file. Raises OSError."""
    is_one_block = rows[-1] - rows[0] == len(rows) - 1  # the rows ascend
    with output.path.open("r+b") as file:
        for row, block in [(rows[0], images)] if is_one_block else zip(rows, images, strict=True):
            file.seek(output.start + row * images[0].nbytes)
            file.write(block.data)
