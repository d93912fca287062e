"""What training asks of a GPU, on machines without one: all of one call lies on it, and no step waits for it."""

from typing import Any, cast

import pytest
import torch
from gpu_in_name import GPU, gpu_in_name
from torch import Tensor, nn

from trainer import blocks, data, optim, parts
from trainer import config as configs
from trainer.bad_steps import Skipped
from trainer.meter import Meter
from trainer.settings import RunConfig
from trainer.watch import Unwatched
from trainer.world import World

NUM_STEPS = 40
FLIP_AND_MORE = "data.augment=[alternating_flip,crop,cutout,mixup,cutmix]"


class _Optimizer:
    """Stands in for accelerate's, which asks the driver for its devices."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer, self.param_groups = optimizer, optimizer.param_groups


class _Accelerator:
    scaler, num_processes, device = None, 1, GPU

    def prepare(self, module: nn.Module, optimizer: torch.optim.Optimizer, **_: object) -> tuple[nn.Module, _Optimizer]:
        return module, _Optimizer(optimizer)

    def prepare_model(self, module: nn.Module, **_: object) -> nn.Module:
        return module

    def prepare_optimizer(self, optimizer: torch.optim.Optimizer, **_: object) -> _Optimizer:
        return _Optimizer(optimizer)

    def clip_grad_norm_(self, weights: list[Tensor], norm: float) -> Tensor:
        return nn.utils.clip_grad_norm_(weights, norm)


class _World:
    """One process with a GPU in name."""

    rank, size, device, precision, accelerator = 0, 1, GPU, "fp32", _Accelerator()

    def together(self, work: Any) -> Any:
        return work()

    def sum(self, tensor: Tensor) -> Tensor:
        return tensor

    def share(self, place_bytes: int) -> None: ...
    def same_everywhere(self, module: nn.Module) -> None: ...


WORLD = cast(World, _World())


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Any:
    images = torch.randint(0, 256, (1000, 32, 32, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    part = data.Images(images, torch.arange(1000) % 10)
    monkeypatch.setattr(data, "load", lambda *_: data.Splits(part, None, part, tuple("abcdefghij")))
    # PyTorch's own backward pass asks the driver for streams. Here it leaves gradients of the weights' shape.
    monkeypatch.setattr("trainer.uncompiled.backward", _leave_gradients)
    with gpu_in_name(monkeypatch) as waits:
        yield waits


def _leave_gradients(loss_sum: Tensor, factor: Tensor) -> None:
    assert loss_sum.is_cuda and factor.is_cuda
    waiting, seen = [loss_sum.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        waiting += [following for following, _ in node.next_functions]
        if isinstance(weight := getattr(node, "variable", None), Tensor):
            weight.grad = torch.empty_like(weight)


def built(*settings: str) -> tuple[RunConfig, parts.Parts]:
    config = configs.load([], ["data.global_batch_size=64", "data.normalize=cifar10", "log.wandb=off", *settings])
    made = parts.build(config, WORLD, None, Unwatched(), lambda line: None)
    assert made.splits.train.images.is_cuda and all(weight.is_cuda for weight in made.module.parameters())
    return config, made


@pytest.mark.parametrize(
    "settings",
    [
        ["model.name=lenet"],
        ["model.name=tudui", FLIP_AND_MORE, "train.clip_grad_norm=1.0"],
        ["model.name=lenet", "optim.name=adamw", "loss.label_smoothing=0.1"],
        ["model.name=speedrun", "train.virtual_ranks=2"],
        ["model.name=speedrun", "optim.name=muon", "data.progressive_sizes=[24,28,32]", "train.epochs=3"],
    ],
)
def test_no_step_waits_for_the_gpu(waits: list[str], settings: list[str]) -> None:
    config, made = built(*settings)
    meter, skipped = Meter([0.0] * 3, WORLD.sum, GPU), Skipped(GPU)
    loader = blocks.train_loader(made.splits.train, made.batches, made.augment, config, WORLD, 0, NUM_STEPS)
    waits.clear()
    for step, batch in enumerate(loader):
        optim.set_lr(made.optimizer, config.optim, 0.5)
        epoch, size, is_told = made.batches.epoch(step), made.batches.size(step), step % 10 == 0
        outcome = made.step(batch, step, epoch, size, made.num_shards(step), is_told)
        meter.add(outcome, size)
        skipped.add(step, outcome)
    assert step == NUM_STEPS - 1
    assert not waits


class _Counted(Exception):
    pass


@pytest.mark.parametrize("views", ["none", "mirror_and_shift"])
def test_an_evaluation_waits_for_the_gpu_when_all_is_counted(
    waits: list[str], views: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, made = built("model.name=lenet", f"eval.tta={views}")

    def add_ranks(world: _World, counts: Tensor) -> Tensor:
        raise _Counted

    monkeypatch.setattr(_World, "sum", add_ranks)
    waits.clear()
    with pytest.raises(_Counted):
        made.evaluate(made.splits.test, config, WORLD, lambda: None)
    assert not waits


def test_what_waits_is_seen(waits: list[str]) -> None:
    on_gpu = torch.zeros(3, device=GPU)
    for wait in (lambda: on_gpu.cpu(), lambda: torch.ones(3).to(GPU), lambda: on_gpu.copy_(torch.ones(3))):
        waits.clear()
        wait()
        assert len(waits) == 1
    with pytest.raises(RuntimeError, match="on the same device"):
        on_gpu + torch.ones(3)
    with pytest.raises(Exception, match="_local_scalar_dense"):
        bool(on_gpu[0] > 0)
