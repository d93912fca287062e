"""Loads scikit-learn's digits: 1,797 handwritten digits, 8x8 grey, stored in that package, so nothing is downloaded.

E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998.
"""

import importlib.util
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trainer.config.schema import DataSettings
from trainer.data.dataset import ArrayDataset, ArraySplit, checksum_images
from trainer.data.images.decode import fit_images

CLASSES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CHANNELS = 1
_TEST_EVERY = 5


def load(data: DataSettings) -> ArrayDataset:
    """Returns 1,433 training and 364 test images. The data set has no official test split: every fifth sample of each
    class is a test sample."""
    pixels, labels = _read_table()
    grey = np.round(pixels * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
    images = fit_images(grey, data.side_pixels, 3 if data.channels == 3 else 1)
    position_in_class = np.zeros(len(labels), dtype=np.int64)
    for label in range(len(CLASSES)):
        members = labels == label
        position_in_class[members] = np.arange(members.sum())
    is_test = position_in_class % _TEST_EVERY == 0
    train, test = (ArraySplit(images[mask], labels[mask], checksum_images(grey[mask])) for mask in (~is_test, is_test))
    return ArrayDataset(train, test, CLASSES)


def count_per_class(data: DataSettings) -> list[int]:
    """Returns the number of training images of each class, without the test samples."""
    return [142, 145, 141, 146, 144, 145, 144, 143, 139, 144]


def _read_table() -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Returns pixels [1797, 64] in [0, 16] and labels [1797].

    Reads scikit-learn's data file itself, because importing the package takes 1.8 s.
    """
    package = importlib.util.find_spec("sklearn")
    folder = Path(package.origin).parent if package is not None and package.origin else Path()
    file = folder / "datasets" / "data" / "digits.csv.gz"
    if file.is_file():
        table = np.loadtxt(file, delimiter=",")
    else:  # this version of scikit-learn stores the file elsewhere
        from sklearn.datasets import load_digits

        source = load_digits()
        table = np.column_stack([source.data, source.target])
    return table[:, :-1], table[:, -1].astype(np.int64)
