"""The meter: exact sums, over ranks and over a restart; evaluation is not training time."""

import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from trainer.step import ShardResult, StepOutcome
from trainer.tracking import meter
from trainer.tracking.meter import Meter

CPU = torch.device("cpu")


def made(loss_sum: float, correct: int, samples: int, weight: float = 1.0, skipped: float = 0.0) -> StepOutcome:
    """One shard, whose first samples are predicted right."""
    labels = torch.zeros(samples, dtype=torch.int64)
    logits = torch.stack([(torch.arange(samples) < correct).float(), torch.full((samples,), 0.5)], dim=1)
    return StepOutcome([ShardResult(torch.tensor(loss_sum), logits, labels, weight)], torch.tensor(skipped))


def new(add_ranks: Callable[[Tensor], Tensor] = lambda sums: sums) -> Meter:
    return Meter([0.0] * 3, add_ranks, CPU)


def test_a_reading_is_the_mean_since_the_last_one() -> None:
    found = new()
    for _ in range(2):
        found.add(made(6.0, 1, 2), 2)
        found.add(made(3.0, 1, 1), 1)
        line = found.read()
        assert (line["loss"], line["accuracy"]) == (3.0, pytest.approx(2 / 3))


def test_a_step_that_was_skipped_and_a_shard_without_weight_do_not_count() -> None:
    found = new()
    found.add(made(torch.nan, 4, 4, skipped=1.0), 4)
    found.add(made(8.0, 2, 4), 4)
    found.add(StepOutcome([made(0.0, 1, 1, weight=0.0).results[0], made(2.0, 0, 1).results[0]], torch.tensor(0.0)), 1)
    assert found.total() == [10.0, 2.0, 5.0]
    assert found._outcomes == []
    assert torch.isnan(made(torch.nan, 5, 5, skipped=1.0).loss_sum())


@pytest.mark.parametrize("logits_at_once", [1, 1 << 18])
def test_many_steps_add_up_whenever_they_are_counted(monkeypatch: pytest.MonkeyPatch, logits_at_once: int) -> None:
    monkeypatch.setattr(meter, "_LOGITS_AT_ONCE", logits_at_once)
    found, losses = new(), torch.rand(100, generator=torch.Generator().manual_seed(0))
    for step, loss in enumerate(losses):
        found.add(made(float(loss), step % 3, 3), 3)
    loss_sum, correct, samples = found.total()
    assert loss_sum == float((losses.double() * 2**24).round().sum() / 2**24)
    assert (correct, samples) == (sum(step % 3 for step in range(100)), 300)


def test_shards_of_one_size_are_counted_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """As virtual ranks that do not divide the batch have them: a dozen operations for each would be dear."""
    counts: list[int] = []
    monkeypatch.setattr(meter, "quantize_losses", lambda losses: counts.append(len(losses)) or losses.double())
    found = new()
    for _ in range(4):
        shards = [made(1.0, 1, samples).results[0] for samples in (3, 2, 3, 2)]
        found.add(StepOutcome(shards, torch.tensor(0.0)), 10)
    assert found.total() == [16.0, 16.0, 40.0] and counts == [8, 8]


def test_nothing_is_kept_of_a_slow_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would lie amid the memory that the next step wants."""
    outcome = made(1.0, 1, 2)
    logits = weakref.ref(outcome.results[0].logits)
    found = new()
    found.add(outcome, 2)
    del outcome
    assert logits() is not None
    monkeypatch.setattr(meter, "_SECONDS_AT_ONCE", 0.0)
    found.add(made(1.0, 1, 2), 2)
    assert logits() is None and found.total() == [2.0, 2.0, 4.0]


def test_uneven_ranks_weigh_by_samples_not_by_rank() -> None:
    other = torch.tensor([100.0, 0.0, 1.0], dtype=torch.float64)  # the other rank's sums, of one sample
    found = new(lambda sums: sums + other)
    found.add(made(3.0, 3, 3), 4)
    assert found.read()["loss"] == 103 / 4


def test_it_goes_on_where_a_checkpoint_left_it() -> None:
    unbroken = new()
    unbroken.add(made(1.5, 1, 2), 2)
    continued = Meter(unbroken.total(), lambda sums: sums, CPU)
    for each in (unbroken, continued):
        each.add(made(0.5, 0, 2), 2)
    assert continued.read()["loss"] == unbroken.read()["loss"] == 0.5


def test_a_pause_is_not_training_time(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = 0.0
    monkeypatch.setattr("trainer.tracking.meter.time.perf_counter", lambda: seconds)
    found = new()
    seconds = 10.0
    found.start()
    with found.paused():
        seconds = 17.0
    seconds = 18.0
    found.add(made(0.0, 0, 4), 1000)
    assert found.read()["samples_per_second"] == found.mean_samples_per_second == 1000.0
