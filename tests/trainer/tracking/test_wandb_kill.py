"""W&B after SIGKILL, which its client cannot prepare for: each row once all the same, lost ones made up for."""

import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from support.local_wandb import MISSING, Server, Values, inspect, logged, sync, values
from support.processes import Ranks

from launch.verify.compare import _OF_THE_CLOCK
from trainer.tracking import wandb_session

FOLDER = Path("runs/x")
LONG = ["--config", "digits", "log.tensorboard=false", "log.report=false", "log.figures=false", "run.name=x"]
LONG += ["data.global_batch_size=8", "train.epochs=1000", "train.threads_per_rank=1", "log.every_steps=20"]
LONG += ["checkpoint.every_steps=700", "checkpoint.every_epochs=0", "eval.every_epochs=3"]
LONG += ["schedule.name=constant", "schedule.warmup_epochs=0"]  # else a longer run is another one


def of_the_run(found: Values) -> Values:
    """Without what the clock says: steps beyond the checkpoint are taken twice, and logged once."""
    return Counter({key: count for key, count in found.items() if key[1].rpartition("/")[2] not in _OF_THE_CLOCK})


def killed_when(ranks: Ranks, has_rows: Callable[[], bool], *asked: str) -> None:
    """Returns when W&B's own process is gone too: left alone it uploads what it has, then ends."""
    (process,) = ranks.start(1, *LONG, *asked)
    until = time.monotonic() + 150
    while not has_rows():
        assert time.monotonic() < until and process.is_alive(), ranks.log.read_text()
        time.sleep(0.05)
    left = psutil.Process(process.pid).children(recursive=True)
    assert left
    os.kill(process.pid, signal.SIGKILL)
    ranks.end([process])
    assert not psutil.wait_procs(left, timeout=150)[1]


def goes_on_for(ranks: Ranks, steps: int, *asked: str) -> None:
    """With so many steps more than it has taken."""
    last = max(step for step, _, _ in logged(FOLDER))
    ranks.run(1, *LONG, *asked, f"train.max_steps={last + steps}")


@pytest.mark.slow
@pytest.mark.skipif(bool(MISSING), reason=MISSING)
def test_an_online_run_that_was_killed_has_each_row_once(server: Server, ranks: Ranks) -> None:
    def has_rows() -> bool:
        return any(run["history"] for run in server.ask("/_/runs").values())

    killed_when(ranks, has_rows, "log.wandb=online")
    before = server.run()["history"]
    goes_on_for(ranks, 100, "log.wandb=online")
    rows = server.run()["history"]
    assert of_the_run(values(rows)) == of_the_run(logged(FOLDER)) and rows[: len(before)] == before
    assert [row["step"] for row in rows] == sorted(row["step"] for row in rows)


@pytest.mark.slow
@pytest.mark.skipif(bool(MISSING), reason=MISSING)
def test_an_offline_run_that_was_killed_has_each_row_once_when_it_is_synced(server: Server, ranks: Ranks) -> None:
    def has_rows() -> bool:
        return any(path.stat().st_size > 1 << 15 for path in (FOLDER / "wandb").glob("offline-run-*/*.wandb"))

    killed_when(ranks, has_rows, "log.wandb=offline")
    goes_on_for(ranks, 100, "log.wandb=offline")
    sessions = sorted((FOLDER / "wandb").glob("offline-run-*"))
    assert len(sessions) == 2 and all(any(row["type"] == "history" for row in inspect(path)) for path in sessions)
    for session in sessions:  # each by its own command, which its start has printed
        sync(server, session)
    assert of_the_run(values(server.run()["history"])) == of_the_run(logged(FOLDER))


def test_lines_beyond_what_wandb_has_are_missing(tmp_path: Path) -> None:
    row = {"step": 4, "train/samples": 80, "train/loss": 0.5, "test/samples": 80, "test/loss": 0.25}
    end = wandb_session.last_position(row)
    lines = tmp_path / "metrics.jsonl"
    lines.write_text(
        '{"split": "train", "step": 4, "samples": 80, "loss": 0.5}\n'
        '{"split": "test", "step": 4, "samples": 80, "loss": 0.25}\n'
        '{"split": "train", "step": 6, "samples": 120, "loss": null}\n'
    )
    assert [(split, step) for split, step, _ in wandb_session.missing_rows(lines, end)] == [("train", 6)]
    assert next(wandb_session.missing_rows(lines, end))[2] == {"samples": 120}
    del row["test/samples"]  # killed between the two rows of a step
    after = wandb_session.last_position(row)
    assert [(split, step) for split, step, _ in wandb_session.missing_rows(lines, after)] == [("test", 4), ("train", 6)]
    assert len(list(wandb_session.missing_rows(lines, wandb_session.last_position({})))) == 3
    assert not list(wandb_session.missing_rows(tmp_path / "none", None))


@pytest.mark.slow
@pytest.mark.skipif(bool(MISSING), reason=MISSING)
def test_offline_and_online_sessions_by_turns_are_one_run_with_each_row_once(server: Server, ranks: Ranks) -> None:
    same = [*LONG, "log.every_steps=5", "eval.every_epochs=0"]
    ranks.run(1, *same, "train.max_steps=20", "log.wandb=offline")
    ranks.run(1, *same, "train.max_steps=40", "log.wandb=online")
    (session,) = (FOLDER / "wandb").glob("offline-run-*")
    sync(server, session)  # later than what came after it: the server's summary goes back
    ranks.run(1, *same, "train.max_steps=60", "log.wandb=online")
    assert of_the_run(values(server.run()["history"])) == of_the_run(logged(FOLDER))
