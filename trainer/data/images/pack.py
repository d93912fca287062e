"""Packs: one file with the decoded images of a split, which the next start reads instead of the image files.

    images     uint8 [N, image_size, image_size, channels]
    checksums  uint32 [N], CRC-32 of each image file
    grey_bits  uint8 [N], what decode_file returned
    errors     the reason for each file that could not be decoded, by row
    index      path, size and modification time of each image file

They follow each other in one file, as numpy.save writes arrays; errors and index are compressed JSON. A new pack takes
the images of unchanged files from an earlier one.
"""

import fcntl
import hashlib
import json
import os
import re
import time
import zlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from trainer.data.images.pool import Decoded

_FORMAT = 2
_NAME = re.compile(r".+-\d+x\d-[0-9a-f]{32}\.npy")
_NAME_OF_OLDER_FORMAT = re.compile(r"[0-9a-f]{32}\.npy")
_MOST_PACKS = 4
_DAY_SECONDS = 86400.0
_UNUSED_DAYS = 90
_UNKNOWN_USE_DAYS = 7
_locked: dict[Path, IO[bytes]] = {}  # packs that this process has loaded
DAMAGE = (OSError, ValueError, EOFError, KeyError, TypeError, AttributeError, zlib.error)
"""What reading a damaged or truncated pack raises."""


class ImageFile(NamedTuple):
    """An image file of a data set."""

    path: str
    """relative to data.root"""
    size_bytes: int
    modified_ns: int
    label: int


@dataclass(frozen=True, slots=True)
class PackName:
    """Names the pack of a split."""

    group: str
    """the split, and the data set if the folder holds several"""
    image_size: int
    channels: int
    fingerprint: str
    """changes with the path, size or modification time of any file"""

    def __str__(self) -> str:
        return f"{self.group}-{self.image_size}x{self.channels}-{self.fingerprint}.npy"

    def is_same_group(self, name: str, same_shape: bool = False) -> bool:
        """Returns whether `name` is a pack of the same split and data set, and with same_shape of the same shape."""
        shape = f"{self.image_size}x{self.channels}" if same_shape else r"\d+x\d"
        return re.fullmatch(rf"{re.escape(self.group)}-{shape}-[0-9a-f]{{32}}\.npy", name) is not None


def fingerprint(image_size: int, channels: int, files: Sequence[ImageFile]) -> str:
    """Returns the fingerprint of a pack of these files."""
    digest = hashlib.sha256(json.dumps([_FORMAT, image_size, channels]).encode())
    lines = (f"{file.path}\0{file.size_bytes}\0{file.modified_ns}\0" for file in files)
    digest.update("".join(lines).encode(errors="surrogateescape"))
    return digest.hexdigest()[:32]


class Pack:
    """A pack that exists. Its lock keeps other processes from deleting it."""

    def __init__(self, file: IO[bytes], shape: tuple[int, ...]) -> None:
        """shape: of one image. Raises an error of DAMAGE if the file is not a complete pack of such images."""
        self._file = file
        np.lib.format.read_magic(file)
        full_shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        if full_shape[1:] != shape or dtype != np.uint8:
            raise ValueError("unexpected images")
        self._start, self._bytes_per_image = file.tell(), int(np.prod(shape))
        file.seek(self._start + full_shape[0] * self._bytes_per_image)
        self.checksums: NDArray[np.uint32] = np.load(file, allow_pickle=False)
        self.grey_bits: NDArray[np.uint8] = np.load(file, allow_pickle=False)
        self.errors: dict[int, str] = {int(row): reason for row, reason in _load_json(file).items()}
        """reason why a file could not be decoded, by row"""
        self._index_position = file.tell()

    def rows(self) -> dict[tuple[str, int, int], int]:
        """Returns the row of each decoded image by path, size in bytes and modification time. May raise DAMAGE."""
        self._file.seek(self._index_position)
        files = _load_json(self._file)
        return {tuple(file): row for row, file in enumerate(files) if row not in self.errors}

    def read_row(self, row: int) -> bytes:
        """Returns the pixels of one image. Raises OSError."""
        return os.pread(self._file.fileno(), self._bytes_per_image, self._start + row * self._bytes_per_image)

    def read_images(self) -> NDArray[np.uint8]:
        """Returns all images. May raise DAMAGE."""
        self._file.seek(0)
        images: NDArray[np.uint8] = np.load(self._file, allow_pickle=False)
        return images

    def keep_locked(self) -> None:
        """Keeps the lock until this process ends or calls release_packs()."""
        path = Path(self._file.name)
        if path in _locked:
            _locked[path].close()
        _locked[path] = self._file

    def close(self) -> None:
        """Closes the file, and releases the lock unless keep_locked() was called."""
        if self._file not in _locked.values():
            self._file.close()


def release_packs() -> None:
    """Lets other processes delete the packs that this process has loaded."""
    for file in _locked.values():
        file.close()
    _locked.clear()


def open_pack(path: Path, shape: tuple[int, ...]) -> Pack | None:
    """Opens a pack and notes its use. Returns None when it is missing, damaged or of another shape."""
    try:
        file = path.open("rb")
    except OSError:
        return None
    with suppress(OSError):  # a disk without locks: then the time of the last use protects the pack
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    with suppress(OSError):  # another user's pack, or a disk that is read-only
        os.utime(path)
    try:
        return Pack(file, shape)
    except DAMAGE:
        file.close()
        return None


def _load_json(file: IO[bytes]) -> Any:
    return json.loads(zlib.decompress(np.load(file, allow_pickle=False).tobytes()))


def _save_json(file: IO[bytes], content: object) -> None:
    np.save(file, np.frombuffer(zlib.compress(json.dumps(content).encode(), 1), dtype=np.uint8))


def find_packs(folder: Path, name: PackName) -> list[Path]:
    """Returns the packs that may hold images of this one: the pack itself first, then earlier ones, newest first."""
    exact = list(folder.glob(f"*-{name.fingerprint}.npy"))  # the data set may have moved, and its group with it
    earlier = [path for path in _by_last_use(folder) if name.is_same_group(path.name, same_shape=True)]
    return [*exact, *(path for path in earlier if path not in exact)]


def reserve(path: Path, shape: tuple[int, ...]) -> int:
    """Creates a pack with disk space for all images and returns the position of the first image in bytes.

    Raises OSError when the disk is full: before anything is decoded, not after.
    """
    with path.open("xb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        file.flush()
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), file.tell(), max(1, int(np.prod(shape))))
        return file.tell()


def append_index(path: Path, end: int, files: Sequence[ImageFile], decoded: Decoded) -> None:
    """Completes a pack. end: position behind the last image in bytes. Raises OSError."""
    with path.open("r+b") as file:
        file.seek(end)
        np.save(file, decoded.checksums)
        np.save(file, decoded.grey_bits)
        _save_json(file, decoded.errors)
        _save_json(file, [image_file[:3] for image_file in files])


def delete_superfluous(folder: Path, name: PackName) -> None:
    """Makes room for a new pack: deletes what docs/data.md says. Keeps packs that a running process has loaded."""
    now = time.time()
    for path in folder.glob(".*.partial"):  # of killed processes; a younger one may still be written
        if now - path.stat().st_mtime > _DAY_SECONDS:
            path.unlink(missing_ok=True)
    packs = _by_last_use(folder)
    others = [path for path in packs if name.is_same_group(path.name) and path.name != str(name)]
    for path in packs:
        is_unused = now - path.stat().st_mtime > _UNUSED_DAYS * _DAY_SECONDS
        if is_unused or path in others[_MOST_PACKS - 1 :] or _NAME_OF_OLDER_FORMAT.fullmatch(path.name):
            _delete_unless_in_use(path)


def _by_last_use(folder: Path) -> list[Path]:
    """Returns all packs of a folder, the last used first."""
    times = []
    for path in folder.glob("*.npy"):
        if not (_NAME.fullmatch(path.name) or _NAME_OF_OLDER_FORMAT.fullmatch(path.name)):
            continue  # a user's file in data.cache_dir
        with suppress(FileNotFoundError):  # another process has just deleted it
            times.append((path.stat().st_mtime_ns, path))
    return [path for _, path in sorted(times, reverse=True)]


def _delete_unless_in_use(path: Path) -> None:
    # Another process may have deleted it, or another user own it.
    with suppress(FileNotFoundError, PermissionError), path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        except OSError:  # a disk without locks
            if time.time() - path.stat().st_mtime < _UNKNOWN_USE_DAYS * _DAY_SECONDS:
                return
        path.unlink()
