"""Learning rate schedule: warmup, then the named curve."""

import pytest
import torch
from torch import nn

from trainer.config.durations import Durations
from trainer.config.load import flatten, load_config
from trainer.optim.schedule import Schedule, describe_changed_length


def test_warmup_rises_linearly_to_the_peak() -> None:
    schedule = Schedule("constant", warmup_steps=4, total_steps=10)
    assert [schedule.lr_factor(step) for step in range(6)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])


@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_learning_rate_decays_from_the_peak_towards_zero(name: str) -> None:
    schedule = Schedule(name, warmup_steps=10, total_steps=110)
    assert schedule.lr_factor(10) == 1.0
    assert schedule.lr_factor(60) == pytest.approx(0.5)
    assert 0 < schedule.lr_factor(109) < 0.02
    factors = [schedule.lr_factor(step) for step in range(10, 110)]
    assert factors == sorted(factors, reverse=True)


def test_cosine_equals_torchs_cosine_annealing() -> None:
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    torch_scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20)
    schedule = Schedule("cosine", warmup_steps=0, total_steps=20)
    for step in range(20):
        assert schedule.lr_factor(step) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        torch_scheduler.step()


@pytest.mark.parametrize(
    ("settings", "step", "message"),
    [
        ("train.epochs=20", 100, "ends at step 200 instead of 100, which changes the cosine schedule: the learning "
         "rate jumps from 2.47e-05 to 0.05 at step 101"),
        ("train.epochs=5", 50, "ends at step 50 instead of 100"),
        ("train.max_steps=60", 50, "ends at step 60 instead of 100"),
        ("train.epochs=20 schedule.name=linear", 100, "jumps from 0.001 to 0.05"),
        ("train.epochs=20 schedule.name=constant", 100, ""), ("train.epochs=10", 100, ""), ("train.epochs=20", 0, ""),
        ("train.epochs=20 train.max_steps=100", 100, ""),
    ],
)  # fmt: skip
def test_jump_of_the_learning_rate_in_a_longer_run_is_described(settings: str, step: int, message: str) -> None:
    config = load_config([], settings.split())
    before = flatten(load_config([], []))
    text = describe_changed_length(before, step, config, Durations.from_config(config, steps_per_epoch=10))
    assert message in text and bool(text) == bool(message)
