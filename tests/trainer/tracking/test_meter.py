"""Tests the meter: exact sums over ranks and over a resume, and pauses of the clock."""

import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from trainer.step import ShardResult, StepOutcome
from trainer.tracking import meter as meter_module
from trainer.tracking.meter import Meter

CPU = torch.device("cpu")


def outcome(loss_sum: float, correct: int, samples: int, weight: float = 1.0, skipped: float = 0.0) -> StepOutcome:
    """Returns the outcome of a step with one shard, whose first `correct` samples are predicted correctly."""
    labels = torch.zeros(samples, dtype=torch.int64)
    logits = torch.stack([(torch.arange(samples) < correct).float(), torch.full((samples,), 0.5)], dim=1)
    return StepOutcome([ShardResult(torch.tensor(loss_sum), logits, labels, weight)], torch.tensor(skipped))


def new_meter(sum_over_ranks: Callable[[Tensor], Tensor] = lambda sums: sums) -> Meter:
    return Meter([0.0] * 3, sum_over_ranks, CPU)


def test_reading_is_the_mean_since_the_last_reading() -> None:
    meter = new_meter()
    for _ in range(2):
        meter.add(outcome(6.0, 1, 2), 2)
        meter.add(outcome(3.0, 1, 1), 1)
        metrics = meter.read()
        assert (metrics["loss"], metrics["accuracy"]) == (3.0, pytest.approx(2 / 3))


def test_skipped_step_and_shard_of_weight_zero_do_not_count() -> None:
    meter = new_meter()
    meter.add(outcome(torch.nan, 4, 4, skipped=1.0), 4)
    meter.add(outcome(8.0, 2, 4), 4)
    shards = [outcome(0.0, 1, 1, weight=0.0).results[0], outcome(2.0, 0, 1).results[0]]
    meter.add(StepOutcome(shards, torch.tensor(0.0)), 1)
    assert meter.window_sums() == [10.0, 2.0, 5.0]
    assert meter._outcomes == []
    assert torch.isnan(outcome(torch.nan, 5, 5, skipped=1.0).loss_sum())


@pytest.mark.parametrize("logits_per_group", [1, 1 << 18])
def test_sums_do_not_depend_on_the_group_size(monkeypatch: pytest.MonkeyPatch, logits_per_group: int) -> None:
    monkeypatch.setattr(meter_module, "_LOGITS_PER_GROUP", logits_per_group)
    meter, losses = new_meter(), torch.rand(100, generator=torch.Generator().manual_seed(0))
    for step, loss in enumerate(losses):
        meter.add(outcome(float(loss), step % 3, 3), 3)
    loss_sum, correct, samples = meter.window_sums()
    assert loss_sum == float((losses.double() * 2**24).round().sum() / 2**24)
    assert (correct, samples) == (sum(step % 3 for step in range(100)), 300)


def test_shards_of_equal_size_are_counted_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Virtual ranks that do not divide the batch have two shard sizes; a dozen operations for each shard are slow."""
    group_sizes: list[int] = []

    def quantize(losses: Tensor) -> Tensor:
        group_sizes.append(len(losses))
        return losses.double()

    monkeypatch.setattr(meter_module, "quantize_losses", quantize)
    meter = new_meter()
    for _ in range(4):
        shards = [outcome(1.0, 1, samples).results[0] for samples in (3, 2, 3, 2)]
        meter.add(StepOutcome(shards, torch.tensor(0.0)), 10)
    assert meter.window_sums() == [16.0, 16.0, 40.0] and group_sizes == [8, 8]


def test_slow_step_frees_its_logits_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits that stay alive lie between blocks of memory that the next step needs."""
    first = outcome(1.0, 1, 2)
    logits = weakref.ref(first.results[0].logits)
    meter = new_meter()
    meter.add(first, 2)
    del first
    assert logits() is not None
    monkeypatch.setattr(meter_module, "_SECONDS_PER_GROUP", 0.0)
    meter.add(outcome(1.0, 1, 2), 2)
    assert logits() is None and meter.window_sums() == [2.0, 2.0, 4.0]


def test_mean_over_uneven_ranks_weights_samples() -> None:
    other_rank = torch.tensor([100.0, 0.0, 1.0], dtype=torch.float64)  # sums of one sample
    meter = new_meter(lambda sums: sums + other_rank)
    meter.add(outcome(3.0, 3, 3), 4)
    assert meter.read()["loss"] == 103 / 4


def test_meter_continues_from_sums_of_a_checkpoint() -> None:
    uninterrupted = new_meter()
    uninterrupted.add(outcome(1.5, 1, 2), 2)
    resumed = Meter(uninterrupted.window_sums(), lambda sums: sums, CPU)
    for meter in (uninterrupted, resumed):
        meter.add(outcome(0.5, 0, 2), 2)
    assert resumed.read()["loss"] == uninterrupted.read()["loss"] == 0.5


def test_pause_is_not_training_time(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = 0.0
    monkeypatch.setattr("trainer.tracking.meter.time.perf_counter", lambda: seconds)
    meter = new_meter()
    seconds = 10.0
    meter.start()
    with meter.paused():
        seconds = 17.0
    seconds = 18.0
    meter.add(outcome(0.0, 0, 4), 1000)
    assert meter.read()["samples_per_second"] == meter.mean_samples_per_second == 1000.0
