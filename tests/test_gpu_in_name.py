"""What training asks of a GPU, on machines without one: all of one call lies on it, and no step waits for its own work.

One rank, its images on the GPU. Needs a PyTorch that knows GPUs, as Linux's has, driver or not.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import SMALL
from gpu_in_name import EVENTS_AHEAD, GPU, NamedGpu, gpu_in_name
from PIL import Image
from torch import Tensor

from trainer import blocks, data, evaluate, evaluation, main, optim, parts, predict
from trainer import config as configs
from trainer.bad_steps import Skipped
from trainer.evaluation import ClassScore, Evaluation
from trainer.meter import Meter
from trainer.settings import RunConfig
from trainer.step import Shard
from trainer.watch import Unwatched
from trainer.world import World

pytestmark = pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="needs a PyTorch that is built for CUDA")
NUM_STEPS = 40
CLASSES = tuple("abcdefghij")
# What may wait, by its file: where a run begins or goes on, evaluates or saves, and for a line of metrics.
BEGINS = {"augment.py", "data.py", "first_batch.py", "optim.py", "parts.py"}
ENDS = {"evaluation.py", "examples.py", "feature_maps.py", "result.py", "saver.py", "showing.py", "visuals.py"}
TELLS = {"bad_steps.py", "meter.py", "stopwatch.py"}
ALL_AUGMENTATIONS = "data.augment=[alternating_flip,crop,cutout,mixup,cutmix]"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[NamedGpu]:
    with gpu_in_name(monkeypatch) as gpu:
        yield gpu


@pytest.fixture
def images(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = torch.randint(0, 256, (1000, 32, 32, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    part = data.Images(pixels, torch.arange(1000) % 10)
    monkeypatch.setattr(data, "load", lambda *_: data.Splits(part, None, part, CLASSES))


def built(*settings: str) -> tuple[RunConfig, World, parts.Parts]:
    config = configs.load([], ["data.global_batch_size=64", "data.normalize=cifar10", "log.wandb=off", *settings])
    world = World(config.train)
    assert world.device.type == "cuda"
    made = parts.build(config, world, None, Unwatched(), lambda line: None)
    assert made.splits.train.images.is_cuda and all(weight.is_cuda for weight in made.module.parameters())
    return config, world, made


def train_loader(config: RunConfig, world: World, made: parts.Parts, steps: int) -> Iterator[list[Shard]]:
    return blocks.train_loader(
        made.splits.train, made.batches, made.augment, made.cutting, config, world, first_step=0, end_step=steps
    )


@pytest.mark.parametrize(
    "settings",
    [
        ["model.name=lenet"],
        ["model.name=tudui", ALL_AUGMENTATIONS, "train.clip_grad_norm=1.0"],
        ["model.name=lenet", "optim.name=adamw", "loss.label_smoothing=0.1"],
        ["model.name=speedrun", "train.virtual_ranks=2"],
        ["model.name=speedrun", "optim.name=muon", "data.progressive_sizes=[24,28,32]", "train.epochs=3"],
    ],
)
def test_no_step_waits_for_the_gpu(images: None, gpu: NamedGpu, settings: list[str]) -> None:
    config, world, made = built(*settings)
    meter, skipped = Meter([0.0] * 3, world.sum, GPU), Skipped(GPU)
    loader = train_loader(config, world, made, NUM_STEPS)
    gpu.waits.clear()
    for step, batch in enumerate(loader):
        optim.set_lr(made.optimizer, config.optim, 0.5)
        epoch, size, is_told = made.batches.epoch(step), made.batches.size(step), step % 10 == 0
        outcome = made.step(batch, step, epoch, size, made.num_shards(step), is_told)
        meter.add(outcome, size)
        skipped.add(step, outcome)
        assert not list(skipped.heard(skipped.lag_steps))
    assert step == NUM_STEPS - 1
    assert not gpu.waits


class _Counted(Exception):
    pass


@pytest.mark.parametrize("views", ["none", "mirror_and_shift"])
def test_an_evaluation_waits_for_the_gpu_when_all_is_counted(images: None, gpu: NamedGpu, views: str) -> None:
    config, world, made = built("model.name=lenet", f"eval.tta={views}")

    def add_ranks(counts: Tensor) -> Tensor:
        raise _Counted

    world.sum = add_ranks  # type: ignore[method-assign]
    gpu.waits.clear()
    with pytest.raises(_Counted):
        made.evaluate(made.splits.test, config, world, lambda: None)
    assert not gpu.waits


@pytest.mark.parametrize(
    "more",
    [
        ["train.precision=auto", "eval.tta=mirror"],
        ["train.precision=fp16"],
        ["train.precision=fp32", "train.virtual_ranks=4", "log.feature_maps=[pool]"],
    ],
)
def test_a_whole_run_that_goes_on_is_evaluated_and_predicts(
    gpu: NamedGpu, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, more: list[str]
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
    starts = (run / "starts.jsonl").read_text().splitlines()
    assert [json.loads(start)["step"] for start in starts] == [0, 46]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    told = [line for line in lines if line["split"] == "train"]
    assert json.loads((run / "summary.json").read_text())["steps"] == told[-1]["step"] == 69
    assert all(line["gpu_memory_bytes"] for line in told)
    assert json.loads((run / "environment.json").read_text())["device"] == "a GPU in name"
    told_of = {wait.split(" at ")[-1].split(":")[0] for wait in gpu.waits}
    assert told_of <= BEGINS | ENDS | TELLS | ({"step.py", "loop.py"} if "train.precision=fp16" in more else set())
    assert evaluate.main([str(run), "--config", str(run / "config.yaml"), "--json"]) == 0
    (prediction,) = predict.load(run).predict(Image.new("RGB", (40, 32)), top=3)
    assert len(prediction.top) == 3


@pytest.mark.parametrize("more", [[], ["train.clip_grad_norm=1.0"]])
@pytest.mark.parametrize("value", [0.0, 1.0, 2.0])
def test_fp16_with_a_gradient_that_is_finite_or_not(
    images: None, gpu: NamedGpu, monkeypatch: pytest.MonkeyPatch, value: float, more: list[str]
) -> None:
    """What is read is both the loss scale and whether there was an overflow: none, at a scale of 1, and above."""
    config, world, made = built("model.name=lenet", "train.precision=fp16", *more)
    gpu.value = value
    unscaled, unscale = [], world.accelerator.unscale_gradients
    monkeypatch.setattr(world.accelerator, "unscale_gradients", lambda: unscaled.append(unscale()))
    (shard,) = next(train_loader(config, world, made, 1))
    outcome = made.step([shard], 0, 0, made.batches.size(0), 1, True)
    assert outcome.skipped.is_cuda and outcome.grad_norm is not None and outcome.grad_norm.is_cuda
    assert len(unscaled) == len(more)  # before they are clipped


def test_what_waits_is_seen(gpu: NamedGpu) -> None:
    on_gpu, on_cpu, mask = torch.zeros(3, device=GPU), torch.ones(3), torch.ones(3, dtype=torch.bool)
    event = torch.cuda.Event()
    event.record()
    for wait in (
        lambda: on_gpu.cpu(),
        lambda: on_gpu.to("cpu", non_blocking=True),
        lambda: on_cpu.to(GPU),
        lambda: on_cpu.to(GPU, non_blocking=True),
        lambda: on_cpu.pin_memory().to(GPU),
        lambda: on_gpu.copy_(on_cpu),
        lambda: on_cpu.copy_(on_gpu),
        lambda: bool(on_gpu[0] > 0),
        lambda: on_gpu[torch.tensor([0, 2])],
        lambda: on_gpu.index_put_((mask.to(GPU),), on_gpu),
        event.synchronize,
        torch.cuda.synchronize,
        torch.cuda.current_stream().synchronize,
    ):
        gpu.waits.clear()
        wait()
        assert gpu.waits


def test_what_does_not_wait(gpu: NamedGpu) -> None:
    pinned, first = torch.ones(3).pin_memory(), torch.cuda.Event()
    on_gpu = pinned.to(GPU, non_blocking=True)
    assert torch.empty(3, pin_memory=True).copy_(on_gpu, non_blocking=True).device.type == "cpu"
    first.record()
    for _ in range(EVENTS_AHEAD):
        torch.cuda.Event().record()
    first.synchronize()
    assert on_gpu.sum().is_cuda and not gpu.waits


def test_what_a_gpu_refuses(gpu: NamedGpu) -> None:
    on_gpu, on_cpu = torch.zeros(3, device=GPU), torch.ones(3)
    with pytest.raises(RuntimeError, match="on the same device"):
        on_gpu + on_cpu
    with pytest.raises(AssertionError, match="a GPU's indices"):
        on_cpu[on_gpu.long()]
    with pytest.raises(AssertionError, match="tensors of the CPU"):
        torch._amp_foreach_non_finite_check_and_unscale_([on_gpu], torch.zeros(()), torch.ones((), device=GPU))
    for how_many in (on_gpu.nonzero, lambda: on_gpu[on_gpu > 0], lambda: on_gpu.masked_select(on_gpu > 0)):
        with pytest.raises(RuntimeError):  # PyTorch's fake tensors cannot tell how many
            how_many()
