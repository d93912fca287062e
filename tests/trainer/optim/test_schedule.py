"""Durations and learning rates are functions of the step alone."""

import pytest
import torch
from torch import nn

from trainer.config.durations import Durations
from trainer.config.load import load_config
from trainer.optim.schedule import Schedule


def test_epochs_become_steps_once() -> None:
    config = load_config([], ["train.epochs=4", "schedule.warmup_epochs=0.5"])
    assert Durations.of(config, steps_per_epoch=10) == Durations(10, 40, 5)


def test_max_steps_ends_the_schedule_too() -> None:
    config = load_config([], ["train.epochs=4", "train.max_steps=7", "schedule.warmup_epochs=1"])
    assert Durations.of(config, steps_per_epoch=10) == Durations(10, 7, 7)


def test_the_warmup_rises_evenly_to_the_peak() -> None:
    course = Schedule("constant", warmup_steps=4, total_steps=10)
    assert [course.lr_factor(step) for step in range(6)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])


@pytest.mark.parametrize(("name", "middle"), [("cosine", 0.5), ("linear", 0.5)])
def test_decay_goes_from_the_peak_towards_zero(name: str, middle: float) -> None:
    course = Schedule(name, warmup_steps=10, total_steps=110)
    assert course.lr_factor(10) == 1.0
    assert course.lr_factor(60) == pytest.approx(middle)
    assert 0 < course.lr_factor(109) < 0.02
    factors = [course.lr_factor(step) for step in range(10, 110)]
    assert factors == sorted(factors, reverse=True)


def test_cosine_is_torchs() -> None:
    parameter = nn.Parameter(torch.zeros(1))
    theirs = torch.optim.SGD([parameter], lr=1.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(theirs, T_max=20)
    ours = Schedule("cosine", warmup_steps=0, total_steps=20)
    for step in range(20):
        assert ours.lr_factor(step) == pytest.approx(theirs.param_groups[0]["lr"])
        theirs.step()
        scheduler.step()


def test_what_is_due_when() -> None:
    durations = Durations(steps_per_epoch=10, total_steps=30, warmup_steps=0)
    assert [step for step in range(1, 31) if durations.due(step, every_epochs=2)] == [20]
    assert [step for step in range(1, 31) if durations.due(step, every_epochs=0, every_steps=7)] == [7, 14, 21, 28]
    assert not any(durations.due(step, every_epochs=0) for step in range(1, 31))
