"""Tests the TensorBoard tracker by reading its event files with TensorBoard's own reader."""

from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from trainer.tracking.tensorboard import TensorBoardTracker

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # protobuf, in TensorBoard's reader


def read_events(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return events


def read_points(folder: Path) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in read_events(folder).Scalars("train/loss")]


def test_resume_purges_points_after_the_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "tensorboard"
    killed = TensorBoardTracker(folder, first_step=0, warn=print)
    for step in (1, 2, 3):
        killed.log("train", {"loss": float(step)}, step)
    killed.close()
    resumed = TensorBoardTracker(folder, first_step=2, warn=print)
    resumed.log("train", {"loss": 30.0}, 3)
    resumed.close()
    assert read_points(folder) == [(1, 1.0), (2, 2.0), (3, 30.0)]
    restarted = TensorBoardTracker(folder, first_step=0, warn=print)
    restarted.log("train", {"loss": 10.0}, 1)
    restarted.flush()
    assert read_points(folder) == [(1, 10.0)], "on the disk after flush(), before close()"
    restarted.close()


def test_points_have_the_time_of_their_measurement(tmp_path: Path) -> None:
    tracker = TensorBoardTracker(tmp_path, first_step=0, warn=print)
    tracker.log("train", {"loss": 0.5}, 7, wall_time=1.7e9)
    tracker.log("train", {"loss": 0.5}, 8, wall_time=1.7e9 + 0.5)
    tracker.close()
    points = read_events(tmp_path).Scalars("train/loss")
    assert [(point.step, point.wall_time) for point in points] == [(7, 1.7e9), (8, 1.7e9 + 0.5)]


class Untraceable(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        raise TypeError("no tracing")


def test_network_that_cannot_be_traced_is_a_warning(tmp_path: Path) -> None:
    warnings: list[str] = []
    tracker = TensorBoardTracker(tmp_path, first_step=0, warn=warnings.append)
    tracker.on_start(Untraceable(), torch.zeros(1, 1, 8, 8), {})
    tracker.log("train", {"loss": 0.5}, 1)
    tracker.close()
    (warning,) = warnings
    assert "cannot be traced: TypeError: no tracing" in warning
    assert read_points(tmp_path) == [(1, 0.5)]


def test_full_disk_is_one_warning_until_there_is_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    warnings: list[str] = []
    tracker = TensorBoardTracker(tmp_path, first_step=0, warn=warnings.append)
    with monkeypatch.context() as patch:
        patch.setattr("trainer.tracking.tensorboard._MIN_FREE_BYTES", 1 << 62)
        patch.setattr(TensorBoardTracker._write, "__defaults__", (1 << 62,))
        for step in (1, 2):
            tracker.log("train", {"loss": 0.5}, step)
    (warning,) = set(warnings)
    assert "No space left on device" in warning
    tracker.log("train", {"loss": 0.5}, 3)
    tracker.close()
    assert read_points(tmp_path) == [(3, 0.5)]
