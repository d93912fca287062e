"""Counts the training images of a data set without decoding one. No torch."""

from trainer.config.plugins import DATASETS, load_plugin
from trainer.config.schema import DataSettings


def count_training_images(data: DataSettings) -> int:
    """Images that a run trains on, without those held out for validation. Raises DataError: the data set is missing."""
    counts: list[int] = load_plugin(DATASETS, data.name).count_per_class(data)
    fraction = data.validation_fraction
    return sum(count - (max(1, round(fraction * count)) if fraction else 0) for count in counts)
