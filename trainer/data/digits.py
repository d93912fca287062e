"""scikit-learn's digits: 1,797 real handwritten digits, 8x8 grey, embedded in that package; nothing is downloaded.

E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998.
"""

import importlib.util
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trainer.config.schema import DataSettings
from trainer.data.dataset import ArrayDataset, ArraySplit
from trainer.data.decode import fit_images

_CLASSES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_TEST_EVERY = 5


def load(data: DataSettings) -> ArrayDataset:
    """Every fifth sample of each class is the test set (there is no official one): about 1,440 and 360 images."""
    pixels, labels = _table()
    grey = np.round(pixels * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
    images = fit_images(grey, data.side_pixels, 3 if data.channels == 3 else 1)
    place_in_class = np.zeros(len(labels), dtype=np.int64)
    for label in range(len(_CLASSES)):
        members = labels == label
        place_in_class[members] = np.arange(members.sum())
    is_test = place_in_class % _TEST_EVERY == 0
    return ArrayDataset(
        ArraySplit(images[~is_test], labels[~is_test]), ArraySplit(images[is_test], labels[is_test]), _CLASSES
    )


def count_per_class(data: DataSettings) -> list[int]:
    """Training images of each class: every fifth of 178, 182, ... is for the test."""
    return [142, 145, 141, 146, 144, 145, 144, 143, 139, 144]


def _table() -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Pixels [1797, 64], in [0, 16], and labels [1797], from that package's file; to import it takes 1.8 s."""
    found = importlib.util.find_spec("sklearn")
    place = Path(found.origin).parent if found is not None and found.origin else Path()
    file = place / "datasets" / "data" / "digits.csv.gz"
    if file.is_file():
        table = np.loadtxt(file, delimiter=",")
    else:  # it has been moved
        from sklearn.datasets import load_digits

        source = load_digits()
        table = np.column_stack([source.data, source.target])
    return table[:, :-1], table[:, -1].astype(np.int64)
