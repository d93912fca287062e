"""A data set in, its splits out: uint8 tensors in memory, channels last; and their chunks for evaluation."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from trainer import rng
from trainer.config.plugins import DATASETS, load_plugin
from trainer.config.schema import DataSettings
from trainer.data.dataset import ArraySplit
from trainer.distributed.world import World
from trainer.errors import DataError


@dataclass(frozen=True, slots=True)
class TensorSplit:
    """One split in memory."""

    images: Tensor
    """uint8 [N, C, H, W], channels last in memory"""
    labels: Tensor
    """int64 [N]"""

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, slots=True)
class DataSplits:
    train: TensorSplit
    validation: TensorSplit | None
    test: TensorSplit
    classes: tuple[str, ...]
    notes: tuple[str, ...] = ()
    """Lines for the user."""


def load_splits(data: DataSettings, seed: int, world: World) -> DataSplits:
    """All splits, read by rank 0 first. Raises DataError on every rank."""
    source = world.rank0_first(lambda: load_plugin(DATASETS, data.name).load(data))
    train, test = _tensors(source.train), _tensors(source.test)
    validation = None
    if data.validation_fraction:
        held_out = hold_out_validation(train.labels, data.validation_fraction, seed)
        for label, name in enumerate(source.classes):
            if held_out[train.labels == label].all():
                raise DataError(
                    f"class {name} has too few training images to hold some out; "
                    "add some, or set data.validation_fraction=0"
                )
        validation, train = _some(train, held_out), _some(train, ~held_out)
        test = _some(test, torch.ones(len(test), dtype=torch.bool))  # a copy: it may lie in one block with train
    splits = DataSplits(train, validation, test, source.classes, source.notes)
    _check(data, splits)
    return splits


def hold_out_validation(labels: Tensor, fraction: float, seed: int) -> Tensor:
    """Which samples are held out: the same share of each class, at least one. labels int64 [N] -> bool [N]."""
    draws = rng.uniform(torch.arange(len(labels)), rng.key(seed, "validation"))
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(int(labels.max()) + 1):
        members = (labels == label).nonzero().squeeze(1)
        count = max(1, round(fraction * len(members)))
        held_out[members[draws[members].argsort(stable=True)[:count]]] = True
    return held_out


def _tensors(split: ArraySplit) -> TensorSplit:
    images = np.ascontiguousarray(split.images)  # torchvision's CIFAR-10 comes channel by channel
    return TensorSplit(torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(split.labels))


def _some(part: TensorSplit, which: Tensor) -> TensorSplit:
    """which: bool [N]. In memory of their own, laid out as before."""
    return TensorSplit(part.images.permute(0, 2, 3, 1)[which].permute(0, 3, 1, 2), part.labels[which])


def _check(data: DataSettings, splits: DataSplits) -> None:
    samples = len(splits.train)
    if data.global_batch_size > samples:
        raise DataError(
            f"data.global_batch_size={data.global_batch_size} is larger than the training set "
            f"of {samples} images; lower it"
        )


def move_to_device(splits: DataSplits, data: DataSettings, world: World) -> DataSplits:
    """The splits where batches are cut from them: on the GPU if they fit in half of what is free, else in memory.

    With worker processes they stay in memory: a worker cannot share what lies on a GPU.
    """
    if world.device.type != "cuda" or data.workers:
        return splits
    parts = [part for part in (splits.train, splits.validation, splits.test) if part is not None]
    free_bytes, _ = torch.cuda.mem_get_info(world.device)
    if sum(part.images.nbytes for part in parts) > free_bytes // 2:
        return splits

    def moved(part: TensorSplit) -> TensorSplit:
        return TensorSplit(part.images.to(world.device), part.labels.to(world.device))

    validation = moved(splits.validation) if splits.validation is not None else None
    return replace(splits, train=moved(splits.train), validation=validation, test=moved(splits.test))


def evaluation_chunks(part: TensorSplit, batch_size: int, world: World) -> Iterator[tuple[int, Tensor, Tensor]]:
    """This rank's chunks of a split for evaluation: number, images uint8 [B, C, H, W], labels int64 [B]."""
    for chunk in range(world.rank, num_chunks(part, batch_size), world.size):
        at = slice(chunk * batch_size, (chunk + 1) * batch_size)
        yield chunk, _moved(part.images[at], world.device), _moved(part.labels[at], world.device)


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    """What a GPU is sent need not be waited for."""
    if device.type == tensor.device.type:
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def num_chunks(part: TensorSplit, batch_size: int) -> int:
    """Chunks of a split: the same for any number of ranks."""
    return -(-len(part) // batch_size)
