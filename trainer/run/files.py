"""Writes files that are either complete or absent, and turns disk errors into messages for the user."""

import contextlib
import errno
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from trainer.errors import FolderError
from trainer.text.escape import one_line

_PROBE_BYTES = 4096  # a full disk accepts empty files
DISK_ERRORS = (OSError, SafetensorError)
"""What a failed write to disk raises."""


def replace_file(path: Path, writer: Callable[[Path], object]) -> None:
    """Replaces a file: `writer` writes to a temporary path in the same folder, which is flushed and renamed.

    Raises the errors of `writer`, and OSError.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.touch()
        mode = partial.stat().st_mode  # by this process's umask; some writers set other permissions
        writer(partial)
        partial.chmod(mode)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def write_problem(folder: Path) -> str:
    """Returns why no file can be written in a folder, or in its nearest parent that exists; empty if one can.

    Writes a file without a name, which leaves nothing behind.
    """
    try:
        nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        with tempfile.TemporaryFile(dir=nearest) as file:
            file.write(bytes(_PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error_reason(error)
    return ""


def is_disk_full(error: BaseException) -> bool:
    """Returns whether a disk error means that the disk, or the user's share of it, is full."""
    return error_reason(error) in (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT))


def reserve_room(path: Path, num_bytes: int) -> None:
    """Reserves room on a disk by a file without content. Raises OSError, without a file, if that is impossible."""
    try:
        with path.open("wb") as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, num_bytes)
            else:  # macOS
                file.write(b"\0" * num_bytes)
    except OSError:
        path.unlink(missing_ok=True)
        raise


def error_reason(error: BaseException) -> str:
    """Returns the cause of a disk error in a few words, such as "No space left on device"."""
    text = one_line(error, None)
    number = re.search(r"os error (\d+)", text)  # safetensors reports the number this way
    return getattr(error, "strerror", None) or (os.strerror(int(number[1])) if number else text[:200])


def write_error(name: str, error: BaseException) -> FolderError:
    """Returns the error for the user. name: what could not be written."""
    return FolderError(
        f"{name} cannot be written ({error_reason(error)}). Free space or restore access "
        "there, and run the same command again to continue from the last checkpoint"
    )


@contextlib.contextmanager
def disk_errors_as_user_errors(name: str) -> Iterator[None]:
    """Turns DISK_ERRORS into a FolderError. name: what could not be written."""
    try:
        yield
    except DISK_ERRORS as error:
        raise write_error(name, error) from None


def finite_json(content: Any) -> Any:
    """Returns a copy with null instead of NaN and infinity, which JSON cannot represent."""
    if isinstance(content, dict):
        return {key: finite_json(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [finite_json(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
