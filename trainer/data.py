"""The data set and the order in, this rank's shards out: uint8 tensors in memory, whole batches fetched at once.

The order knows nothing of ranks (sampler.py). Each global batch is cut here into one shard a rank, or into
train.virtual_ranks of them; accelerate's own dealing (split_batches) refuses batch sizes that the number of ranks does
not divide.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from accelerate.data_loader import prepare_data_loader
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from trainer import randomness, shards, stop
from trainer.augment import Augment
from trainer.datasets import cifar10, digits, image_folder
from trainer.datasets import dataset as sets
from trainer.errors import DataError
from trainer.sampler import GlobalBatches
from trainer.settings import Data, RunConfig
from trainer.step import Samples, Shard
from trainer.world import World

# To add a data set, write its file in datasets/, list it here, and name it in trainer/settings.py.
DATASETS = {"cifar10": cifar10.load, "image_folder": image_folder.load, "digits": digits.load}

_RUN_SAMPLES = 1 << 14  # of a rank whose ids are found at once: a hash has a fixed cost
_BLOCK_BYTES = 3 << 20  # of uint8 images fetched at once: a thousand of 32 pixels, which fit into a CPU's caches


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
    return Images(torch.from_numpy(split.images).permute(0, 3, 1, 2), torch.from_numpy(split.labels))


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


class _Cut(NamedTuple):
    """A shard: its number among those of the global batch, and where it lies in its block."""

    number: int
    first: int
    end: int
    weight: float
    """0: one sample that only keeps a rank without any of its own in step"""


class _Block(NamedTuple):
    """This rank's shards of some steps of one epoch, fetched and augmented at once: a small batch would pay for every
    call what it pays for its pixels."""

    ids: Tensor
    """int64 [n], sample ids of all shards, one after the other"""
    partners: Tensor | None
    """int64 [n], what they are mixed with, if they are"""
    epoch: int
    steps: list[list[_Cut]]


class _Fetched(NamedTuple):
    block: _Block
    own: Samples
    partners: Samples | None


class _Blocks(Dataset[_Fetched]):
    """Fetches whole blocks by their ids; DataLoader calls __getitems__ once for each."""

    def __init__(self, part: Images) -> None:
        self._labels = part.labels
        self._pixels = part.images.permute(0, 2, 3, 1)  # as they lie in memory, where an image is one run of bytes

    def __len__(self) -> int:
        return len(self._labels)

    def __getitems__(self, block: _Block) -> _Fetched:
        partners = None if block.partners is None else self._samples(block.partners)
        return _Fetched(block, self._samples(block.ids), partners)

    def _samples(self, ids: Tensor) -> Samples:
        if self._labels.is_cuda:
            ids = ids.pin_memory()  # or the copy would wait for what the GPU has queued
        place = ids.to(self._labels.device, non_blocking=True)
        images = self._pixels.index_select(0, place).permute(0, 3, 1, 2)
        return Samples(images, self._labels.index_select(0, place), place)


class _RankBlocks(Sampler[_Block]):
    """The blocks of this rank, from one step to another."""

    def __init__(
        self, part: Images, batches: GlobalBatches, config: RunConfig, world: World, first_step: int, end_step: int
    ) -> None:
        self._batches, self._virtual_ranks = batches, config.train.virtual_ranks
        self._mixes = not {"mixup", "cutmix"}.isdisjoint(config.data.augment)
        self._rank, self._world_size = world.rank, world.size
        self._first_step, self._end_step = first_step, end_step
        samples_per_step = batches.global_batch_size / world.size
        self._block_steps = max(1, int(_BLOCK_BYTES / (part.images[0].numel() * samples_per_step)))
        self._run_steps = max(self._block_steps, int(_RUN_SAMPLES / samples_per_step))

    def __iter__(self) -> Iterator[_Block]:
        step = self._first_step
        while step < self._end_step:
            epoch = self._batches.epoch(step)
            end = min(step + self._run_steps, self._end_step, (epoch + 1) * self._batches.steps_per_epoch)
            yield from self._blocks(epoch, range(step, end))
            step = end

    def _blocks(self, epoch: int, steps: range) -> Iterator[_Block]:
        """The order is asked for all steps at once, which costs little more than one, then they are dealt to blocks."""
        cuts = [self._cuts(step) for step in steps]
        ids = self._ids(epoch, [self._batches.positions(*cut[:3]) for cut in cuts])
        partners: list[Tensor] | None = None
        if self._mixes:
            partners = self._ids(epoch, [self._batches.partner_positions(*cut[:3]) for cut in cuts])
        for start in range(0, len(steps), self._block_steps):
            at = slice(start, start + self._block_steps)
            shifted, length = [], 0
            for _, first, end, places in cuts[at]:
                shifted.append([place._replace(first=place.first + length, end=place.end + length) for place in places])
                length += end - first
            yield _Block(torch.cat(ids[at]), None if partners is None else torch.cat(partners[at]), epoch, shifted)

    def _ids(self, epoch: int, positions: list[Tensor]) -> list[Tensor]:
        return list(torch.split(self._batches.order(epoch, torch.cat(positions)), [len(each) for each in positions]))

    def _cuts(self, step: int) -> tuple[int, int, int, list[_Cut]]:
        """A step, from where to where this rank's samples are in its batch, and how these are cut."""
        places = self._places(self._batches.size(step))
        first, end = (places[0][1], places[-1][2]) if places else (0, 0)
        if places and first == end:
            return step, 0, 1, [_Cut(places[0][0], 0, 1, 0.0)]
        return step, first, end, [_Cut(number, start - first, stop - first, 1.0) for number, start, stop in places]

    def _places(self, num_samples: int) -> list[tuple[int, int, int]]:
        """Numbers of this rank's shards of a global batch, and where each begins and ends there."""
        # Plainly each rank has one shard, and an empty one too: DDP waits for all. Virtual ranks have none empty.
        number = min(num_samples, self._virtual_ranks) if self._virtual_ranks else self._world_size
        places = shards.cut(num_samples, number)
        first, end = shards.cut(number, self._world_size)[self._rank]
        return [(shard, *places[shard]) for shard in range(first, end)]


def train_loader(
    part: Images,
    batches: GlobalBatches,
    augment: Augment,
    config: RunConfig,
    world: World,
    first_step: int,
    end_step: int,
) -> Iterator[list[Shard]]:
    """This rank's shards for each step from first_step up to end_step: augmented uint8 images on the device.

    One loader for the whole run: workers start once, and to resume is to begin at another step.
    """
    loader = DataLoader(
        _Blocks(part),
        batch_sampler=_RankBlocks(part, batches, config, world, first_step, end_step),  # type: ignore[arg-type]
        collate_fn=_whole,  # type: ignore[arg-type]
        num_workers=config.data.workers,
        worker_init_fn=stop.ignore_in_worker,
        pin_memory=world.device.type == "cuda" and part.images.device.type == "cpu",
    )
    # One process as far as accelerate can see: the shards are cut already, and would be cut again.
    prepared = prepare_data_loader(
        loader, world.device, num_processes=1, process_index=0, put_on_device=True, non_blocking=True
    )
    for block, own, partners in prepared:
        own = _augmented(own, augment, block.epoch)
        partners = None if partners is None else _augmented(partners, augment, block.epoch)
        for cuts in block.steps:
            yield [_shard(cut, own, partners) for cut in cuts]


def _augmented(samples: Samples, augment: Augment, epoch: int) -> Samples:
    return samples._replace(images=augment.pixels(samples.images, samples.ids, epoch))


def _shard(cut: _Cut, own: Samples, partners: Samples | None) -> Shard:
    at = slice(cut.first, cut.end)
    mine = Samples(*(tensor[at] for tensor in own))
    if not cut.weight:
        mine.images.zero_()
    return Shard(
        mine, None if partners is None else Samples(*(tensor[at] for tensor in partners)), cut.number, cut.weight
    )


def _whole(block: _Fetched) -> _Fetched:
    """DataLoader's collate step, with nothing left to do."""
    return block


def chunks(part: Images, batch_size: int, world: World) -> Iterator[tuple[int, Tensor, Tensor]]:
    """This rank's chunks of a split for evaluation: number, images uint8 [B, C, H, W], labels int64 [B]."""
    for chunk in range(world.rank, num_chunks(part, batch_size), world.size):
        at = slice(chunk * batch_size, (chunk + 1) * batch_size)
        yield chunk, part.images[at].to(world.device), part.labels[at].to(world.device)


def num_chunks(part: Images, batch_size: int) -> int:
    """Chunks of a split: the same for any number of ranks."""
    return -(-len(part) // batch_size)
