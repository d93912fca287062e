"""What training asks of a GPU, on machines without one: all of one call lies on it, and no step waits for it."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import SMALL
from gpu_in_name import GPU, gpu_in_name
from torch import Tensor

from trainer import blocks, data, evaluation, main, optim, parts
from trainer import config as configs
from trainer.bad_steps import Skipped
from trainer.evaluation import ClassScore, Evaluation
from trainer.meter import Meter
from trainer.settings import RunConfig
from trainer.watch import Unwatched
from trainer.world import World

NUM_STEPS = 40
CLASSES = tuple("abcdefghij")
ALL_BUT_FLIP = "data.augment=[alternating_flip,crop,cutout,mixup,cutmix]"


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    with gpu_in_name(monkeypatch) as waits:
        yield waits


@pytest.fixture
def images(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = torch.randint(0, 256, (1000, 32, 32, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    part = data.Images(pixels, torch.arange(1000) % 10)
    monkeypatch.setattr(data, "load", lambda *_: data.Splits(part, None, part, CLASSES))


def built(*settings: str) -> tuple[RunConfig, World, parts.Parts]:
    config = configs.load([], ["data.global_batch_size=64", "data.normalize=cifar10", "log.wandb=off", *settings])
    world = World(config.train)
    assert world.device.type == "cuda" and world.precision == "bf16"
    made = parts.build(config, world, None, Unwatched(), lambda line: None)
    assert made.splits.train.images.is_cuda and all(weight.is_cuda for weight in made.module.parameters())
    return config, world, made


@pytest.mark.parametrize(
    "settings",
    [
        ["model.name=lenet"],
        ["model.name=tudui", ALL_BUT_FLIP, "train.clip_grad_norm=1.0"],
        ["model.name=lenet", "optim.name=adamw", "loss.label_smoothing=0.1"],
        ["model.name=speedrun", "train.virtual_ranks=2"],
        ["model.name=speedrun", "optim.name=muon", "data.progressive_sizes=[24,28,32]", "train.epochs=3"],
    ],
)
def test_no_step_waits_for_the_gpu(images: None, waits: list[str], settings: list[str]) -> None:
    config, world, made = built(*settings)
    meter, skipped = Meter([0.0] * 3, world.sum, GPU), Skipped(GPU)
    loader = blocks.train_loader(made.splits.train, made.batches, made.augment, config, world, 0, NUM_STEPS)
    waits.clear()
    for step, batch in enumerate(loader):
        optim.set_lr(made.optimizer, config.optim, 0.5)
        epoch, size, is_told = made.batches.epoch(step), made.batches.size(step), step % 10 == 0
        outcome = made.step(batch, step, epoch, size, made.num_shards(step), is_told)
        meter.add(outcome, size)
        skipped.add(step, outcome)
        assert not list(skipped.heard(skipped.lag_steps))
    assert step == NUM_STEPS - 1
    assert not waits


class _Counted(Exception):
    pass


@pytest.mark.parametrize("views", ["none", "mirror_and_shift"])
def test_an_evaluation_waits_for_the_gpu_when_all_is_counted(images: None, waits: list[str], views: str) -> None:
    config, world, made = built("model.name=lenet", f"eval.tta={views}")

    def add_ranks(counts: Tensor) -> Tensor:
        raise _Counted

    world.sum = add_ranks  # type: ignore[method-assign]
    waits.clear()
    with pytest.raises(_Counted):
        made.evaluate(made.splits.test, config, world, lambda: None)
    assert not waits


@pytest.mark.parametrize(
    "more",
    [
        ["train.precision=auto", "eval.tta=mirror"],
        ["train.precision=fp16"],
        ["train.precision=fp32", "train.virtual_ranks=4", "log.feature_maps=[pool]"],
    ],
)
def test_a_whole_run_and_one_that_goes_on(
    waits: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, more: list[str]
) -> None:
    def score(loss_sum: float, confusion: Tensor, classes: tuple[str, ...], tta_correct: int | None) -> Evaluation:
        """Of counts that are all zero."""
        scores = tuple(ClassScore(name, 0.0, 0.0, 0.0, 0) for name in classes)
        return Evaluation(loss_sum, 0.0, 364, scores, tuple(map(tuple, confusion.tolist())), tta_correct)

    monkeypatch.setattr(evaluation, "score", score)
    drawn = ["log.figures=true", "log.tensorboard=true", "log.every_steps=10"]
    for epochs in (2, 3):
        asked = [*SMALL, *drawn, f"run.root={tmp_path}", "run.name=run", f"train.epochs={epochs}", *more]
        assert main.main(asked) == 0
    run = tmp_path / "run"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    told = [line for line in lines if line["split"] == "train"]
    assert json.loads((run / "summary.json").read_text())["steps"] == told[-1]["step"] == 69
    assert all(line["gpu_memory_bytes"] for line in told)
    assert json.loads((run / "environment.json").read_text())["device"] == "a GPU in name"


def test_what_waits_is_seen(waits: list[str]) -> None:
    on_gpu = torch.zeros(3, device=GPU)
    for wait in (
        lambda: on_gpu.cpu(),
        lambda: torch.ones(3).to(GPU),
        lambda: on_gpu.copy_(torch.ones(3)),
        lambda: bool(on_gpu[0] > 0),
    ):
        waits.clear()
        wait()
        assert len(waits) == 1
    with pytest.raises(RuntimeError, match="on the same device"):
        on_gpu + torch.ones(3)
