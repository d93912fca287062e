"""scikit-learn's digits: 1,797 real handwritten digits, 8x8 grey, embedded in that package; nothing is downloaded.

E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998.
"""

import numpy as np

from trainer.datasets.dataset import Dataset, Split
from trainer.datasets.pixels import fit_all
from trainer.settings import Data

_CLASSES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_TEST_EVERY = 5


def load(data: Data) -> Dataset:
    """Every fifth sample of each class is the test set (there is no official one): about 1,440 and 360 images."""
    from sklearn.datasets import load_digits  # late: 1.8 s

    source = load_digits()
    grey = np.round(source.images * (255 / 16)).astype(np.uint8)[..., np.newaxis]
    images = fit_all(grey, data.image_size, 3 if data.channels == 3 else 1)
    labels = source.target.astype(np.int64)
    place_in_class = np.zeros(len(labels), dtype=np.int64)
    for label in range(len(_CLASSES)):
        members = labels == label
        place_in_class[members] = np.arange(members.sum())
    is_test = place_in_class % _TEST_EVERY == 0
    return Dataset(Split(images[~is_test], labels[~is_test]), Split(images[is_test], labels[is_test]), _CLASSES)
