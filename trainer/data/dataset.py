"""The in-memory format that every data set module returns from `load`."""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from unicodedata import normalize

import numpy as np
from numpy.typing import NDArray

from trainer.errors import DataError

_MAX_LISTED_CLASSES = 10


@dataclass(frozen=True, slots=True)
class ArraySplit:
    """Images and labels of one split, as NumPy arrays."""

    images: NDArray[np.uint8]
    """[N, H, W, C], C is 1 or 3, H = W = data.image_size."""
    labels: NDArray[np.int64]
    """[N], in [0, number of classes)."""
    checksums: NDArray[np.uint32] | None = None
    """[N], CRC-32 of each image file, or of the pixels before data.image_size and data.channels apply; None: of
    `images`."""
    names: tuple[str, ...] = ()
    """[N], the path of each image file under data.root; empty if the images do not come from files of their own."""
    sizes: tuple[int, ...] = ()
    """[N], the size of each image file in bytes; empty without names."""

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, slots=True)
class ArrayDataset:
    """Training and test split of a data set, with its class names."""

    train: ArraySplit
    test: ArraySplit
    classes: tuple[str, ...]
    notes: tuple[str, ...] = ()
    """Lines to print for the user."""


def checksum_images(images: NDArray[np.uint8]) -> NDArray[np.uint32]:
    """Returns the CRC-32 of each image. Takes uint8 [N, H, W, C], returns uint32 [N]."""
    return np.array([zlib.crc32(image.data) for image in np.ascontiguousarray(images)], dtype=np.uint32)


def find_labels(classes: Sequence[str], expected: Sequence[str]) -> list[int]:
    """Returns the label that a network has for each class of a data set. Compares names in Unicode's form NFC.

    Raises DataError if the network does not know a class.
    """
    labels = {normalize("NFC", name): label for label, name in enumerate(expected)}
    if any(normalize("NFC", name) not in labels for name in classes):
        raise DataError(
            f"the classes of the data set and of the network differ: expected {list_names(expected)}; got "
            f"{list_names(classes)}. Set data.name and data.root to a data set with the network's classes"
        )
    return [labels[normalize("NFC", name)] for name in classes]


def list_names(names: Sequence[str]) -> str:
    """Returns the first ten names, separated by commas."""
    return ", ".join(names[:_MAX_LISTED_CLASSES]) + (", ..." if len(names) > _MAX_LISTED_CLASSES else "")
