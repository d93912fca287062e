"""Tests W&B after SIGKILL: the next session logs the lost rows, so each row is in W&B once."""

import os
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from support.local_wandb import (
    MISSING,
    Server,
    ValueCounts,
    metrics_file_values,
    read_rows,
    sync_sessions,
    wandb_values,
)
from support.processes import Ranks

from launch.verify.compare import TIMING_KEYS
from trainer.tracking import wandb_session

FOLDER = Path("runs/x")
SETTINGS = ["--config", "digits", "log.tensorboard=false", "log.report=false", "log.figures=false", "run.name=x"]
SETTINGS += ["data.global_batch_size=8", "train.epochs=1000", "train.threads_per_rank=1", "log.every_steps=20"]
SETTINGS += ["checkpoint.every_steps=700", "checkpoint.every_epochs=0", "eval.every_epochs=3"]
SETTINGS += ["schedule.name=constant", "schedule.warmup_epochs=0"]  # learning rates must not depend on the length


def without_timings(values: ValueCounts) -> ValueCounts:
    """Removes timings: steps after the checkpoint run twice with other timings, but W&B has their first rows."""
    return Counter({key: count for key, count in values.items() if key[1].rpartition("/")[2] not in TIMING_KEYS})


def assert_rows_once(history: list[dict[str, object]]) -> None:
    """Asserts that W&B has the rows of metrics.jsonl once, except for timings."""
    assert without_timings(wandb_values(history)) == without_timings(metrics_file_values(FOLDER))


def kill_when(ranks: Ranks, has_rows: Callable[[], bool], *settings: str) -> None:
    """Starts a run, kills it once has_rows() is true, and waits until W&B's process has uploaded its rows and ended."""
    (process,) = ranks.start(1, *SETTINGS, *settings)
    ranks.wait_until("rows in W&B", has_rows)
    children = psutil.Process(process.pid).children(recursive=True)
    assert children
    os.kill(process.pid, signal.SIGKILL)
    ranks.join([process])
    assert not psutil.wait_procs(children, timeout=150)[1]


def continue_for(ranks: Ranks, steps: int, *settings: str) -> None:
    last_step = max(step for step, _, _ in metrics_file_values(FOLDER))
    ranks.run(1, *SETTINGS, *settings, f"train.max_steps={last_step + steps}")


@pytest.mark.slow
@pytest.mark.skipif(bool(MISSING), reason=MISSING)
def test_killed_online_run_has_each_row_once_after_resume(server: Server, ranks: Ranks) -> None:
    def has_rows() -> bool:
        return any(run["history"] for run in server.request("/_/runs").values())

    kill_when(ranks, has_rows, "log.wandb=online")
    rows_before = server.only_run()["history"]
    continue_for(ranks, 100, "log.wandb=online")
    rows = server.only_run()["history"]
    assert_rows_once(rows)
    assert rows[: len(rows_before)] == rows_before
    assert [row["step"] for row in rows] == sorted(row["step"] for row in rows)


@pytest.mark.slow
@pytest.mark.skipif(bool(MISSING), reason=MISSING)
def test_killed_offline_run_has_each_row_once_after_resume_and_sync(server: Server, ranks: Ranks) -> None:
    def has_rows() -> bool:
        return any(path.stat().st_size > 1 << 15 for path in (FOLDER / "wandb").glob("offline-run-*/*.wandb"))

    kill_when(ranks, has_rows, "log.wandb=offline")
    continue_for(ranks, 100, "log.wandb=offline")
    sessions = sorted((FOLDER / "wandb").glob("offline-run-*"))
    assert len(sessions) == 2 and all(read_rows(session) for session in sessions)
    for session in sessions:  # one command each, as each session printed it
        sync_sessions(server, session)
    assert_rows_once(server.only_run()["history"])


def test_missing_rows_are_the_lines_after_the_last_position(tmp_path: Path) -> None:
    wandb_row = {"step": 4, "train/samples": 80, "train/loss": 0.5, "test/samples": 80, "test/loss": 0.25}
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text(
        '{"split": "train", "step": 4, "samples": 80, "loss": 0.5}\n'
        '{"split": "test", "step": 4, "samples": 80, "loss": 0.25}\n'
        '{"split": "train", "step": 6, "samples": 120, "loss": null}\n'
    )

    def missing(row: dict[str, float]) -> list[tuple[str, int, dict[str, float]]]:
        return list(wandb_session.missing_rows(metrics, wandb_session.last_position(row)))

    assert missing(wandb_row) == [("train", 6, {"samples": 120})]
    del wandb_row["test/samples"]  # killed between the two rows of a step
    assert [(split, step) for split, step, _ in missing(wandb_row)] == [("test", 4), ("train", 6)]
    assert len(missing({})) == 3
    assert not list(wandb_session.missing_rows(tmp_path / "absent", None))


@pytest.mark.slow
@pytest.mark.skipif(bool(MISSING), reason=MISSING)
def test_alternating_offline_and_online_sessions_have_each_row_once(server: Server, ranks: Ranks) -> None:
    settings = [*SETTINGS, "log.every_steps=5", "eval.every_epochs=0"]
    ranks.run(1, *settings, "train.max_steps=20", "log.wandb=offline")
    ranks.run(1, *settings, "train.max_steps=40", "log.wandb=online")
    (session,) = (FOLDER / "wandb").glob("offline-run-*")
    sync_sessions(server, session)  # after the later session, so the server's summary goes back to step 20
    ranks.run(1, *settings, "train.max_steps=60", "log.wandb=online")
    assert_rows_once(server.only_run()["history"])
