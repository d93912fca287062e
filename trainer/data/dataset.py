"""What every data set is: uint8 images, labels and class names, in memory, as NumPy arrays."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class ArraySplit:
    images: NDArray[np.uint8]
    """[N, H, W, C], C is 1 or 3, H = W = data.image_size."""
    labels: NDArray[np.int64]
    """[N], in [0, number of classes)."""

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, slots=True)
class ArrayDataset:
    train: ArraySplit
    test: ArraySplit
    classes: tuple[str, ...]
    notes: tuple[str, ...] = ()
    """Lines for the user."""
