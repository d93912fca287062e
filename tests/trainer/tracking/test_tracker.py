"""Tests that a failing tracker does not fail a run."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from trainer.config.load import load_config
from trainer.run.folder import RunFolder
from trainer.tracking import trackers
from trainer.tracking.jsonl import MetricsFile
from trainer.tracking.tracker import GuardedTracker, Tracker

SUMMARY = {"steps": 1, "seconds": 1.0, "test": {"accuracy": 1.0, "loss": 0.0}}


class Failing(Tracker):
    """Raises an error in one of its methods, and counts the calls of `log`."""

    def __init__(self, method: str) -> None:
        self.logged = 0
        setattr(self, method, self._fail)

    def _fail(self, *_: object, **__: object) -> None:
        raise LookupError("a private\nerror")

    def log(self, split: str, scalars: dict[str, float], step: int, wall_time: float | None = None) -> None:
        self.logged += 1


CALLS: dict[str, Callable[[Tracker], None]] = {
    "log": lambda tracker: tracker.log("train", {"loss": 1.0}, 1),
    "on_start": lambda tracker: tracker.on_start(nn.Identity(), torch.zeros(1, 1, 2, 2), {}),
    "log_media": lambda tracker: tracker.log_media(None),  # type: ignore[arg-type]
    "alert": lambda tracker: tracker.alert("title", "text", urgent=True),
    "log_summary": lambda tracker: tracker.log_summary({}, SUMMARY, Path("weights")),
    "flush": lambda tracker: tracker.flush(),
    "close": lambda tracker: tracker.close(),
}


@pytest.mark.parametrize("method", CALLS)
def test_error_of_a_tracker_becomes_one_line_and_ends_its_calls(method: str) -> None:
    lines: list[str] = []
    tracker = Failing(method)
    guarded = GuardedTracker("W&B", tracker, lines.append)
    for _ in range(2):
        CALLS[method](guarded)
    guarded.log("train", {"loss": 1.0}, 2)
    assert len(lines) == 1 and "W&B has failed (LookupError: a private error)" in lines[0] and tracker.logged == 0


@pytest.mark.filterwarnings("ignore")  # warnings of wandb's imports
def test_tracker_that_cannot_start_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("Could not determine home directory")

    monkeypatch.setattr(trackers, "WandbTracker", fail)
    lines: list[str] = []
    config = load_config([], ["run.name=x", "log.wandb=auto", "log.tensorboard=false"])
    (tracker,) = trackers.build_trackers(config, RunFolder(tmp_path), 0, "abcd1234", lines.append)
    tracker.close()
    assert isinstance(tracker, MetricsFile) and "W&B has failed (RuntimeError: Could not determine" in lines[0]


@pytest.mark.parametrize("problem", ["file", "no access"])
def test_unusable_tensorboard_folder_costs_only_tensorboard(
    problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if problem == "file":
        (tmp_path / "tensorboard").write_text("")
    else:
        monkeypatch.setattr(os, "access", lambda *_: False)  # for root every folder is writable
    lines: list[str] = []
    config = load_config([], ["run.name=x", "log.wandb=off"])
    metrics, tensorboard = trackers.build_trackers(config, RunFolder(tmp_path), 0, "", lines.append)
    for tracker in (metrics, tensorboard):
        tracker.log("train", {"loss": 1.0}, 1)
        tracker.flush()
        tracker.close()
    assert len(lines) == 1 and "tensorboard cannot be written" in lines[0]
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["loss"] == 1.0
