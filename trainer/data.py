"""A data set in, its splits out: uint8 tensors in memory, channels last; and their chunks for evaluation."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from trainer import randomness
from trainer.datasets import cifar10, digits, image_folder
from trainer.datasets import dataset as sets
from trainer.errors import DataError
from trainer.settings import Data
from trainer.world import World

# To add a data set, write its file in datasets/, list it here, and name it in trainer/settings.py.
DATASETS = {"cifar10": cifar10.load, "image_folder": image_folder.load, "digits": digits.load}


@dataclass(frozen=True, slots=True)
class Images:
    """One split in memory."""

    images: Tensor
    """uint8 [N, C, H, W], channels last in memory"""
    labels: Tensor
    """int64 [N]"""

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, slots=True)
class Splits:
    train: Images
    validation: Images | None
    test: Images
    classes: tuple[str, ...]
    notes: tuple[str, ...] = ()
    """Lines for the user."""


def load(data: Data, seed: int, world: World) -> Splits:
    """All splits, read by rank 0 first. Raises DataError on every rank."""
    source = world.first_then_rest(lambda: DATASETS[data.name](data))
    train, test = _tensors(source.train), _tensors(source.test)
    validation = None
    if data.validation_fraction:
        held_out = hold_out(train.labels, data.validation_fraction, seed)
        for label, name in enumerate(source.classes):
            if held_out[train.labels == label].all():
                raise DataError(
                    f"class {name} has too few training images to hold some out; "
                    "add some, or set data.validation_fraction=0"
                )
        validation, train = _some(train, held_out), _some(train, ~held_out)
        test = _some(test, torch.ones(len(test), dtype=torch.bool))  # a copy: it may lie in one block with train
    splits = Splits(train, validation, test, source.classes, source.notes)
    _check(data, splits)
    return splits


def hold_out(labels: Tensor, fraction: float, seed: int) -> Tensor:
    """Which samples are held out: the same share of each class, at least one. labels int64 [N] -> bool [N]."""
    draws = randomness.uniform(torch.arange(len(labels)), randomness.key(seed, "validation"))
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(int(labels.max()) + 1):
        members = (labels == label).nonzero().squeeze(1)
        count = max(1, round(fraction * len(members)))
        held_out[members[draws[members].argsort(stable=True)[:count]]] = True
    return held_out


def _tensors(split: sets.Split) -> Images:
    images = np.ascontiguousarray(split.images)  # torchvision's CIFAR-10 comes channel by channel
    return Images(torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(split.labels))


def _some(part: Images, which: Tensor) -> Images:
    """which: bool [N]. In memory of their own, laid out as before."""
    return Images(part.images.permute(0, 2, 3, 1)[which].permute(0, 3, 1, 2), part.labels[which])


def _check(data: Data, splits: Splits) -> None:
    samples = len(splits.train)
    if data.global_batch_size > samples:
        raise DataError(
            f"data.global_batch_size={data.global_batch_size} is larger than the training set "
            f"of {samples} images; lower it"
        )


def on_device(splits: Splits, data: Data, world: World) -> Splits:
    """The splits where batches are cut from them: on the GPU if they fit in half of what is free, else in memory.

    With worker processes they stay in memory: a worker cannot share what lies on a GPU.
    """
    if world.device.type != "cuda" or data.workers:
        return splits
    parts = [part for part in (splits.train, splits.validation, splits.test) if part is not None]
    free_bytes, _ = torch.cuda.mem_get_info(world.device)
    if sum(part.images.nbytes for part in parts) > free_bytes // 2:
        return splits

    def moved(part: Images) -> Images:
        return Images(part.images.to(world.device), part.labels.to(world.device))

    validation = moved(splits.validation) if splits.validation is not None else None
    return replace(splits, train=moved(splits.train), validation=validation, test=moved(splits.test))


def chunks(part: Images, batch_size: int, world: World) -> Iterator[tuple[int, Tensor, Tensor]]:
    """This rank's chunks of a split for evaluation: number, images uint8 [B, C, H, W], labels int64 [B]."""
    for chunk in range(world.rank, num_chunks(part, batch_size), world.size):
        at = slice(chunk * batch_size, (chunk + 1) * batch_size)
        yield chunk, _moved(part.images[at], world.device), _moved(part.labels[at], world.device)


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    """What a GPU is sent need not be waited for."""
    if device.type == tensor.device.type:
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def num_chunks(part: Images, batch_size: int) -> int:
    """Chunks of a split: the same for any number of ranks."""
    return -(-len(part) // batch_size)
