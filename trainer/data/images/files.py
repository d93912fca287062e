"""Lists the image files of a folder. Training, evaluation and prediction read the same files. Imports no PIL."""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from trainer.errors import DataError
from trainer.text.escape import escape

EXTENSIONS = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff",
    ".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".tga", ".ico",
)  # fmt: skip
"""Endings of image files, in any case. Every supported Pillow reads them, so that all machines list the same files.

Of an animation or a file with pages it reads the first image."""
_SYSTEM_FOLDERS = {"__MACOSX", "@eaDir"}  # macOS archives and Synology disks: copies and thumbnails of the images
_LISTED_KINDS = 5


def is_hidden(name: str) -> bool:
    """Returns whether a file or folder is hidden, such as ._a.jpg or .ipynb_checkpoints, or a system's own."""
    return name.startswith(".") or name in _SYSTEM_FOLDERS


def find_images(
    folder: str | Path, skipped: Counter[str], relative_path: str = ""
) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Yields the relative path and the directory entry of each image file in a folder and below it, in no order.

    Follows links. Adds to `skipped` what is left out, by kind. relative_path: of the folder itself.
    Raises DataError for a folder or link that cannot be read.
    """
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                path = f"{relative_path}/{entry.name}" if relative_path else entry.name
                if is_hidden(entry.name):
                    skipped["hidden"] += 1
                elif entry.is_dir():
                    yield from find_images(entry.path, skipped, path)
                elif entry.name.lower().endswith(EXTENSIONS) and not _is_special(entry):
                    yield path, entry
                else:
                    skipped[_kind(entry.name)] += 1
    except OSError as error:  # a circular link, or a folder without permission
        raise unreadable(str(error.filename), error) from None


def _is_special(entry: os.DirEntry[str]) -> bool:
    """Returns whether reading an entry could wait for ever: a pipe, a socket or a device, or a link to one."""
    return not entry.is_file() and Path(entry.path).exists()


def unreadable(path: str, error: OSError) -> DataError:
    """Returns the error for a file or folder that cannot be read."""
    return DataError(f"cannot read {path} ({error.strerror}); repair or remove it")


def describe_skipped(skipped: Counter[str]) -> str:
    """Describes what find_images left out, such as "skipped 3 files that are not images (2 .txt, 1 hidden)"."""
    if not skipped:
        return ""
    kinds = [f"{count:,} {kind}" for kind, count in sorted(skipped.items(), key=lambda item: (-item[1], item[0]))]
    listed = ", ".join(kinds[:_LISTED_KINDS]) + (", ..." if len(kinds) > _LISTED_KINDS else "")
    total = sum(skipped.values())
    files = "1 file that is not an image" if total == 1 else f"{total:,} files that are not images"
    return f"skipped {files} ({listed})"


def _kind(name: str) -> str:
    extension = Path(name).suffix.lower()
    return escape(extension) if extension else "without ending"
