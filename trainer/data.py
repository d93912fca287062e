"""The data set and the order in, this rank's shards out: uint8 tensors in memory, whole batches fetched at once.

The order knows nothing of ranks (sampler.py). Each global batch is cut here into one shard a rank, or into
train.virtual_ranks of them; accelerate's own dealing (split_batches) refuses batch sizes that the number of ranks does
not divide.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate.data_loader import prepare_data_loader
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from trainer import randomness, shards, stop
from trainer.datasets import cifar10, digits, image_folder
from trainer.datasets import dataset as sets
from trainer.errors import DataError
from trainer.sampler import GlobalBatches
from trainer.settings import Data, RunConfig
from trainer.step import Samples, Shard
from trainer.world import World

# To add a data set, write its file in datasets/, list it here, and name it in trainer/settings.py.
DATASETS = {"cifar10": cifar10.load, "image_folder": image_folder.load, "digits": digits.load}


@dataclass(frozen=True, slots=True)
class Images:
    """One split in memory."""

    images: Tensor
    """uint8 [N, C, H, W]"""
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
        validation = Images(train.images[held_out], train.labels[held_out])
        train = Images(train.images[~held_out], train.labels[~held_out])
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
    return Images(torch.from_numpy(split.images).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(split.labels))


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


Place = tuple[int, Tensor, Tensor | None]
"""A shard's number, its samples' ids, and those of what they are mixed with, if they are."""


class _Shards(Dataset[list[Shard]]):
    """Fetches whole shards by their ids; DataLoader calls __getitems__ once a step."""

    def __init__(self, part: Images) -> None:
        self._part = part

    def __len__(self) -> int:
        return len(self._part)

    def __getitems__(self, places: list[Place]) -> list[Shard]:
        return [self._shard(*place) for place in places]

    def _shard(self, number: int, ids: Tensor, partners: Tensor | None) -> Shard:
        idle = len(ids) == 0
        if idle:
            ids = ids.new_zeros(1)
            partners = ids if partners is not None else None
        own, mixed = self._samples(ids), self._samples(partners) if partners is not None else None
        if idle:
            own.images.zero_()
        return Shard(own, mixed, number, 0.0 if idle else 1.0)

    def _samples(self, ids: Tensor) -> Samples:
        place = ids.to(self._part.images.device, non_blocking=True)
        return Samples(self._part.images[place], self._part.labels[place], place)


class _RankShards(Sampler[list[Place]]):
    """The places of this rank's shards, for each step from one to another."""

    def __init__(self, batches: GlobalBatches, config: RunConfig, world: World, first_step: int, end_step: int) -> None:
        self._batches, self._virtual_ranks = batches, config.train.virtual_ranks
        self._mixes = not {"mixup", "cutmix"}.isdisjoint(config.data.augment)
        self._rank, self._world_size = world.rank, world.size
        self._steps = range(first_step, end_step)

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[list[Place]]:
        for step in self._steps:
            ids = self._batches.ids(step)
            partners = self._batches.partners(step) if self._mixes else None
            # Plainly each rank has one shard, and an empty one too: DDP waits for all. Virtual ranks have none empty.
            number = min(len(ids), self._virtual_ranks) if self._virtual_ranks else self._world_size
            places = shards.cut(len(ids), number)
            first, end = shards.cut(number, self._world_size)[self._rank]
            cuts = [(shard, slice(*places[shard])) for shard in range(first, end)]
            yield [(shard, ids[at], None if partners is None else partners[at]) for shard, at in cuts]


def train_loader(
    part: Images,
    batches: GlobalBatches,
    config: RunConfig,
    world: World,
    first_step: int,
    end_step: int,
) -> Any:
    """An iterable of this rank's list of Shards for each step from first_step up to end_step, on the device.

    One loader for the whole run: workers start once, and to resume is to begin at another step.
    """
    loader = DataLoader(
        _Shards(part),
        batch_sampler=_RankShards(batches, config, world, first_step, end_step),
        collate_fn=_whole,
        num_workers=config.data.workers,
        worker_init_fn=stop.ignore_in_worker,
        pin_memory=world.device.type == "cuda" and part.images.device.type == "cpu",
    )
    # One process as far as accelerate can see: the shards are cut already, and would be cut again.
    return prepare_data_loader(
        loader, world.device, num_processes=1, process_index=0, put_on_device=True, non_blocking=True
    )


def _whole(batch: list[Shard]) -> list[Shard]:
    """DataLoader's collate step, with nothing left to do."""
    return batch


def chunks(part: Images, batch_size: int, world: World) -> Iterator[tuple[int, Tensor, Tensor]]:
    """This rank's chunks of a split for evaluation: number, images uint8 [B, C, H, W], labels int64 [B]."""
    for chunk in range(world.rank, num_chunks(part, batch_size), world.size):
        at = slice(chunk * batch_size, (chunk + 1) * batch_size)
        yield chunk, part.images[at].to(world.device), part.labels[at].to(world.device)


def num_chunks(part: Images, batch_size: int) -> int:
    """Chunks of a split: the same for any number of ranks."""
    return -(-len(part) // batch_size)
