"""Tests the W&B tracker offline with the real client, by reading its session files."""

from pathlib import Path

import pytest
from support.local_wandb import read_records, read_rows, read_summary

from trainer.config.load import load_config
from trainer.config.schema import RunConfig
from trainer.errors import UserError
from trainer.run.folder import RunFolder
from trainer.tracking.tracker import GuardedTracker
from trainer.tracking.wandb import WandbTracker

pytestmark = pytest.mark.filterwarnings("ignore")  # warnings of wandb's imports
ROW = {"loss": 0.5, "accuracy": 0.25, "lr": 1e-3}


def config(*overrides: str) -> RunConfig:
    return load_config([], ["run.name=x", *overrides])


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    (tmp_path / "my run").mkdir()
    return RunFolder(tmp_path / "my run")


def only_session(folder: RunFolder) -> Path:
    (session,) = (folder.path / "wandb").glob("offline-run-*")
    return session


def test_offline_session_has_all_rows_and_settings(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    (folder.path / "starts.jsonl").write_text("{}\n{}\n{}\n")
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    settings = ["run.name=sweep/a", "log.wandb=auto", "log.project=p q", "log.tags=[fast, small]", "log.notes=a note"]
    tracker = WandbTracker(config(*settings), folder, "abcd1234", lines.append)
    for step in (10, 20):
        tracker.log("train", ROW, step)
        tracker.log("test", {"accuracy": 0.5}, step)
    tracker.close()
    (line,) = lines
    session = only_session(folder)
    assert line.startswith("W&B: offline (no API key") and f"wandb sync '{session}'" in line, "quoted: it has a blank"
    summary = read_summary(session)
    assert summary["state"] == "finished" and summary["exit_code"] == 0
    assert summary["project"] == "p q" and summary["run_id"] == "abcd1234"
    last = summary["summary"]
    assert last["train/loss"] == 0.5 and last["step"] == 20 and last["test/accuracy"] == 0.5
    assert summary["config"]["optim"]["lr"] == 0.1
    assert summary["config"]["restarts"] == 2 and summary["config"]["slurm"]["job"] == "77"
    metrics = [record["metric"] for record in read_records(session) if record.get("type") == "metric"]
    hidden = {metric.get("name") for metric in metrics if metric["options"].get("hidden")}
    assert {"step", "train/epoch", "test/samples"} <= hidden and "train/loss" not in hidden
    (run,) = [record["run"] for record in read_records(session) if record.get("type") == "run"]
    assert run["run_group"] == "sweep" and run["tags"] == ["fast", "small"] and run["notes"] == "a note"
    assert run["job_type"] == "train"


def test_full_disk_loses_pictures_but_no_metrics(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    warnings: list[str] = []
    tracker = WandbTracker(config("log.wandb=offline"), folder, "abcd1234", warnings.append)
    log = tracker._run.log

    def log_to_full_disk(row: dict[str, object]) -> None:
        if any(not isinstance(value, (int, float)) for value in row.values()):
            raise OSError(28, "No space left on device")
        log(row)

    monkeypatch.setattr(tracker._run, "log", log_to_full_disk)
    tracker.log("test", ROW, 10)
    tracker._pending_row["test/mistakes"] = object()
    tracker.close()
    assert "left out (No space left on device)" in warnings[-1]
    assert read_summary(only_session(folder))["summary"]["test/loss"] == 0.5


class PrivateError(Exception):
    """An error class that is not part of W&B's interface."""


@pytest.mark.parametrize("error", [PrivateError("mailbox closed"), ConnectionResetError("socket closed")])
def test_client_failure_is_one_warning_and_stops_logging_in_this_session(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    warnings: list[str] = []
    wandb = WandbTracker(config("log.wandb=offline", "log.alerts=true"), folder, "abcd1234", warnings.append)
    tracker = GuardedTracker("W&B", wandb, warnings.append)
    tracker.log("train", ROW, 10)
    calls: list[object] = []

    def fail(row: object) -> None:
        calls.append(row)
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(wandb._run, "log", fail)
        tracker.log("train", ROW, 20)
        tracker.log("train", ROW, 30)
    tracker.alert("title", "text", urgent=True)
    tracker.log("train", ROW, 40)
    tracker.close()
    assert len(calls) == 1
    _, warning = warnings
    assert warning == (
        f"W&B has failed ({type(error).__name__}: {error}); this session logs no more to W&B; "
        "metrics.jsonl has every row"
    )
    wandb._run.finish()
    assert [row["step"] for row in read_rows(only_session(folder))] == [10]


@pytest.mark.parametrize("setting", ["log.project=a/b", f"log.tags=[{'t' * 70}]"])
def test_settings_that_wandb_refuses_are_one_line(folder: RunFolder, setting: str) -> None:
    with pytest.raises(UserError, match="W&B refuses this run"):
        WandbTracker(config("log.wandb=offline", setting), folder, "abcd1234", print)
