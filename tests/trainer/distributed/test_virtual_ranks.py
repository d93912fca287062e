"""The same bits on 1, 2, 3 and 4 real ranks."""

import json
from pathlib import Path

import pytest
from support.processes import SMALL, Ranks
from support.runs import differing

from launch.verify.compare import rows

SAME = [*SMALL, "run.root=runs", "train.threads_per_rank=1", "log.every_steps=4", "train.virtual_ranks=4"]
# Neither 4 shards nor 3 ranks divide 53; an epoch's last batch has 2 samples: fewer shards than ranks.
CURVE = [*SAME, "data.global_batch_size=53", "train.max_steps=30", "eval.batch_size=100", "checkpoint.every_steps=10"]
CURVE += ["data.augment=[flip,crop,cutout,mixup,cutmix]"]


def test_batchnorm_and_dropout_are_bitwise_the_same_on_any_number_of_ranks(ranks: Ranks) -> None:
    for size in (1, 2, 3, 4):
        ranks.run(size, *CURVE, f"run.name=on-{size}")
    for size in (2, 3, 4):
        assert not differing("on-1", f"on-{size}")
    assert Path("runs/on-1/model.safetensors").read_bytes() == Path("runs/on-4/model.safetensors").read_bytes()
    losses = [row["loss"] for row in rows(Path("runs/on-1")) if row["split"] == "train"]
    assert len(losses) == 8 and len(set(losses)) == 8
    assert json.loads(Path("runs/on-3/summary.json").read_text())["world_size"] == 3


@pytest.mark.parametrize("model", ["resnet18", "tudui"])
def test_real_networks_are_bitwise_the_same(ranks: Ranks, image_folder: Path, model: str) -> None:
    settings = [
        "data.name=image_folder",
        f"data.root={image_folder}",
        f"model.name={model}",
        "data.augment=[flip,crop]",
    ]
    settings += ["data.global_batch_size=9", "train.max_steps=3", "log.every_steps=1"]
    for size in (1, 2, 3, 4):
        ranks.run(size, *SAME, *settings, f"run.name=on-{size}", plant="")
    for size in (2, 3, 4):
        assert not differing("on-1", f"on-{size}")


SPEEDRUN = [
    "model.name=speedrun", "model.widths=[8,16]", "model.depth=3", "optim.name=muon", "optim.lr_head=0.02",
    "optim.lr_vectors=20", "optim.weight_decay=0.02", "data.progressive_sizes=[20,32]", "train.epochs=2",
    "data.augment=[alternating_flip,crop]", "data.crop_border=reflect", "eval.tta=mirror_and_shift",
]  # fmt: skip


def test_the_speedrun_is_bitwise_the_same_on_any_number_of_ranks_and_after_a_stop(ranks: Ranks) -> None:
    short = [*SAME, *SPEEDRUN, "data.global_batch_size=200"]
    for size in (1, 3):
        ranks.run(size, *short, f"run.name=on-{size}", plant="")
    assert not differing("on-1", "on-3")
    summary = json.loads(Path("runs/on-1/summary.json").read_text())
    assert 0 <= summary["test"]["tta_accuracy"] <= 1 != summary["test"]["accuracy"]
    # The time of its job has been over for long: it stops after its first step.
    ranks.run(1, *short, "run.name=stopped", "checkpoint.every_steps=5", plant="", code=75, SLURM_JOB_END_TIME="1")
    assert json.loads(Path("runs/stopped/status.json").read_text())["step"] < 16
    ranks.run(2, *short, "run.name=stopped", "checkpoint.every_steps=5", plant="")
    assert not differing("on-1", "stopped")


def test_more_ranks_than_virtual_ranks_are_refused(ranks: Ranks) -> None:
    first, _ = ranks.start(2, *SAME, "train.virtual_ranks=1")  # the other one waits, for a launcher to end it
    assert ranks.end([first]) == [2]
    assert "start 1 processes at most" in ranks.log.read_text()
