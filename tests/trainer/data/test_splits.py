"""Splits: validation samples are held out by class and seed, and evaluation chunks cover a split once."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from support.images import write_image

from trainer.config.schema import DataSettings, TrainSettings
from trainer.data.splits import TensorSplit, evaluation_chunks, hold_out_validation, load_splits
from trainer.distributed.world import World
from trainer.errors import DataError

LABELS = torch.tensor([0] * 100 + [1] * 50 + [2] * 3)


@pytest.fixture
def world() -> World:
    return World(TrainSettings(device="cpu"))


def test_hold_out_takes_the_same_fraction_of_each_class() -> None:
    is_held_out = hold_out_validation(LABELS, 0.1, seed=0)
    assert LABELS[is_held_out].bincount().tolist() == [10, 5, 1]


def test_hold_out_depends_on_seed_alone() -> None:
    is_held_out = hold_out_validation(LABELS, 0.2, seed=1)
    assert torch.equal(hold_out_validation(LABELS, 0.2, seed=1), is_held_out)
    assert not torch.equal(hold_out_validation(LABELS, 0.2, seed=2), is_held_out)


def test_validation_images_are_not_in_the_training_split(world: World) -> None:
    splits = load_splits(DataSettings(name="digits", validation_fraction=0.1), seed=0, world=world)
    assert splits.validation is not None
    train, validation = (
        {image.numpy().tobytes() for image in split.images} for split in (splits.train, splits.validation)
    )
    assert not train & validation and len(splits.train) + len(splits.validation) == 1433


def test_hold_out_of_a_class_with_one_image_is_refused(image_folder: Path, world: World) -> None:
    write_image(image_folder / "train" / "bird" / "0.png", seed=1)
    write_image(image_folder / "test" / "bird" / "0.png", seed=2)
    settings = DataSettings(name="image_folder", root=str(image_folder), validation_fraction=0.2, global_batch_size=2)
    with pytest.raises(DataError, match="class bird has too few training images"):
        load_splits(settings, seed=0, world=world)


def test_global_batch_larger_than_training_split_is_refused(world: World) -> None:
    load_splits(DataSettings(name="digits", global_batch_size=1433), seed=0, world=world)
    with pytest.raises(DataError, match="larger than the training set of 1433"):
        load_splits(DataSettings(name="digits", global_batch_size=1434), seed=0, world=world)


@dataclass
class FakeWorld:
    """Stands in for World: this test needs no processes."""

    rank: int
    size: int
    device: torch.device = torch.device("cpu")


@pytest.mark.parametrize("world_size", [1, 2, 3, 20])
def test_evaluation_chunks_of_all_ranks_cover_a_split_once(world_size: int) -> None:
    split = TensorSplit(torch.arange(103, dtype=torch.uint8).view(-1, 1, 1, 1), torch.arange(103))
    worlds: list[Any] = [FakeWorld(rank, world_size) for rank in range(world_size)]
    chunks = sorted(
        (chunk for world in worlds for chunk in evaluation_chunks(split, 10, world)), key=lambda chunk: chunk[0]
    )
    numbers, images, labels = zip(*chunks, strict=True)
    assert numbers == tuple(range(11))
    assert torch.equal(torch.cat(images), split.images) and torch.equal(torch.cat(labels), split.labels)
