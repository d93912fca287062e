"""The in-memory format that every data set module returns from `load`."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class ArraySplit:
    """Images and labels of one split, as NumPy arrays."""

    images: NDArray[np.uint8]
    """[N, H, W, C], C is 1 or 3, H = W = data.image_size."""
    labels: NDArray[np.int64]
    """[N], in [0, number of classes)."""

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
