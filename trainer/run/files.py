"""Files that are whole or absent, and a full or missing disk as one line for the user."""

import contextlib
import math
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from trainer.errors import FolderError

DISK_ERRORS = (OSError, SafetensorError)
"""What a disk that is full or gone makes those who write to it raise."""


def replace_file(path: Path, writer: Callable[[Path], object]) -> None:
    """Whatever `writer` writes to the path it is given: beside the place, flushed, renamed. Raises what it raises."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.touch()
        mode = partial.stat().st_mode  # as this process makes files: some writers have ways of their own
        writer(partial)
        partial.chmod(mode)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def error_reason(error: BaseException) -> str:
    """A disk's trouble in a few words."""
    text = " ".join(str(error).split())
    number = re.search(r"os error (\d+)", text)  # as safetensors has it
    return getattr(error, "strerror", None) or (os.strerror(int(number[1])) if number else text[:200])


def write_error(what: str, error: BaseException) -> FolderError:
    """The one line for the user."""
    return FolderError(
        f"{what} cannot be written ({error_reason(error)}); make room there, "
        "then the same command goes on from the last checkpoint"
    )


@contextlib.contextmanager
def disk_errors_as_user_errors(what: str) -> Iterator[None]:
    """A disk that is full or gone, in whatever words the writer below has for it, becomes one line for the user."""
    try:
        yield
    except DISK_ERRORS as error:
        raise write_error(what, error) from None


def finite_json(content: Any) -> Any:
    """The same with null for each number that JSON has no word for: a loss that is infinite or none at all."""
    if isinstance(content, dict):
        return {key: finite_json(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [finite_json(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
