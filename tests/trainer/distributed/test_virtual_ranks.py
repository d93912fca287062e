"""Virtual ranks: the same bits on 1, 2, 3 and 4 real ranks."""

import json
from pathlib import Path

import pytest
from support.processes import SMALL, Ranks
from support.runs import difference_between

from launch.verify.compare import read_rows

SETTINGS = [*SMALL, "run.root=runs", "train.threads_per_rank=1", "log.every_steps=4", "train.virtual_ranks=4"]
# Neither 4 shards nor 3 ranks divide 53. The last batch of an epoch has 2 samples: fewer shards than ranks.
CURVE = [
    *SETTINGS, "data.global_batch_size=53", "train.max_steps=30", "eval.batch_size=100", "checkpoint.every_steps=10",
    "data.augment=[flip,crop,cutout,mixup,cutmix]",
]  # fmt: skip


def test_batchnorm_and_dropout_have_the_same_bits_on_any_number_of_ranks(ranks: Ranks) -> None:
    for size in (1, 2, 3, 4):
        ranks.run(size, *CURVE, f"run.name=on-{size}")
    for size in (2, 3, 4):
        assert not difference_between("on-1", f"on-{size}")
    assert Path("runs/on-1/model.safetensors").read_bytes() == Path("runs/on-4/model.safetensors").read_bytes()
    losses = [row["loss"] for row in read_rows(Path("runs/on-1")) if row["split"] == "train"]
    assert len(losses) == 8 and len(set(losses)) == 8
    assert json.loads(Path("runs/on-3/summary.json").read_text())["world_size"] == 3


def test_dropout_in_a_module_of_its_own_class_has_the_same_bits_on_any_number_of_ranks(ranks: Ranks) -> None:
    settings = [*SETTINGS, "train.virtual_ranks=2", "train.max_steps=8"]
    for name, size in (("on-1", 1), ("on-1-again", 1), ("on-2", 2)):
        ranks.run(size, *settings, f"run.name={name}", fault="named_dropout")
    assert not difference_between("on-1", "on-1-again")
    assert not difference_between("on-1", "on-2")


@pytest.mark.parametrize("model", [pytest.param("resnet18", marks=pytest.mark.slow), "tudui"])
def test_real_networks_have_the_same_bits_on_any_number_of_ranks(ranks: Ranks, image_folder: Path, model: str) -> None:
    settings = [
        *SETTINGS, "data.name=image_folder", f"data.root={image_folder}", f"model.name={model}",
        "data.augment=[flip,crop]", "data.global_batch_size=9", "train.max_steps=3", "log.every_steps=1",
    ]  # fmt: skip
    for size in (1, 2, 3, 4):
        ranks.run(size, *settings, f"run.name=on-{size}", fault="")
    for size in (2, 3, 4):
        assert not difference_between("on-1", f"on-{size}")


SPEEDRUN = [
    "model.name=speedrun", "model.widths=[8,16]", "model.depth=3", "optim.name=muon", "optim.lr_head=0.02",
    "optim.lr_vectors=20", "optim.weight_decay=0.02", "data.progressive_sizes=[20,32]", "train.epochs=2",
    "data.augment=[alternating_flip,crop]", "data.crop_border=reflect", "eval.tta=mirror_and_shift",
]  # fmt: skip


def test_speedrun_has_the_same_bits_on_any_number_of_ranks_and_after_a_resume(ranks: Ranks) -> None:
    settings = [*SETTINGS, *SPEEDRUN, "data.global_batch_size=200"]
    for size in (1, 3):
        ranks.run(size, *settings, f"run.name=on-{size}", fault="")
    assert not difference_between("on-1", "on-3")
    summary = json.loads(Path("runs/on-1/summary.json").read_text())
    assert 0 <= summary["test"]["tta_accuracy"] <= 1 != summary["test"]["accuracy"]
    resumed = [*settings, "run.name=resumed", "checkpoint.every_steps=5"]
    ranks.run(1, *resumed, "train.time_limit=1s", fault="", code=75)  # stops after one step
    assert json.loads(Path("runs/resumed/status.json").read_text())["step"] < 16
    ranks.run(2, *resumed, fault="")
    assert not difference_between("on-1", "resumed")


def test_more_ranks_than_virtual_ranks_are_refused(ranks: Ranks) -> None:
    rank0, _ = ranks.start(2, *SETTINGS, "train.virtual_ranks=1")  # rank 1 waits until a launcher ends it
    assert ranks.join([rank0]) == [2]
    assert "train.virtual_ranks=1" in ranks.log.read_text()
