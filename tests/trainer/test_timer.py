"""Tests the GPU timer with a fake clock in place of CUDA events."""

import pytest
import torch

from trainer import timer
from trainer.timer import GpuTimer, build_timer


class FakeEvent:
    """A CUDA event on a GPU that has finished its work up to `finished_until`."""

    now, finished_until = 0.0, 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.seconds = FakeEvent.now

    def query(self) -> bool:
        return self.seconds <= FakeEvent.finished_until

    def synchronize(self) -> None:
        FakeEvent.finished_until = max(FakeEvent.finished_until, self.seconds)

    def elapsed_time(self, other: "FakeEvent") -> float:
        """Returns milliseconds."""
        assert self.query() and other.query()
        return (other.seconds - self.seconds) * 1000


def test_gpu_timer_waits_for_the_gpu_only_when_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    gpu_timer = build_timer(torch.device("cuda"))
    assert isinstance(gpu_timer, GpuTimer)
    for step in range(200):
        gpu_timer.begin()
        FakeEvent.now += 0.25
        gpu_timer.end()
        FakeEvent.now += 0.5
        if step == 150:
            assert FakeEvent.finished_until == 0 and len(gpu_timer._pending) == 151
            FakeEvent.finished_until = FakeEvent.now
    assert len(gpu_timer._pending) == timer._MAX_PENDING_SECTIONS, "finished sections are dropped before the next read"
    assert gpu_timer.read() == 50.0 and gpu_timer.read() == 0.0
