"""Time in which a process was suspended does not count."""

import random

import pytest

from trainer.process import awake
from trainer.process.awake import AwakeClock


@pytest.mark.parametrize("seed", range(20))
def test_gap_counts_for_at_most_one_slice(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = random.Random(seed)
    now = [generator.random() * 1e6]
    monkeypatch.setattr(awake.time, "monotonic", lambda: now[0])
    clock, awake_seconds = AwakeClock(2.0), 0.0
    for _ in range(200):
        is_suspended = generator.random() < 0.1
        seconds = generator.uniform(2.0, 1e5) if is_suspended else generator.uniform(0.0, 2.0)
        now[0] += seconds
        awake_seconds += 2.0 if is_suspended else seconds
        assert clock.tick() == pytest.approx(awake_seconds)
