"""Counts the training images of a data set without decoding any. Imports no torch.

To add a data set, write a module with these two functions and list the module in DATASETS in config/plugins.py:

    load(settings: DataSettings) -> ArrayDataset
    count_per_class(settings: DataSettings) -> list[int]

`count_per_class` returns the number of training images of each class. It must be fast and import no torch: the launcher
calls it for its forecast. `load` must return exactly as many images.
"""

from trainer.config.plugins import DATASETS, load_plugin
from trainer.config.schema import DataSettings


def count_training_images(data: DataSettings) -> int:
    """Returns the number of images that a run trains on: the training split without the images held out for validation.

    Raises DataError when the data set is missing.
    """
    counts: list[int] = load_plugin(DATASETS, data.name).count_per_class(data)
    return sum(count - count_held_out(count, data.validation_fraction) for count in counts)


def count_held_out(class_size: int, fraction: float) -> int:
    """Returns how many images of a class are held out for validation: at least one, or none when fraction is 0."""
    return max(1, round(fraction * class_size)) if fraction else 0
