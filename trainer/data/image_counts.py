"""Counts the training images of a data set without decoding any. Imports no torch.

To add a data set, write a module with these parts and list the module in DATASETS in config/plugins.py:

    load(settings: DataSettings) -> ArrayDataset
    count_per_class(settings: DataSettings) -> list[int]

It may also have `load_split`, which reads one split for an evaluation, and `identify_files`, which lets the launcher
compare the data set with a checkpoint's before training starts, as image_folder.py does.

`count_per_class` returns the number of training images of each class. It must be fast and import no torch: the launcher
calls it for its forecast. `load` must return exactly as many images.

Two more parts are optional. They let the launcher refuse a run before it starts, and the ranks refuse it without them:

    CHANNELS: int                                     # 1 or 3, of the images with data.channels=auto
    check_files(settings: DataSettings) -> None       # raises DataError if `load` would not find its files
"""

from trainer.config.plugins import DATASETS, load_plugin
from trainer.config.schema import DataSettings
from trainer.errors import DataError


def count_training_images(data: DataSettings) -> int:
    """Returns the number of images that a run trains on: the training split without the images held out for validation.

    Raises DataError when the data set is missing, or a class would have no image left.
    """
    counts = count_per_class(data)
    held_out_counts = [count_held_out(count, data.validation_fraction) for count in counts]
    if any(0 < count <= held_out for count, held_out in zip(counts, held_out_counts, strict=True)):
        raise DataError(
            f"a class of {min(counts)} training images has too few to hold some out for validation; add some, or set "
            "data.validation_fraction=0"
        )
    return sum(counts) - sum(held_out_counts)


def check_batch_size(data: DataSettings, num_images: int) -> None:
    """Raises DataError when the training split has fewer images than a global batch, or none."""
    if not num_images:
        raise DataError("the training set has no images; add some, or set data.name and data.root to another data set")
    if data.global_batch_size > num_images:
        raise DataError(
            f"data.global_batch_size={data.global_batch_size} is larger than the training set "
            f"of {num_images} images; lower it"
        )


def count_per_class(data: DataSettings) -> list[int]:
    """Returns the number of training images of each class. Raises DataError when the data set is missing."""
    counts: list[int] = load_plugin(DATASETS, data.name).count_per_class(data)
    return counts


def check_files(data: DataSettings) -> None:
    """Raises DataError if the data set's files are missing, as far as that shows without reading them."""
    check = getattr(load_plugin(DATASETS, data.name), "check_files", None)
    if check is not None:
        check(data)


def image_channels(data: DataSettings) -> int | None:
    """Returns the channels of the images; None if the data set does not say how many it has by itself."""
    if data.channels != "auto":
        return int(data.channels)
    channels: int | None = getattr(load_plugin(DATASETS, data.name), "CHANNELS", None)
    return channels


def count_held_out(class_size: int, fraction: float) -> int:
    """Returns how many images of a class are held out for validation: at least one, unless fraction or size is 0."""
    return max(1, round(fraction * class_size)) if fraction and class_size else 0
