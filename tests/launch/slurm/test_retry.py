"""What a job does after an attempt: ends, starts the ranks again, or is queued again - and not for ever."""

import signal
from dataclasses import replace
from pathlib import Path

import pytest

from launch.slurm.retry import JobRecord, decide, newest_checkpoint_step
from trainer.run import stop
from trainer.run.folder import RunFolder

NEW = JobRecord("12", None, "12.log")
USR1, TERM = signal.SIGUSR1, signal.SIGTERM


@pytest.mark.parametrize(
    ("found", "code", "received", "action", "exit_code"),
    [
        ((0, ""), 0, None, "end", 0),
        ((0, ""), 1, USR1, "end", 0),  # finished while the warning was on its way
        ((2, "optim.lr=-1: wanted more than 0"), 1, None, "end", 2),
        ((2, "4 steps in a row were not finite"), 1, USR1, "end", 2),
        ((75, "SIGUSR1"), 1, USR1, "requeue", 1),
        ((75, stop.JOB_END), 0, None, "requeue", 75),
        ((75, "the time limit"), 0, None, "end", 75),  # the run's own, which its user has set
        ((75, "the file `stop` in the run folder"), 0, None, "end", 75),
        ((75, "SIGTERM"), 1, TERM, "end", 75),  # SLURM queues it again by itself, or was told not to
        ((75, "SIGTERM"), 1, None, "end", 75),  # a person, by scancel --signal=TERM
        ((75, "SIGTERM"), 137, None, "again", 137),  # a torchrun was killed, and the ranks it left have saved
        ((75, "SIGUSR1"), 1, signal.SIGINT, "end", 75),  # a person, by scancel --batch --signal=INT
        (None, 130, signal.SIGINT, "end", 75),
        (None, 143, TERM, "end", 75),
        (None, 1, None, "again", 1),
        (None, 1, USR1, "requeue", 1),  # before the ranks could listen
    ],
)
def test_what_is_next(
    found: tuple[int, str] | None, code: int, received: signal.Signals | None, action: str, exit_code: int
) -> None:
    then = decide(found, code, received, NEW, step=50, limit=3)
    assert (then.action, then.code) == (action, exit_code)


def test_a_preempted_job_with_a_grace_time_is_queued_again() -> None:
    """The ranks are told, the job itself is not."""
    for found in ((75, "SIGTERM"), None):
        then = decide(found, 1, None, NEW, step=50, limit=3, is_preempted=True)
        assert (then.action, then.why) == ("requeue", "another job gets these nodes, at step 50")


def test_attempts_without_progress_come_to_an_end() -> None:
    record, actions = NEW, []
    for step in (0, 0, 50, 50, 60, 60, 60, 60):
        then = decide(None, 1, None, record, step, limit=3)
        record = then.record
        actions.append(then.action)
    assert actions == ["again"] * 7 + ["end"]
    assert record.attempts == 8 and record.without_progress == 3 and "3 times in a row" in then.why


def test_what_slurm_cuts_short_is_not_counted() -> None:
    assert decide((75, "SIGTERM"), 1, TERM, replace(NEW, without_progress=2), 0, limit=3).record.without_progress == 2
    assert decide((75, "SIGUSR1"), 1, USR1, replace(NEW, without_progress=2), 0, limit=3).action == "end"


def test_a_job_remembers_its_own_attempts_alone(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    replace(NEW, attempts=2, without_progress=1, step=7).write(folder)
    assert JobRecord.of(folder, "12", None, "12.log").without_progress == 1
    folder.write_json("status.json", {"state": "failed", "step": 190, "reason": "no checkpoint of that step"})
    for step in (80, 90):
        (folder.checkpoints / f"step-{step:08}").mkdir(parents=True)
    (folder.checkpoints / "step-00000100.partial").mkdir()
    assert newest_checkpoint_step(folder) == 90
    assert JobRecord.of(folder, "13", None, "13.log") == JobRecord("13", None, "13.log", step=90)
