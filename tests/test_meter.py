"""The meter: exact sums, over ranks and over a restart; evaluation is not training time."""

import pytest
import torch

from trainer.meter import Meter

CPU = torch.device("cpu")


def test_a_reading_is_the_mean_since_the_last_one() -> None:
    meter = Meter([0.0, 0.0], 0, lambda sums: sums, CPU)
    for _ in range(2):
        meter.add(torch.tensor([6.0, 1.0], dtype=torch.float64), 2)
        meter.add(torch.tensor([3.0, 1.0], dtype=torch.float64), 1)
        line = meter.read()
        assert (line["loss"], line["accuracy"]) == (3.0, pytest.approx(2 / 3))


def test_uneven_ranks_weigh_by_samples_not_by_rank() -> None:
    other = torch.tensor([100.0, 0.0], dtype=torch.float64)  # the other rank's sums, of one sample
    meter = Meter([0.0, 0.0], 0, lambda sums: sums + other, CPU)
    meter.add(torch.tensor([3.0, 3.0], dtype=torch.float64), 4)
    assert meter.read()["loss"] == 103 / 4


def test_it_goes_on_where_a_checkpoint_left_it() -> None:
    unbroken = Meter([0.0, 0.0], 0, lambda sums: sums, CPU)
    unbroken.add(torch.tensor([1.5, 1.0], dtype=torch.float64), 2)
    continued = Meter(unbroken.total(), unbroken.samples, lambda sums: sums, CPU)
    for meter in (unbroken, continued):
        meter.add(torch.tensor([0.5, 0.0], dtype=torch.float64), 2)
    assert continued.read()["loss"] == unbroken.read()["loss"] == 0.5


def test_a_pause_is_not_training_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 10.0, 10.0, 17.0, 18.0, 18.0])  # made, started, pause from 10 to 17, read at 18
    monkeypatch.setattr("trainer.meter.time.perf_counter", lambda: next(clock))
    meter = Meter([0.0, 0.0], 0, lambda sums: sums, CPU)
    meter.start()
    with meter.paused():
        pass
    meter.add(torch.zeros(2, dtype=torch.float64), 1000)
    assert meter.read()["samples_per_second"] == meter.mean_samples_per_second == 1000.0
