"""Tests which trackers a run has, and the W&B id of a run."""

import re
from pathlib import Path

import pytest

from trainer.config.load import load_config
from trainer.config.schema import RunConfig
from trainer.errors import FolderError, UserError
from trainer.run.folder import RunFolder
from trainer.tracking.jsonl import MetricsFile
from trainer.tracking.tensorboard import TensorBoardTracker
from trainer.tracking.trackers import build_trackers, wandb_run_id
from trainer.tracking.wandb import WandbTracker


def config(*overrides: str) -> RunConfig:
    return load_config([], ["run.name=x", *overrides])


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    (tmp_path / "run").mkdir()
    return RunFolder(tmp_path / "run")


@pytest.mark.filterwarnings("ignore")  # warnings of wandb's imports
@pytest.mark.parametrize(
    ("settings", "classes"),
    [
        (["log.wandb=off", "log.tensorboard=false"], [MetricsFile]),
        (["log.wandb=off"], [MetricsFile, TensorBoardTracker]),
        (["log.wandb=offline"], [MetricsFile, WandbTracker, TensorBoardTracker]),
    ],
)
def test_settings_select_the_trackers(folder: RunFolder, settings: list[str], classes: list[type]) -> None:
    trackers = build_trackers(config(*settings), folder, 0, "abcd1234", print)
    assert type(trackers[0]) is classes[0]
    assert [type(tracker._tracker) for tracker in trackers[1:]] == classes[1:]  # type: ignore[attr-defined]
    for tracker in trackers:
        tracker.close()


def test_wandb_mode_disabled_builds_no_wandb_tracker(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    (tracker,) = build_trackers(config("log.wandb=auto", "log.tensorboard=false"), folder, 0, "", print)
    tracker.close()
    assert wandb_run_id(config("log.wandb=auto"), folder, checkpoint_run_id="") == ""


def test_wandb_online_with_wandb_mode_disabled_is_refused(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    with pytest.raises(UserError, match="WANDB_MODE=disabled forbids it"):
        wandb_run_id(config("log.wandb=online"), folder, checkpoint_run_id="")


def test_id_is_given_although_it_cannot_be_stored(folder: RunFolder) -> None:
    (folder.path / "wandb").write_text("")  # in place of the folder
    assert re.fullmatch("[0-9a-f]{8}", wandb_run_id(config("log.wandb=offline"), folder, checkpoint_run_id=""))
    assert wandb_run_id(config("log.wandb=offline"), folder, checkpoint_run_id="abcd1234") == "abcd1234"


def test_damaged_id_is_refused_with_its_file(folder: RunFolder) -> None:
    path = folder.path / "wandb" / "run-id"
    path.parent.mkdir()
    path.write_bytes(b"abcd\xff")
    with pytest.raises(FolderError, match=r"wandb/run-id cannot be read as a file of a run .*repair it"):
        wandb_run_id(config("log.wandb=offline"), folder, checkpoint_run_id="")


def test_continued_run_keeps_its_wandb_id(folder: RunFolder) -> None:
    offline, off = config("log.wandb=offline"), config("log.wandb=off")
    path = folder.path / "wandb" / "run-id"
    new_id = wandb_run_id(offline, folder, checkpoint_run_id="")
    assert re.fullmatch("[0-9a-f]{8}", new_id) and wandb_run_id(offline, folder, checkpoint_run_id="") == new_id
    assert wandb_run_id(offline, folder, checkpoint_run_id="abcd1234") == new_id, "the run folder has precedence"
    path.unlink()
    assert wandb_run_id(offline, folder, checkpoint_run_id="abcd1234") == path.read_text() == "abcd1234"
    assert wandb_run_id(off, folder, checkpoint_run_id="") == ""
    assert wandb_run_id(off, folder, checkpoint_run_id="abcd1234") == "abcd1234", "a later session may log again"
