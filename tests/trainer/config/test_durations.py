"""Tests when periodic actions are due."""

import pytest

from trainer.config.durations import Durations, steps_per_epoch

DURATIONS = Durations(steps_per_epoch=10, total_steps=45, warmup_steps=0)


@pytest.mark.parametrize(
    ("step", "steps", "every_epochs", "is_due"),
    [
        (0, 19, 2, False),
        (0, 20, 2, True),
        (19, 1, 2, True),
        (20, 19, 2, False),
        (5, 39, 0, False),  # a period of 0 is never due, but the end of the run is
        (5, 40, 0, True),
        (44, 1, 9, True),
    ],
)
def test_action_is_due_within_steps(step: int, steps: int, every_epochs: int, is_due: bool) -> None:
    assert DURATIONS.is_due_within(step, steps, every_epochs) == is_due


@pytest.mark.parametrize(("drop_last", "steps"), [(False, 4), (True, 3)])
def test_steps_per_epoch_with_a_smaller_last_batch(drop_last: bool, steps: int) -> None:
    assert steps_per_epoch(num_samples=100, global_batch_size=30, drop_last=drop_last) == steps
    assert steps_per_epoch(num_samples=90, global_batch_size=30, drop_last=drop_last) == 3
