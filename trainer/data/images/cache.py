"""Returns the decoded images of a split: from its pack, or decoded and packed for the next start."""

import contextlib
import os
import secrets
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trainer.data.images import pack
from trainer.data.images.pack import ImageFile, Pack, PackName
from trainer.data.images.pool import Decoded, OutputFile, decode_files, write_rows

_COPIED_ROWS = 256  # at once, from an earlier pack


@dataclass(frozen=True, slots=True)
class DecodedFiles:
    """The decoded images of a split."""

    images: NDArray[np.uint8]
    """[N, image_size, image_size, channels]; none if there are errors"""
    checksums: NDArray[np.uint32]
    """[N], CRC-32 of each file"""
    errors: dict[int, str]
    """why a file could not be decoded, by its position"""
    notes: tuple[str, ...] = ()
    """lines to print for the user"""


def load_or_decode(
    folder: Path, group: str, root: str, files: Sequence[ImageFile], image_size: int, channels: int
) -> DecodedFiles:
    """Returns the images of the files. Decodes only those that no pack in the folder has.

    group: as in PackName; root: the folder that the paths of the files start from. Damaged files raise nothing, so that
    the caller can name all of them; the pack spares decoding the others again. A pack that cannot be written raises
    nothing either: a line for the user reports it.
    """
    name = PackName(group, image_size, channels, pack.fingerprint(image_size, channels, files))
    shape = (len(files), image_size, image_size, channels)
    with contextlib.ExitStack() as stack:
        earlier, rows = None, {}
        for stored_pack, is_same in _open_packs(folder, name, shape[1:], stack):
            with contextlib.suppress(*pack.DAMAGE):
                if is_same and not stored_pack.errors:
                    images = stored_pack.read_images()
                    stored_pack.keep_locked()
                    return DecodedFiles(images, stored_pack.checksums, {}, _describe_bits(stored_pack.grey_bits))
                if is_same and (errors := _retry(stored_pack, root, files, shape)):
                    return DecodedFiles(np.empty((0, *shape[1:]), np.uint8), stored_pack.checksums, errors)
                earlier, rows = stored_pack, stored_pack.rows()
                break
        try:
            return _decode_and_pack(folder, name, root, files, shape, earlier, rows)
        except OSError as error:
            problem = f"cannot cache decoded images in {folder} ({error.strerror})"
    images = np.empty(shape, np.uint8)
    decoded = decode_files(_paths(root, files), range(len(files)), shape[1:], images)
    notes = (f"{problem}; set data.cache_dir to start faster next time", *_describe_bits(decoded.grey_bits))
    return DecodedFiles(images, decoded.checksums, decoded.errors, notes)


def _open_packs(
    folder: Path, name: PackName, image_shape: tuple[int, ...], stack: contextlib.ExitStack
) -> Iterator[tuple[Pack, bool]]:
    """Yields the packs that may help, and whether each is the pack of exactly these files. The stack closes them."""
    for path in pack.find_packs(folder, name):
        stored_pack = pack.open_pack(path, image_shape)
        if stored_pack is not None:
            stack.callback(stored_pack.close)
            yield stored_pack, path.name.endswith(f"-{name.fingerprint}.npy")


def _paths(root: str, files: Iterable[ImageFile]) -> list[str]:
    return [os.path.join(root, file.path) for file in files]


def _retry(stored_pack: Pack, root: str, files: Sequence[ImageFile], shape: tuple[int, ...]) -> dict[int, str]:
    """Decodes the damaged files of a pack again, which another version of Pillow may read. Returns what fails."""
    damaged = list(stored_pack.errors)
    images = np.empty((len(damaged), *shape[1:]), np.uint8)
    paths = _paths(root, (files[row] for row in damaged))
    errors = decode_files(paths, range(len(damaged)), shape[1:], images).errors
    return {damaged[position]: reason for position, reason in errors.items()}


def _decode_and_pack(
    folder: Path,
    name: PackName,
    root: str,
    files: Sequence[ImageFile],
    shape: tuple[int, ...],
    earlier: Pack | None,
    rows: dict[tuple[str, int, int], int],
) -> DecodedFiles:
    """Writes the pack of the files and returns its images. Raises OSError if it cannot be written.

    earlier, rows: a pack with some of the images, and its row of each.
    """
    path = folder / str(name)
    partial = path.with_name(f".{path.stem}.{secrets.token_hex(4)}.partial")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        pack.delete_superfluous(folder, name)
        output = OutputFile(partial, pack.reserve(partial, shape))
        known = {position: rows[file[:3]] for position, file in enumerate(files) if file[:3] in rows}
        every = Decoded(np.zeros(len(files), np.uint32), np.zeros(len(files), np.uint8))
        if earlier is not None:
            _copy_rows(earlier, known, output, shape[1:])
            every.checksums[list(known)] = earlier.checksums[list(known.values())]
            every.grey_bits[list(known)] = earlier.grey_bits[list(known.values())]
        missing = [position for position in range(len(files)) if position not in known]
        paths = _paths(root, (files[position] for position in missing))
        decoded = decode_files(paths, missing, shape[1:], output)
        every.checksums[missing], every.grey_bits[missing] = decoded.checksums, decoded.grey_bits
        every.errors |= {missing[index]: reason for index, reason in decoded.errors.items()}
        pack.append_index(partial, output.start + int(np.prod(shape)), files, every)
        partial.replace(path)  # atomic, so that no process reads an incomplete pack
    finally:
        partial.unlink(missing_ok=True)
    written = pack.open_pack(path, shape[1:])
    if written is None:
        raise OSError(None, "another process has removed them")
    with contextlib.closing(written):
        images = np.empty((0, *shape[1:]), np.uint8) if every.errors else written.read_images()
        written.keep_locked()
    return DecodedFiles(images, every.checksums, every.errors, _describe_bits(every.grey_bits))


def _copy_rows(earlier: Pack, rows: dict[int, int], output: OutputFile, image_shape: tuple[int, ...]) -> None:
    """Copies images of an earlier pack. rows: the row in it of each row to write. Raises OSError."""
    targets = list(rows)
    for start in range(0, len(targets), _COPIED_ROWS):
        part = targets[start : start + _COPIED_ROWS]
        pixels = b"".join(earlier.read_row(rows[target]) for target in part)
        write_rows(output, part, np.frombuffer(pixels, np.uint8).reshape(len(part), *image_shape))


def _describe_bits(grey_bits: NDArray[np.uint8]) -> tuple[str, ...]:
    """Returns a line for the user if files with more than 8 bits of grey were not all scaled by 16 bits."""
    counts = dict(enumerate(np.bincount(grey_bits, minlength=17).tolist()))
    if not counts[8] and not counts[12]:
        return ()
    parts = [f"{counts[bits]:,} as 0 to {(1 << bits) - 1:,}" for bits in (8, 12, 16) if counts[bits]]
    return (f"images of 16-bit grey are scaled by the values that each one uses: {', '.join(parts)}",)
