"""Step in one process: skipped updates, the fp16 loss scale, the seed of dropout, the communication timer."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from support.workers.tiny import Noise
from torch import Tensor, nn

from trainer.config.schema import LossSettings, OptimSettings
from trainer.data.loader import Samples, Shard
from trainer.distributed.buffers import Buffers
from trainer.optim.losses import SampleLoss
from trainer.optim.optimizers import build_optimizer, set_learning_rates
from trainer.run.watchdog import NullWatchdog
from trainer.step import Step, StepOutcome
from trainer.timer import Timer

SEED = 3
NUM_SAMPLES = 5


class NoAugment:
    """Only normalizes the images, to float32."""

    def normalize(self, images: Tensor, out: Tensor) -> Tensor:
        return out.copy_(images)


def build_network(dropout: nn.Module | None = None) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Flatten(), nn.Linear(4, 6), nn.BatchNorm1d(6), dropout or nn.Identity(), nn.Linear(6, 3)]
    return nn.Sequential(*layers)


def build_step(net: nn.Module, optimizer: torch.optim.Optimizer, accelerator: Any = None, **arguments: Any) -> Step:
    accelerator = accelerator or Accelerator(cpu=True)
    prepared: Any = SimpleNamespace(optimizer=optimizer)
    if accelerator.scaler is not None:
        prepared = accelerator.prepare_optimizer(optimizer)
    augment: Any = NoAugment()
    loss = SampleLoss(LossSettings(), training=True)
    arguments = {"communication": Timer()} | arguments
    return Step(accelerator, net, prepared, loss, augment, Buffers(net), SEED, NullWatchdog(), **arguments)


def build_shard() -> Shard:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 3, (NUM_SAMPLES, 1, 2, 2), dtype=torch.uint8, generator=generator)
    samples = Samples(images, torch.arange(NUM_SAMPLES) % 3, torch.arange(NUM_SAMPLES))
    return Shard(samples, None, 0, 1.0)


def take_step(step: Step, number: int = 0) -> StepOutcome:
    return step([build_shard()], number, epoch=0, global_batch_size=NUM_SAMPLES, num_shards=1)


def state_of(net: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Returns copies of weights, buffers and optimizer state."""
    entries = optimizer.state_dict()["state"].items()
    state = {f"{index}.{name}": value for index, entry in entries for name, value in entry.items()}
    return {name: value.clone() for name, value in (net.state_dict() | state).items()}


def optimizer_of(name: str, net: nn.Module) -> torch.optim.Optimizer:
    if name == "rmsprop":  # a torch optimizer that ignores found_inf
        return torch.optim.RMSprop(net.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    return build_optimizer(net, OptimSettings(name=name, lr=0.1, weight_decay=0.1))  # type: ignore[arg-type]


@pytest.mark.parametrize("clip_grad_norm", [None, 1.0], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("name", ["sgd", "adamw", "muon", "rmsprop"])
def test_step_with_a_nan_gradient_changes_nothing(name: str, clip_grad_norm: float | None) -> None:
    net = build_network()
    optimizer = optimizer_of(name, net)
    step = build_step(net, optimizer, clip_grad_norm=clip_grad_norm)
    gradient_is_nan = True
    net[1].weight.register_hook(lambda gradient: gradient * math.nan if gradient_is_nan else gradient)
    before = state_of(net, optimizer)
    outcome = take_step(step)
    assert outcome.skipped == 1 and outcome.loss_sum().isfinite()
    assert outcome.grad_norm is not None and not outcome.grad_norm.isfinite()
    after = state_of(net, optimizer)  # AdamW creates its state, as zeros, in the first step
    assert all(torch.equal(after[key], value) for key, value in before.items())

    gradient_is_nan = False
    assert take_step(step, 1).skipped == 0
    trained = state_of(net, optimizer)
    assert not torch.equal(trained["1.weight"], before["1.weight"])
    assert all(value.isfinite().all() for value in trained.values())

    gradient_is_nan = True
    assert take_step(step, 2).skipped == 1
    after = state_of(net, optimizer)
    assert after.keys() == trained.keys() and all(torch.equal(after[key], value) for key, value in trained.items())


@pytest.mark.parametrize("name", ["sgd", "adamw", "muon"])
def test_optimizer_with_found_inf_changes_nothing(name: str) -> None:
    net = build_network()
    settings = OptimSettings(name=name, weight_decay=0.1)  # type: ignore[arg-type]
    optimizer = build_optimizer(net, settings)
    for number, found_inf in enumerate((1.0, 0.0, 1.0)):
        net(torch.randn(5, 4)).square().sum().backward()
        if found_inf:
            for weight in net.parameters():
                assert weight.grad is not None
                weight.grad.fill_(torch.nan)
        set_learning_rates(optimizer, settings, 0.7)
        before = state_of(net, optimizer)
        optimizer.found_inf = torch.tensor(found_inf)  # type: ignore[attr-defined]
        optimizer.step()
        after = state_of(net, optimizer)
        is_unchanged = all(torch.equal(after[key], value) for key, value in before.items())
        assert is_unchanged == bool(found_inf), number
        optimizer.zero_grad()


@pytest.mark.parametrize("dropout", [nn.Dropout(0.5), Noise()], ids=["nn.Dropout", "own class"])
def test_dropout_depends_on_the_step_and_not_on_earlier_random_numbers(dropout: nn.Module) -> None:
    def logits(step_number: int, state: int) -> Tensor:
        net = build_network(dropout)
        step = build_step(net, torch.optim.SGD(net.parameters(), lr=0.0))
        torch.manual_seed(state)  # what evaluation, another rank's shards or a resumed process leave behind
        (result,) = take_step(step, step_number).results
        return result.logits

    assert torch.equal(logits(7, state=1), logits(7, state=2))
    assert not torch.equal(logits(7, state=1), logits(8, state=1))


def test_fp16_overflow_lowers_the_loss_scale_and_a_nan_loss_skips_the_step() -> None:
    net = build_network()
    accelerator = Accelerator(cpu=True)
    scaler = accelerator.scaler = torch.amp.GradScaler("cpu")  # fp16 is refused on a CPU, but its loss scale works
    scaler.scale(torch.zeros(1))  # creates the scale, which GradScaler does at its first use
    optimizer = build_optimizer(net, OptimSettings(lr=0.1, momentum=0.0))
    step = build_step(net, optimizer, accelerator)
    factors = {"logits": 1.0}
    net[1].weight.register_hook(lambda gradient: gradient * math.inf)
    net.register_forward_hook(lambda _, inputs, logits: logits * factors["logits"])
    before = state_of(net, optimizer)
    for scale, logits_factor, is_skipped, scale_after in (
        (65536.0, 1.0, False, 32768.0),  # an overflow: the scaler skips the update, the step does not count as skipped
        (65536.0, math.nan, True, 65536.0),
        (1.0, 1.0, True, 1.0),  # the scale cannot be lowered any more
    ):
        factors["logits"] = logits_factor
        scaler.update(scale)
        outcome = take_step(step)
        assert outcome.skipped == is_skipped
        assert outcome.grad_norm is not None and not outcome.grad_norm.isfinite()
        assert all(torch.equal(tensor, before[name]) for name, tensor in state_of(net, optimizer).items())
        assert scaler.get_scale() == scale_after


def test_fp16_step_with_clipping_is_possible_after_a_skipped_step() -> None:
    net = build_network()
    accelerator = Accelerator(cpu=True)
    scaler = accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = build_optimizer(net, OptimSettings())
    accelerator.unscale_gradients = lambda: scaler.unscale_(optimizer)  # accelerate does this only with fp16
    step = build_step(net, optimizer, accelerator, clip_grad_norm=1.0)
    factors = {"logits": math.nan}
    net.register_forward_hook(lambda _, inputs, logits: logits * factors["logits"])
    assert take_step(step).skipped == 1
    factors["logits"] = 1.0
    assert take_step(step, 1).skipped == 0


def test_fp16_update_and_norm_use_the_unscaled_gradient() -> None:
    net, reference = build_network(), build_network()
    accelerator = Accelerator(cpu=True)
    scaler = accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    settings = OptimSettings(lr=0.1, momentum=0.0)
    outcome = take_step(build_step(net, build_optimizer(net, settings), accelerator))
    expected = take_step(build_step(reference, build_optimizer(reference, settings)))
    assert scaler.get_scale() == 1024.0 and outcome.skipped == 0
    assert outcome.grad_norm is not None and expected.grad_norm is not None
    torch.testing.assert_close(outcome.grad_norm, expected.grad_norm)
    for weight, expected_weight in zip(net.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(weight, expected_weight)


def test_communication_under_ddp_begins_when_the_backward_pass_reaches_the_first_weight() -> None:
    events: list[str] = []

    class RecordingTimer(Timer):
        def begin(self) -> None:
            events.append("begin")

        def end(self) -> None:
            events.append("end")

    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 6, bias=False), nn.Linear(6, 3))  # no buffers to exchange
    for name, weight in net.named_parameters():
        weight.register_post_accumulate_grad_hook(lambda _, name=name: events.append(name))  # type: ignore[misc]
    accelerator = Accelerator(cpu=True)
    two_ranks = SimpleNamespace(num_processes=2, scaler=None, device=torch.device("cpu"), backward=accelerator.backward)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    step = build_step(net, optimizer, two_ranks, communication=RecordingTimer())
    step([build_shard()], 0, epoch=0, global_batch_size=NUM_SAMPLES, num_shards=2)
    assert set(events[:2]) == {"2.weight", "2.bias"} and events[2:] == ["1.weight", "begin", "end"]
