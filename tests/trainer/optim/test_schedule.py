"""Learning rate schedule: warmup, then the named curve."""

import pytest
import torch
from torch import nn

from trainer.optim.schedule import Schedule


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
