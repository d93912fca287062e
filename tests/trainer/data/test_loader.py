"""Shards of all ranks form the global batch, for any world size. Workers, chunks and resuming change nothing."""

import collections
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from trainer.config.schema import DataSettings, RunConfig
from trainer.data import loader
from trainer.data.augment import Augment
from trainer.data.loader import Shard, train_loader
from trainer.data.normalization import Normalization
from trainer.data.sampler import BatchSampler
from trainer.data.splits import TensorSplit
from trainer.distributed.sharding import ShardLayout
from trainer.errors import DataError

LABELS = torch.arange(103) % 5
IMAGES = torch.arange(103, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 8, 8).contiguous()
SPLIT = TensorSplit(IMAGES, LABELS)  # all pixels of an image equal its sample id
BATCHES = BatchSampler(len(SPLIT), 16, seed=2)  # 7 steps per epoch; the last batch has 7 samples
NUM_STEPS = 14


@dataclass
class FakeWorld:
    """Stands in for World: this test needs no processes."""

    rank: int
    size: int
    device: torch.device = torch.device("cpu")


def load_shards(
    rank: int,
    world_size: int,
    first_step: int = 0,
    end_step: int = NUM_STEPS,
    workers: int = 0,
    virtual_ranks: int | None = None,
    augmentations: tuple[str, ...] = (),
) -> list[list[Shard]]:
    """The shards of a rank for each step: without virtual_ranks as for DDP."""
    config = RunConfig(data=DataSettings(workers=workers, augment=list(augmentations)))
    shard_layout = ShardLayout(virtual_ranks or world_size, allows_empty_shards=virtual_ranks is None)
    normalization = Normalization((0.0,) * 3, (1.0,) * 3)
    augment = Augment(config.data, normalization, 0, torch.device("cpu"), SPLIT.images.shape[1:])
    world: Any = FakeWorld(rank, world_size)
    return list(train_loader(SPLIT, BATCHES, augment, shard_layout, config, world, first_step, end_step))


def assert_same_shards(first: list[list[Shard]], second: list[list[Shard]]) -> None:
    for first_shards, second_shards in zip(first, second, strict=True):
        for shard, same in zip(first_shards, second_shards, strict=True):
            assert (shard.position, shard.weight) == (same.position, same.weight)
            assert all(map(torch.equal, shard.samples, same.samples))


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 16])
def test_shards_of_all_ranks_are_the_global_batch(world_size: int) -> None:
    ranks = [load_shards(rank, world_size) for rank in range(world_size)]
    for step in range(NUM_STEPS):
        shards = [shard for rank in ranks for shard in rank[step]]
        counted = [shard for shard in shards if shard.weight]
        assert [shard.position for shard in counted] == list(range(len(counted)))
        assert torch.equal(torch.cat([shard.samples.ids for shard in counted]), BATCHES.sample_ids(step))
        sizes = [len(shard.samples.ids) if shard.weight else 0 for shard in shards]
        assert max(sizes) - min(sizes) <= 1
        for shard in shards:  # a rank without samples gets a black placeholder of weight 0
            assert len(shard.samples.ids) >= 1
            assert torch.equal(shard.samples.images[:, 0, 0, 0].long(), shard.samples.ids * int(shard.weight))
            assert torch.equal(shard.samples.labels, LABELS[shard.samples.ids])


def test_ddp_ranks_have_the_shards_of_as_many_virtual_ranks() -> None:
    """Dropout is seeded by a shard's position, so that positions must be the same too."""
    for rank in range(9):
        ddp_shards = [[shard for shard in step if shard.weight] for step in load_shards(rank, 9)]
        assert_same_shards(ddp_shards, load_shards(rank, 9, virtual_ranks=9))


def test_ranks_beyond_the_batch_size_have_no_virtual_shard() -> None:
    """Also when the short batch is the only one of its chunk."""
    short_step = 6
    ranks = [load_shards(rank, 9, short_step, short_step + 1, virtual_ranks=9) for rank in range(9)]
    assert sorted(len(steps[0]) for steps in ranks) == [0, 0, 1, 1, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("virtual_ranks", [1, 5, 9])
def test_virtual_shards_are_the_same_for_any_world_size(virtual_ranks: int) -> None:
    one_rank = load_shards(0, 1, virtual_ranks=virtual_ranks)
    assert [len(shards) for shards in one_rank[:7]] == [virtual_ranks] * 6 + [min(7, virtual_ranks)]
    assert all(shard.weight == 1.0 for shards in one_rank for shard in shards)
    for world_size in range(2, virtual_ranks + 1):
        ranks = [load_shards(rank, world_size, virtual_ranks=virtual_ranks) for rank in range(world_size)]
        for step in range(NUM_STEPS):
            counts = [len(rank[step]) for rank in ranks]
            assert max(counts) - min(counts) <= 1
        assert_same_shards([[shard for rank in ranks for shard in rank[step]] for step in range(NUM_STEPS)], one_rank)


def test_two_ranks_see_each_sample_once_per_epoch() -> None:
    shards = [shard for rank in range(2) for step in load_shards(rank, 2, end_step=7) for shard in step]
    ids = torch.cat([shard.samples.ids for shard in shards])
    assert ids.sort().values.tolist() == list(range(103))


def test_later_first_step_gives_the_same_shards() -> None:
    assert_same_shards(load_shards(1, 2)[9:], load_shards(1, 2, first_step=9))


def test_worker_processes_give_the_same_shards() -> None:
    assert_same_shards(load_shards(0, 2), load_shards(0, 2, workers=2))


@pytest.mark.parametrize("steps_per_chunk", [1, 3])
def test_smaller_chunks_give_the_same_shards(monkeypatch: pytest.MonkeyPatch, steps_per_chunk: int) -> None:
    names = ("flip", "crop")
    expected = load_shards(0, 2, virtual_ranks=4, augmentations=names)
    monkeypatch.setattr(loader, "_CHUNK_BYTES", steps_per_chunk * 8 * IMAGES[0].numel())  # 8 samples per rank and step
    monkeypatch.setattr(loader, "_SAMPLES_PER_ORDER_CALL", 4 * 8)
    assert_same_shards(load_shards(0, 2, virtual_ranks=4, augmentations=names), expected)


@pytest.mark.parametrize("world_size", [1, 3])
def test_partners_of_all_ranks_are_those_of_the_sampler(world_size: int) -> None:
    ranks = [load_shards(rank, world_size, augmentations=("mixup",)) for rank in range(world_size)]
    for step in range(NUM_STEPS):
        partners = [shard.partners for rank in ranks for shard in rank[step]]
        assert all(samples is not None for samples in partners)
        ids = torch.cat([samples.ids for samples in partners if samples is not None])
        assert torch.equal(ids, BATCHES.partner_ids(step))
    assert all(shard.partners is None for shards in load_shards(0, 1) for shard in shards)


ALL_IMAGES = 4 * 103 * 192  # bytes of all images, in two chunks for each of two workers


@pytest.mark.parametrize(
    ("workers", "partners", "free", "is_enough"),
    [(0, True, 0, True), (2, False, ALL_IMAGES, True), (2, False, ALL_IMAGES - 1, False), (2, True, ALL_IMAGES, False)],
)
def test_shared_memory_must_hold_the_chunks_of_all_workers(
    workers: int, partners: bool, free: int, is_enough: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two chunks for each worker; a chunk has at most the whole training set."""
    monkeypatch.setattr(loader, "_SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(loader.shutil, "disk_usage", lambda _: collections.namedtuple("Usage", "free")(free))
    config, world = RunConfig(data=DataSettings(workers=workers)), FakeWorld(0, 1)
    if is_enough:
        loader.check_shared_memory(SPLIT, partners, config, world)  # type: ignore[arg-type]
        return
    with pytest.raises(DataError, match=r"data\.workers=2 needs 0\.\d MB of shared memory.*Set data\.workers=0"):
        loader.check_shared_memory(SPLIT, partners, config, world)  # type: ignore[arg-type]


def test_only_the_error_of_a_dead_worker_is_taken_for_it() -> None:
    error = RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that")
    assert "DataLoader worker (pid 7) is killed by signal: Bus error" in loader.lost_worker(error)
    for other in (RuntimeError("shape mismatch"), ValueError(str(error)), RuntimeError(f"in step 3: {error}")):
        assert loader.lost_worker(other) == ""
