"""Loads the splits of a data set as uint8 tensors, and cuts them into chunks for evaluation."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from trainer import rng
from trainer.config.plugins import DATASETS, load_plugin
from trainer.config.schema import DataSettings
from trainer.data.dataset import ArraySplit, find_labels
from trainer.data.identity import DataIdentity, identify_split
from trainer.data.image_counts import check_batch_size, count_held_out
from trainer.distributed.world import World
from trainer.errors import DataError


@dataclass(frozen=True, slots=True)
class TensorSplit:
    """Images and labels of one split, in memory or on a GPU."""

    images: Tensor
    """uint8 [N, C, H, W], channels last in memory."""
    labels: Tensor
    """int64 [N]."""

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, slots=True)
class DataSplits:
    """All splits of a run's data set."""

    train: TensorSplit
    validation: TensorSplit | None
    """None without data.validation_fraction."""
    test: TensorSplit
    classes: tuple[str, ...]
    identity: DataIdentity
    """Of the train and test splits of the data set, before images are held out for validation."""
    notes: tuple[str, ...] = ()
    """Lines to print for the user."""


def load_splits(data: DataSettings, seed: int, world: World) -> DataSplits:
    """Returns all splits. Rank 0 reads the data set first, so that it alone downloads or decodes.

    Raises DataError on every rank, and WorldError if a rank has other data than rank 0.
    """
    dataset = world.rank0_first(lambda: load_plugin(DATASETS, data.name).load(data))
    identity = DataIdentity(
        dataset.classes,
        {name: identify_split(getattr(dataset, name), len(dataset.classes)) for name in ("train", "test")},
    )
    identity = _agree(identity, data, world)
    train, test = _to_tensors(dataset.train), _to_tensors(dataset.test)
    validation = None
    if data.validation_fraction and len(train):
        is_held_out = hold_out_validation(train.labels, data.validation_fraction, seed)
        for label, name in enumerate(dataset.classes):
            if is_held_out[train.labels == label].all():
                raise DataError(
                    f"class {name} has too few training images to hold some out for validation; "
                    "add some, or set data.validation_fraction=0"
                )
        validation, train = _select(train, is_held_out), _select(train, ~is_held_out)
    check_batch_size(data, len(train))
    return DataSplits(train, validation, test, dataset.classes, identity, dataset.notes)


def load_split(
    data: DataSettings, split: str, classes: Sequence[str], seed: int, world: World
) -> tuple[TensorSplit, DataIdentity, tuple[str, ...]]:
    """Returns one split for an evaluation, its identity, and lines to print for the user.

    Reads an image folder's folder of that split only. split: train, validation or test. classes: those of the network,
    to which the labels refer. Raises DataError and WorldError as load_splits does, and DataError for an unknown class.
    """
    source = "test" if split == "test" else "train"
    array_split, notes = world.rank0_first(lambda: _load_source(data, source, classes))
    identity = DataIdentity(tuple(classes), {source: identify_split(array_split, len(classes))})
    identity = _agree(identity, data, world)
    tensor_split = _to_tensors(array_split)
    if split != "test" and data.validation_fraction:
        is_held_out = hold_out_validation(tensor_split.labels, data.validation_fraction, seed)
        tensor_split = _select(tensor_split, is_held_out if split == "validation" else ~is_held_out)
    return tensor_split, identity, notes


def _load_source(data: DataSettings, source: str, classes: Sequence[str]) -> tuple[ArraySplit, tuple[str, ...]]:
    """Returns the train or test split with labels that refer to `classes`, and lines to print for the user."""
    module = load_plugin(DATASETS, data.name)
    if hasattr(module, "load_split"):
        array_split, notes = module.load_split(data, source, classes)
        return array_split, notes
    dataset = module.load(data)
    array_split = getattr(dataset, source)
    labels = np.array(find_labels(dataset.classes, classes))[array_split.labels]
    return replace(array_split, labels=labels), dataset.notes


def _agree(identity: DataIdentity, data: DataSettings, world: World) -> DataIdentity:
    """Returns the identity of the data set; only rank 0 gets the lists of samples, which it alone compares and writes.

    Raises WorldError unless all ranks have read the same data: each machine may have a copy of its own.
    """
    world.check_equal(
        f"data set (data.root={data.root})",
        hashlib.sha256(json.dumps(identity.to_json()).encode()).hexdigest(),  # short: each rank gets that of every rank
        "Give all machines the same files, or a folder that they share",
    )
    return identity if world.is_rank0 else identity.without_samples()


def hold_out_validation(labels: Tensor, fraction: float, seed: int) -> Tensor:
    """Chooses the same fraction of each class, at least one sample. Takes int64 [N], returns a mask, bool [N]."""
    draws = rng.uniform(torch.arange(len(labels)), rng.key(seed, "validation"))
    is_held_out = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(int(labels.max()) + 1):
        members = (labels == label).nonzero().squeeze(1)
        count = count_held_out(len(members), fraction)
        is_held_out[members[draws[members].argsort(stable=True)[:count]]] = True
    return is_held_out


def move_to_device(splits: DataSplits, data: DataSettings, world: World) -> DataSplits:
    """Returns the splits on the GPU if they fit into half of its free memory, else unchanged.

    They also stay in main memory with DataLoader workers: a worker process cannot share the GPU's memory.
    """
    if world.device.type != "cuda" or data.workers:
        return splits
    all_splits = [split for split in (splits.train, splits.validation, splits.test) if split is not None]
    free_bytes, _ = torch.cuda.mem_get_info(world.device)
    if sum(split.images.nbytes for split in all_splits) > free_bytes // 2:
        return splits

    def move(split: TensorSplit) -> TensorSplit:
        return TensorSplit(split.images.to(world.device), split.labels.to(world.device))

    validation = move(splits.validation) if splits.validation is not None else None
    return replace(splits, train=move(splits.train), validation=validation, test=move(splits.test))


def evaluation_chunks(split: TensorSplit, batch_size: int, world: World) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yields this rank's chunks of a split: chunk number, images uint8 [B, C, H, W], labels int64 [B].

    A split has the same chunks on any number of ranks; rank r takes chunks r, r + world size, ...
    """
    for chunk in range(world.rank, num_chunks(split, batch_size), world.size):
        samples = slice(chunk * batch_size, (chunk + 1) * batch_size)
        yield chunk, _send(split.images[samples], world.device), _send(split.labels[samples], world.device)


def num_chunks(split: TensorSplit, batch_size: int) -> int:
    """Returns the number of chunks of a split, on all ranks together."""
    return -(-len(split) // batch_size)


def _to_tensors(split: ArraySplit) -> TensorSplit:
    images = np.ascontiguousarray(split.images)  # torchvision stores CIFAR-10 channels first
    return TensorSplit(torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(split.labels))


def _select(split: TensorSplit, mask: Tensor) -> TensorSplit:
    """Copies the samples of a mask, bool [N]. The copy is channels last too."""
    return TensorSplit(split.images.permute(0, 2, 3, 1)[mask].permute(0, 3, 1, 2), split.labels[mask])


def _send(tensor: Tensor, device: torch.device) -> Tensor:
    """Copies a tensor to the device. From pinned memory, so that the CPU does not wait for a GPU."""
    if device.type == tensor.device.type:
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)
