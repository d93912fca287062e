"""Decisions after an attempt of a job: end, restart or requeue, and the limit of attempts without progress."""

import signal
from dataclasses import replace
from pathlib import Path

import pytest

from launch.slurm.retry import JobRecord, decide, newest_checkpoint_step
from trainer.run import stop
from trainer.run.folder import RunFolder

NEW_RECORD = JobRecord("12", None, "12.log")
USR1, TERM = signal.SIGUSR1, signal.SIGTERM


@pytest.mark.parametrize(
    ("outcome", "code", "received", "action", "exit_code"),
    [
        ((0, ""), 0, None, "end", 0),
        ((0, ""), 1, USR1, "end", 0),  # the run finished while SLURM's warning was on its way
        ((2, "optim.lr=-1: wanted more than 0"), 1, None, "end", 2),
        ((2, "4 steps in a row were not finite"), 1, USR1, "end", 2),
        ((75, "SIGUSR1"), 1, USR1, "requeue", 1),
        ((75, stop.JOB_END), 0, None, "requeue", 75),
        ((75, "the time limit"), 0, None, "end", 75),  # the run's own limit, which the user set
        ((75, "the file `stop` in the run folder"), 0, None, "end", 75),
        ((75, "SIGTERM"), 1, TERM, "end", 75),  # SLURM requeues the job itself, if it is to be requeued
        ((75, "SIGTERM"), 1, None, "end", 75),  # from a person, by scancel --signal=TERM
        ((75, "SIGTERM"), 137, None, "restart", 137),  # torchrun was killed, and its orphaned ranks saved
        ((75, "SIGUSR1"), 1, signal.SIGINT, "end", 75),  # from a person, by scancel --batch --signal=INT
        (None, 130, signal.SIGINT, "end", 75),
        (None, 143, TERM, "end", 75),
        (None, 1, None, "restart", 1),
        (None, 1, USR1, "requeue", 1),  # before the ranks handled signals
    ],
)
def test_decision_after_outcome_and_signal(
    outcome: tuple[int, str] | None, code: int, received: signal.Signals | None, action: str, exit_code: int
) -> None:
    decision = decide(outcome, code, received, NEW_RECORD, step=50, limit=3)
    assert (decision.action, decision.code) == (action, exit_code)


def test_preempted_job_with_grace_time_is_requeued() -> None:
    """SLURM signals the ranks but not the job itself."""
    for outcome in ((75, "SIGTERM"), None):
        decision = decide(outcome, 1, None, NEW_RECORD, step=50, limit=3, is_preempted=True)
        assert (decision.action, decision.reason) == ("requeue", "another job gets these nodes, at step 50")


def test_job_gives_up_after_attempts_without_progress() -> None:
    record, actions = NEW_RECORD, []
    for step in (0, 0, 50, 50, 60, 60, 60, 60):
        decision = decide(None, 1, None, record, step, limit=3)
        record = decision.record
        actions.append(decision.action)
    assert actions == ["restart"] * 7 + ["end"]
    assert record.attempts == 8 and record.without_progress == 3
    assert decision.reason.endswith("giving up after 3 attempts in a row without a checkpoint newer than step 60")


def test_attempt_that_slurm_cuts_short_is_not_counted() -> None:
    record = replace(NEW_RECORD, without_progress=2)
    assert decide((75, "SIGTERM"), 1, TERM, record, 0, limit=3).record.without_progress == 2
    assert decide((75, "SIGUSR1"), 1, USR1, record, 0, limit=3).action == "end"


def test_record_of_another_job_is_ignored(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    replace(NEW_RECORD, attempts=2, without_progress=1, step=7).write(folder)
    assert JobRecord.load(folder, "12", None, "12.log").without_progress == 1
    assert JobRecord.load(folder, "13", None, "13.log") == JobRecord("13", None, "13.log")


def test_new_record_starts_at_the_newest_checkpoint(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    folder.write_json("status.json", {"state": "failed", "step": 190, "reason": "no checkpoint of this step exists"})
    for step in (80, 90):
        (folder.checkpoints / f"step-{step:08}").mkdir(parents=True)
    (folder.checkpoints / "step-00000100.partial").mkdir()
    assert newest_checkpoint_step(folder) == 90
    assert JobRecord.load(folder, "13", None, "13.log") == JobRecord("13", None, "13.log", step=90)
