"""Cuts each global batch into shards and yields this rank's shards of every step.

sampler.py gives the global batches, which do not depend on ranks. A batch has one shard per rank, or
train.virtual_ranks shards. Accelerate's own way to split a batch (`split_batches`) does not serve: it refuses batch
sizes that the world size does not divide.

A chunk is this rank's shards of several consecutive steps of one epoch. The loader fetches and augments a chunk at
once, because a small batch would spend more time on the overhead of each call than on its pixels.
"""

import itertools
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
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
from trainer.distributed.environment import read_environment
from trainer.distributed.sharding import ShardLayout
from trainer.distributed.world import World
from trainer.errors import DataError
from trainer.run import stop
from trainer.text.escape import one_line

_SAMPLES_PER_ORDER_CALL = 1 << 14  # of this rank: computing sample ids has a fixed cost per call
_CHUNK_BYTES = 3 << 20  # uint8 images of a chunk: a thousand of 32 pixels, which fit into a CPU's caches
# On a GPU every call costs the same, so chunks are larger. The limit lets the crop count in 32 bits: it indexes a view
# with about 80 elements per byte of images (32 pixels, flipped, data.crop_padding=2).
_GPU_CHUNK_BYTES = 16 << 20

_SHARED_MEMORY = Path("/dev/shm")
_CHUNKS_PER_WORKER = 2  # DataLoader's prefetch_factor


class Samples(NamedTuple):
    """Images of some samples, with their labels and ids."""

    images: Tensor
    """uint8 [B, C, H, W], augmented."""
    labels: Tensor
    """int64 [B]."""
    ids: Tensor
    """int64 [B], indices into the training set."""


class Shard(NamedTuple):
    """The part of a global batch that goes through the network in one forward pass."""

    samples: Samples
    partners: Samples | None
    """The samples that mixup and cutmix mix `samples` with, in the same order. They are from the same global batch."""
    position: int
    """Position among the shards of the global batch, from 0."""
    weight: float
    """1, or 0 for a placeholder: under DDP a rank without samples gets one, since it must run forward and backward."""


class _ShardSpec(NamedTuple):
    """Describes one shard of a chunk. A chunk stores its shards one after the other."""

    position: int
    """As in Shard."""
    num_samples: int
    weight: float
    """As in Shard."""


@dataclass(frozen=True, slots=True)
class _ChunkSpec:
    """Describes a chunk. Not a tuple: DataLoader and Accelerate would search every number in it for tensors."""

    epoch: int
    steps: list[list[_ShardSpec]]
    """The shards of each step."""


class _ChunkRequest(NamedTuple):
    """A chunk to fetch."""

    spec: _ChunkSpec
    ids: Tensor
    """int64 [n], the sample ids of all shards."""
    partner_ids: Tensor | None
    """int64 [n], None without mixup and cutmix."""


class _Chunk(NamedTuple):
    """A chunk that was fetched but not yet augmented."""

    spec: _ChunkSpec
    samples: Samples
    partners: Samples | None


class _ChunkDataset(Dataset[_Chunk]):
    """Fetches a chunk by its sample ids. DataLoader calls __getitems__ once per chunk."""

    def __init__(self, split: TensorSplit) -> None:
        self._labels = split.labels
        self._pixels = split.images.permute(0, 2, 3, 1)  # the order in memory: an image is one run of bytes

    def __len__(self) -> int:
        return len(self._labels)

    def __getitems__(self, request: _ChunkRequest) -> _Chunk:
        partners = None if request.partner_ids is None else self._fetch(request.partner_ids)
        return _Chunk(request.spec, self._fetch(request.ids), partners)

    def _fetch(self, ids: Tensor) -> Samples:
        if self._labels.is_cuda:
            ids = ids.pin_memory()  # from other memory the copy would wait for the work queued on the GPU
        ids = ids.to(self._labels.device, non_blocking=True)
        images = self._pixels.index_select(0, ids).permute(0, 3, 1, 2)
        return Samples(images, self._labels.index_select(0, ids), ids)


class _RankSlice(NamedTuple):
    """This rank's samples [first, end) of a step's global batch, and how they are cut into shards."""

    step: int
    first: int
    end: int
    shards: list[_ShardSpec]


class _RankChunkSampler(Sampler[_ChunkRequest]):
    """Yields the chunks of this rank for steps [first_step, end_step)."""

    def __init__(
        self,
        split: TensorSplit,
        batches: BatchSampler,
        uses_partners: bool,
        shard_layout: ShardLayout,
        world: World,
        first_step: int,
        end_step: int,
    ) -> None:
        self._batches, self._shard_layout = batches, shard_layout
        self._uses_partners = uses_partners
        self._rank, self._world_size = world.rank, world.size
        self._first_step, self._end_step = first_step, end_step
        samples_per_step = batches.global_batch_size / world.size
        chunk_bytes = _GPU_CHUNK_BYTES if split.images.is_cuda else _CHUNK_BYTES
        self._steps_per_chunk = max(1, int(chunk_bytes / (split.images[0].numel() * samples_per_step)))
        self._steps_per_order_call = max(self._steps_per_chunk, int(_SAMPLES_PER_ORDER_CALL / samples_per_step))

    def __iter__(self) -> Iterator[_ChunkRequest]:
        step = self._first_step
        while step < self._end_step:
            epoch = self._batches.epoch_of(step)
            end_of_epoch = (epoch + 1) * self._batches.steps_per_epoch
            end = min(step + self._steps_per_order_call, self._end_step, end_of_epoch)
            yield from self._chunks(epoch, range(step, end))
            step = end

    def _chunks(self, epoch: int, steps: range) -> Iterator[_ChunkRequest]:
        """Computes the sample ids of all steps in one call, which costs little more than one step, and splits them."""
        slices = [self._rank_slice(step) for step in steps]
        positions = [self._batches.positions(part.step, part.first, part.end) for part in slices]
        ids = self._ids_at(epoch, positions)
        partner_ids: list[Tensor] | None = None
        if self._uses_partners:
            positions = [self._batches.partner_positions(part.step, part.first, part.end) for part in slices]
            partner_ids = self._ids_at(epoch, positions)
        for start in range(0, len(steps), self._steps_per_chunk):
            chunk = slice(start, start + self._steps_per_chunk)
            spec = _ChunkSpec(epoch, [part.shards for part in slices[chunk]])
            chunk_partner_ids = None if partner_ids is None else torch.cat(partner_ids[chunk])
            yield _ChunkRequest(spec, torch.cat(ids[chunk]), chunk_partner_ids)

    def _ids_at(self, epoch: int, positions: list[Tensor]) -> list[Tensor]:
        """Returns the sample ids at the positions of each step."""
        ids = self._batches.ids_at(epoch, torch.cat(positions))
        return list(torch.split(ids, [len(step_positions) for step_positions in positions]))

    def _rank_slice(self, step: int) -> _RankSlice:
        bounds = self._shard_bounds(self._batches.batch_size(step))
        first, end = (bounds[0][1], bounds[-1][2]) if bounds else (0, 0)
        if bounds and first == end:  # no samples for this rank: the batch's first sample is its placeholder
            return _RankSlice(step, 0, 1, [_ShardSpec(bounds[0][0], 1, 0.0)])
        shards = [_ShardSpec(position, shard_end - start, 1.0) for position, start, shard_end in bounds]
        return _RankSlice(step, first, end, shards)

    def _shard_bounds(self, batch_size: int) -> list[tuple[int, int, int]]:
        """Returns position, start and end in the global batch of each shard of this rank."""
        num_shards = self._shard_layout.num_shards(batch_size)
        bounds = sharding.split_evenly(batch_size, num_shards)
        first, end = sharding.split_evenly(num_shards, self._world_size)[self._rank]
        # Positions do not count empty shards. A batch with empty shards has one sample in each other shard, so that the
        # start of a shard equals the number of non-empty shards before it.
        return [(min(shard, bounds[shard][0]), *bounds[shard]) for shard in range(first, end)]


def train_loader(
    split: TensorSplit,
    batches: BatchSampler,
    augment: Augment,
    shard_layout: ShardLayout,
    config: RunConfig,
    world: World,
    first_step: int,
    end_step: int,
) -> Iterator[list[Shard]]:
    """Yields this rank's shards of each step in [first_step, end_step), augmented, on the device.

    One loader serves the whole session: worker processes start once, and a resumed run passes a later first_step.
    """
    loader = DataLoader(
        _ChunkDataset(split),
        batch_sampler=_RankChunkSampler(  # type: ignore[arg-type]
            split, batches, augment.uses_partners, shard_layout, world, first_step, end_step
        ),
        collate_fn=_return_unchanged,  # type: ignore[arg-type]
        num_workers=config.data.workers,
        worker_init_fn=stop.ignore_signals_in_worker,
        pin_memory=world.device.type == "cuda" and split.images.device.type == "cpu",
    )
    # Accelerate sees one process, because the chunks are this rank's own already and must not be split again.
    prepared = prepare_data_loader(
        loader, world.device, num_processes=1, process_index=0, put_on_device=True, non_blocking=True
    )
    for spec, samples, partners in prepared:
        samples = _augment_samples(samples, augment, spec.epoch)
        partners = None if partners is None else _augment_samples(partners, augment, spec.epoch)
        chunk_shards = _split_chunk(_Chunk(spec, samples, partners))
        for step_specs in spec.steps:
            yield list(itertools.islice(chunk_shards, len(step_specs)))


def _chunk_bytes(split: TensorSplit, config: RunConfig, world: World) -> int:
    """Returns the most bytes of images in a chunk: at least those of one step."""
    image_bytes = split.images[0].numel()
    step_bytes = image_bytes * -(-config.data.global_batch_size // world.size)
    return int(min(max(_CHUNK_BYTES, step_bytes), image_bytes * len(split)))


def check_shared_memory(split: TensorSplit, uses_partners: bool, config: RunConfig, world: World) -> None:
    """Raises DataError if /dev/shm cannot hold the chunks that the data workers prepare. They would wait for ever."""
    if not config.data.workers or not _SHARED_MEMORY.is_dir():
        return
    chunk_bytes = _chunk_bytes(split, config, world)
    num_chunks = read_environment().local_world_size * config.data.workers * _CHUNKS_PER_WORKER
    needed = num_chunks * chunk_bytes * (2 if uses_partners else 1)
    free = shutil.disk_usage(_SHARED_MEMORY).free
    if free < needed:
        raise DataError(
            f"data.workers={config.data.workers} needs {needed / 1e6:.1f} MB of shared memory, but {_SHARED_MEMORY} "
            f"has {free / 1e6:.1f} MB free. Set data.workers=0, or enlarge it (a container: --shm-size=1g)"
        )


def lost_worker(error: BaseException) -> str:
    """Returns which data worker has died if that caused the error; empty for any other error."""
    text = one_line(error)
    if not isinstance(error, RuntimeError) or not re.match(r"DataLoader worker \(pid", text):
        return ""
    return f"a data worker is gone ({text}); if that happens again, lower data.workers"


def _augment_samples(samples: Samples, augment: Augment, epoch: int) -> Samples:
    return samples._replace(images=augment.transform(samples.images, samples.ids, epoch))


def _split_chunk(chunk: _Chunk) -> Iterator[Shard]:
    """Yields the shards of all steps of a chunk."""
    specs = [spec for step_specs in chunk.spec.steps for spec in step_specs]
    sizes = [spec.num_samples for spec in specs]
    shard_samples = _split_samples(chunk.samples, sizes)
    shard_partners: Iterator[Samples | None] = itertools.repeat(None, len(specs))
    if chunk.partners is not None:
        shard_partners = _split_samples(chunk.partners, sizes)
    for spec, samples, partners in zip(specs, shard_samples, shard_partners, strict=True):
        if not spec.weight:
            samples.images.zero_()
        yield Shard(samples, partners, spec.position, spec.weight)


def _split_samples(samples: Samples, sizes: list[int]) -> Iterator[Samples]:
    return map(Samples._make, zip(*(torch.split(tensor, sizes) for tensor in samples), strict=True))


def _return_unchanged(chunk: _Chunk) -> _Chunk:
    """Replaces DataLoader's collate step: a chunk is a batch already."""
    return chunk
