"""A split and the order in, this rank's shards of each step out: augmented uint8 images on the device.

The order knows nothing of ranks (sampler.py). Each global batch is cut here into one shard a rank, or into
train.virtual_ranks of them; accelerate's own dealing (split_batches) refuses batch sizes that the number of ranks does
not divide. Some steps are fetched and augmented at once.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from accelerate.data_loader import prepare_data_loader
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from trainer.config.schema import RunConfig
from trainer.data.augment import Augment
from trainer.data.sampler import BatchSampler
from trainer.data.splits import TensorSplit
from trainer.distributed import sharding
from trainer.distributed.sharding import ShardLayout
from trainer.distributed.world import World
from trainer.run import stop


class Samples(NamedTuple):
    images: Tensor
    """uint8 [B, C, H, W], augmented"""
    labels: Tensor
    """int64 [B]"""
    ids: Tensor
    """int64 [B], their places in the training set"""


class Shard(NamedTuple):
    """A part of a global batch that goes through the network at once."""

    own: Samples
    partners: Samples | None
    """what mixup and cutmix mix them with, one by one; from anywhere in the global batch"""
    number: int
    """its place among the shards of the global batch"""
    weight: float
    """1, or 0 for a sample that only keeps a rank without any of its own in step with the others"""


_RUN_SAMPLES = 1 << 14  # of a rank whose ids are found at once: a hash has a fixed cost
_BLOCK_BYTES = 3 << 20  # of uint8 images fetched at once: a thousand of 32 pixels, which fit into a CPU's caches
_GPU_BLOCK_BYTES = 16 << 20  # where every call costs the same; cropping counts 80 places a byte, in 32 bits


class _ShardSpec(NamedTuple):
    """A shard: its number among those of the global batch. In a block they lie one after the other."""

    number: int
    samples: int
    weight: float
    """0: one sample that only keeps a rank without any of its own in step"""


@dataclass(frozen=True, slots=True)
class _ChunkSpec:
    """Of a block. No tuple: DataLoader and Accelerate would look for tensors in every number of it."""

    epoch: int
    steps: list[list[_ShardSpec]]


class _ChunkRequest(NamedTuple):
    """This rank's shards of some steps of one epoch, fetched and augmented at once: a small batch would pay for every
    call what it pays for its pixels."""

    plan: _ChunkSpec
    ids: Tensor
    """int64 [n], sample ids of all shards, one after the other"""
    partners: Tensor | None
    """int64 [n], what they are mixed with, if they are"""


class _Chunk(NamedTuple):
    plan: _ChunkSpec
    own: Samples
    partners: Samples | None


class _ChunkDataset(Dataset[_Chunk]):
    """Fetches whole blocks by their ids; DataLoader calls __getitems__ once for each."""

    def __init__(self, part: TensorSplit) -> None:
        self._labels = part.labels
        self._pixels = part.images.permute(0, 2, 3, 1)  # as they lie in memory, where an image is one run of bytes

    def __len__(self) -> int:
        return len(self._labels)

    def __getitems__(self, block: _ChunkRequest) -> _Chunk:
        partners = None if block.partners is None else self._samples(block.partners)
        return _Chunk(block.plan, self._samples(block.ids), partners)

    def _samples(self, ids: Tensor) -> Samples:
        if self._labels.is_cuda:
            ids = ids.pin_memory()  # or the copy would wait for what the GPU has queued
        place = ids.to(self._labels.device, non_blocking=True)
        images = self._pixels.index_select(0, place).permute(0, 3, 1, 2)
        return Samples(images, self._labels.index_select(0, place), place)


class _RankChunkSampler(Sampler[_ChunkRequest]):
    """The blocks of this rank, from one step to another."""

    def __init__(
        self,
        part: TensorSplit,
        batches: BatchSampler,
        mixes: bool,
        shard_layout: ShardLayout,
        world: World,
        first_step: int,
        end_step: int,
    ) -> None:
        self._batches, self._shard_layout = batches, shard_layout
        self._mixes = mixes
        self._rank, self._world_size = world.rank, world.size
        self._first_step, self._end_step = first_step, end_step
        samples_per_step = batches.global_batch_size / world.size
        block_bytes = _GPU_BLOCK_BYTES if part.images.is_cuda else _BLOCK_BYTES
        self._block_steps = max(1, int(block_bytes / (part.images[0].numel() * samples_per_step)))
        self._run_steps = max(self._block_steps, int(_RUN_SAMPLES / samples_per_step))

    def __iter__(self) -> Iterator[_ChunkRequest]:
        step = self._first_step
        while step < self._end_step:
            epoch = self._batches.epoch(step)
            end = min(step + self._run_steps, self._end_step, (epoch + 1) * self._batches.steps_per_epoch)
            yield from self._blocks(epoch, range(step, end))
            step = end

    def _blocks(self, epoch: int, steps: range) -> Iterator[_ChunkRequest]:
        """The order is asked for all steps at once, which costs little more than one, then they are dealt to blocks."""
        cuts = [self._cuts(step) for step in steps]
        ids = self._ids(epoch, [self._batches.positions(*cut[:3]) for cut in cuts])
        partners: list[Tensor] | None = None
        if self._mixes:
            partners = self._ids(epoch, [self._batches.partner_positions(*cut[:3]) for cut in cuts])
        for start in range(0, len(steps), self._block_steps):
            at = slice(start, start + self._block_steps)
            mixed = None if partners is None else torch.cat(partners[at])
            yield _ChunkRequest(_ChunkSpec(epoch, [places for *_, places in cuts[at]]), torch.cat(ids[at]), mixed)

    def _ids(self, epoch: int, positions: list[Tensor]) -> list[Tensor]:
        return list(torch.split(self._batches.order(epoch, torch.cat(positions)), [len(each) for each in positions]))

    def _cuts(self, step: int) -> tuple[int, int, int, list[_ShardSpec]]:
        """A step, from where to where this rank's samples are in its batch, and how these are cut."""
        places = self._places(self._batches.size(step))
        first, end = (places[0][1], places[-1][2]) if places else (0, 0)
        if places and first == end:
            return step, 0, 1, [_ShardSpec(places[0][0], 1, 0.0)]
        return step, first, end, [_ShardSpec(number, stop - start, 1.0) for number, start, stop in places]

    def _places(self, num_samples: int) -> list[tuple[int, int, int]]:
        """Numbers of this rank's shards of a global batch, and where each begins and ends there."""
        number = self._shard_layout.number(num_samples)
        places = sharding.split_evenly(num_samples, number)
        first, end = sharding.split_evenly(number, self._world_size)[self._rank]
        # Numbered without the empty ones, each of which is beside shards of one sample.
        return [(min(shard, places[shard][0]), *places[shard]) for shard in range(first, end)]


def train_loader(
    part: TensorSplit,
    batches: BatchSampler,
    augment: Augment,
    shard_layout: ShardLayout,
    config: RunConfig,
    world: World,
    first_step: int,
    end_step: int,
) -> Iterator[list[Shard]]:
    """This rank's shards for each step from first_step up to end_step: augmented uint8 images on the device.

    One loader for the whole run: workers start once, and to resume is to begin at another step.
    """
    loader = DataLoader(
        _ChunkDataset(part),
        batch_sampler=_RankChunkSampler(part, batches, augment.mixes, shard_layout, world, first_step, end_step),  # type: ignore[arg-type]
        collate_fn=_whole,  # type: ignore[arg-type]
        num_workers=config.data.workers,
        worker_init_fn=stop.ignore_signals_in_worker,
        pin_memory=world.device.type == "cuda" and part.images.device.type == "cpu",
    )
    # One process as far as accelerate can see: the shards are cut already, and would be cut again.
    prepared = prepare_data_loader(
        loader, world.device, num_processes=1, process_index=0, put_on_device=True, non_blocking=True
    )
    for plan, own, partners in prepared:
        own = _augmented(own, augment, plan.epoch)
        partners = None if partners is None else _augmented(partners, augment, plan.epoch)
        dealt = _shards(plan, own, partners)
        for cuts in plan.steps:
            yield list(itertools.islice(dealt, len(cuts)))


def _augmented(samples: Samples, augment: Augment, epoch: int) -> Samples:
    return samples._replace(images=augment.pixels(samples.images, samples.ids, epoch))


def _shards(plan: _ChunkSpec, own: Samples, partners: Samples | None) -> Iterator[Shard]:
    """Of all steps of a block."""
    cuts = [cut for places in plan.steps for cut in places]
    sizes = [cut.samples for cut in cuts]
    others = _split(partners, sizes) if partners is not None else itertools.repeat(None, len(cuts))
    for cut, mine, theirs in zip(cuts, _split(own, sizes), others, strict=True):
        if not cut.weight:
            mine.images.zero_()
        yield Shard(mine, theirs, cut.number, cut.weight)


def _split(samples: Samples, sizes: list[int]) -> Iterator[Samples]:
    return map(Samples._make, zip(*(torch.split(tensor, sizes) for tensor in samples), strict=True))


def _whole(block: _Chunk) -> _Chunk:
    """DataLoader's collate step, with nothing left to do."""
    return block
