"""Shards: together they are the global batch, for any number of ranks; workers and resuming change nothing."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from support.images import paint

from trainer.config.schema import DataSettings, RunConfig, TrainSettings
from trainer.data import splits as data
from trainer.data.augment import Augment, Normalization
from trainer.data.loader import Shard, train_loader
from trainer.data.sampler import BatchSampler
from trainer.data.splits import DataSplits, TensorSplit, evaluation_chunks, hold_out_validation, load_splits
from trainer.distributed.sharding import ShardLayout
from trainer.distributed.world import World
from trainer.errors import DataError

LABELS = torch.arange(103) % 5
PART = TensorSplit(torch.arange(103, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 8, 8).contiguous(), LABELS)


@dataclass
class Place:
    """A rank's place, without its process: the real ones are in test_ranks.py."""

    rank: int
    size: int
    device: torch.device = torch.device("cpu")


def shards(
    rank: int, size: int, first_step: int = 0, end_step: int = 14, workers: int = 0, virtual_ranks: int | None = None
) -> list[list[Shard]]:
    batches = BatchSampler(len(PART), 16, seed=2)
    config = RunConfig(data=DataSettings(workers=workers))
    shard_layout = ShardLayout(
        virtual_ranks or size, may_be_empty=virtual_ranks is None
    )  # as for DDP, if they are not virtual
    augment = Augment(config.data, Normalization((0.0,) * 3, (1.0,) * 3), 0, torch.device("cpu"), PART.images.shape[1:])
    place: Any = Place(rank, size)
    return list(train_loader(PART, batches, augment, shard_layout, config, place, first_step, end_step))


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16])
def test_the_slices_of_all_ranks_are_the_global_batch(size: int) -> None:
    batches = BatchSampler(len(PART), 16, seed=2)
    ranks = [shards(rank, size) for rank in range(size)]
    for step in range(14):
        parts = [part for rank in ranks for part in rank[step]]
        counted = [part for part in parts if part.weight]
        assert [part.number for part in counted] == list(range(len(counted)))
        assert torch.equal(torch.cat([part.own.ids for part in counted]), batches.ids(step))
        lengths = [len(part.own.ids) if part.weight else 0 for part in parts]
        assert max(lengths) - min(lengths) <= 1
        for part in parts:  # an idle rank gets a sample too, of weight 0, to keep step with the others
            assert len(part.own.ids) >= 1
            assert torch.equal(part.own.images[:, 0, 0, 0].long(), part.own.ids * int(part.weight))
            assert torch.equal(part.own.labels, LABELS[part.own.ids])


def test_plain_ranks_have_the_shards_of_as_many_virtual_ones() -> None:
    """Whether they go by DDP or not: dropout is drawn by a shard's number. The last batch has 7 samples."""
    for rank in range(9):
        by_ddp = [[part for part in step if part.weight] for step in shards(rank, 9)]
        for plain, virtual in zip(by_ddp, shards(rank, 9, virtual_ranks=9), strict=True):
            assert [part.number for part in plain] == [part.number for part in virtual]
            assert [part.own.ids.tolist() for part in plain] == [part.own.ids.tolist() for part in virtual]
    last = [shards(rank, 9, first_step=6, end_step=7, virtual_ranks=9) for rank in range(9)]
    assert sorted(len(steps[0]) for steps in last) == [0, 0, 1, 1, 1, 1, 1, 1, 1]  # also where that is all of a block


@pytest.mark.parametrize("virtual_ranks", [1, 5, 9])  # the last batch of an epoch has 7 samples
def test_virtual_ranks_are_the_same_shards_on_any_number_of_ranks(virtual_ranks: int) -> None:
    alone = shards(0, 1, virtual_ranks=virtual_ranks)
    assert [len(step) for step in alone[:7]] == [virtual_ranks] * 6 + [min(7, virtual_ranks)]
    for size in range(2, virtual_ranks + 1):
        ranks = [shards(rank, size, virtual_ranks=virtual_ranks) for rank in range(size)]
        for step, wanted in enumerate(alone):
            counts = [len(rank[step]) for rank in ranks]
            assert max(counts) - min(counts) <= 1
            found = [part for rank in ranks for part in rank[step]]
            for part, same in zip(found, wanted, strict=True):
                assert part.number == same.number and torch.equal(part.own.ids, same.own.ids) and part.weight == 1.0


def test_an_epoch_is_seen_once_not_twice_sharded() -> None:
    seen = torch.cat([part.own.ids for rank in range(2) for step in shards(rank, 2, end_step=7) for part in step])
    assert seen.sort().values.tolist() == list(range(103))


def test_beginning_later_gives_the_same_batches() -> None:
    for (early,), (late,) in zip(shards(1, 2)[9:], shards(1, 2, first_step=9), strict=True):
        assert torch.equal(early.own.ids, late.own.ids) and torch.equal(early.own.images, late.own.images)


def test_workers_change_nothing() -> None:
    for (alone,), (helped,) in zip(shards(0, 2), shards(0, 2, workers=2), strict=True):
        assert torch.equal(alone.own.images, helped.own.images) and torch.equal(alone.own.ids, helped.own.ids)
        assert alone.weight == helped.weight


def test_chunks_cover_a_split_once() -> None:
    for size in (1, 2, 3, 20):
        places = [Place(rank, size) for rank in range(size)]
        found = sorted(
            ((chunk, images) for place in places for chunk, images, _ in evaluation_chunks(PART, 10, place)),  # type: ignore[arg-type]
            key=lambda item: item[0],
        )
        assert [chunk for chunk, _ in found] == list(range(11))
        assert torch.equal(torch.cat([images for _, images in found]), PART.images)


class TestHoldOut:
    LABELS = torch.tensor([0] * 100 + [1] * 50 + [2] * 3)

    def test_it_is_class_balanced(self) -> None:
        held_out = hold_out_validation(self.LABELS, 0.1, seed=0)
        assert self.LABELS[held_out].bincount().tolist() == [10, 5, 1]

    def test_it_is_chosen_by_seed(self) -> None:
        assert torch.equal(hold_out_validation(self.LABELS, 0.2, seed=1), hold_out_validation(self.LABELS, 0.2, seed=1))
        assert not torch.equal(
            hold_out_validation(self.LABELS, 0.2, seed=1), hold_out_validation(self.LABELS, 0.2, seed=2)
        )

    def test_what_is_held_out_is_not_trained_on(self) -> None:
        settings = DataSettings(name="digits", validation_fraction=0.1)
        splits = load_splits(settings, seed=0, world=World(TrainSettings(device="cpu")))
        assert splits.validation is not None
        train, held_out = (
            {image.numpy().tobytes() for image in part.images} for part in (splits.train, splits.validation)
        )
        assert not train & held_out and len(splits.train) + len(splits.validation) == 1433

    def test_a_class_of_one_image_is_told(self, image_folder: Path) -> None:
        paint(image_folder / "train" / "bird" / "0.png", seed=1)
        paint(image_folder / "test" / "bird" / "0.png", seed=2)
        settings = DataSettings(
            name="image_folder", root=str(image_folder), validation_fraction=0.2, global_batch_size=2
        )
        with pytest.raises(DataError, match="class bird has too few training images"):
            load_splits(settings, seed=0, world=World(TrainSettings(device="cpu")))


def test_a_batch_that_does_not_fit_is_refused() -> None:
    splits = DataSplits(PART, None, PART, ("a",) * 5)
    with pytest.raises(DataError, match="larger than the training set of 103"):
        data._check(DataSettings(global_batch_size=104), splits)
