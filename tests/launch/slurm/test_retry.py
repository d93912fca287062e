"""Decisions after an attempt of a job: end, restart or requeue, and the limit of attempts without progress."""

import random
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from launch.slurm.retry import Attempt, JobRecord, decide, describe_clock, newest_checkpoint_step
from trainer.run import stop
from trainer.run.folder import RunFolder

NEW_RECORD = JobRecord("12", None, "12.log")
USR1, TERM = signal.SIGUSR1, signal.SIGTERM
LONG = Attempt(seconds=1800.0, seconds_left=3600.0)


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
        ((75, stop.LAUNCHER_END), 1, None, "restart", 1),  # on another node
        ((75, stop.LAUNCHER_END), 137, None, "restart", 137),
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
    decision = decide(outcome, code, received, NEW_RECORD, step=50, limit=3, attempt=LONG)
    assert (decision.action, decision.code) == (action, exit_code)


def test_preempted_job_with_grace_time_is_requeued() -> None:
    """SLURM signals the ranks but not the job itself."""
    for outcome in ((75, "SIGTERM"), None):
        decision = decide(outcome, 1, None, NEW_RECORD, step=50, limit=3, attempt=Attempt(5.0), is_preempted=True)
        assert (decision.action, decision.reason) == ("requeue", "another job gets these nodes, at step 50")


def test_job_gives_up_after_attempts_without_progress() -> None:
    record, actions = NEW_RECORD, []
    for step in (0, 0, 50, 50, 60, 60, 60, 60):
        decision = decide(None, 1, None, record, step, limit=3, attempt=LONG)
        record = decision.record
        actions.append(decision.action)
    assert actions == ["restart"] * 7 + ["end"]
    assert record.attempts == 8 and record.without_progress == 3
    assert "giving up after 3 attempts in a row without progress (newest checkpoint: step 60)" in decision.reason


def test_attempt_that_slurm_cuts_short_is_not_counted() -> None:
    record = replace(NEW_RECORD, without_progress=2)
    assert decide((75, "SIGTERM"), 1, TERM, record, 0, limit=3, attempt=LONG).record.without_progress == 2
    assert decide((75, "SIGUSR1"), 1, USR1, record, 0, limit=3, attempt=LONG).action == "end"


def test_record_of_another_job_is_ignored(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    replace(NEW_RECORD, attempts=2, without_progress=1, step=7).write(folder)
    assert JobRecord.load(folder, "12", None, "12.log").without_progress == 1
    assert JobRecord.load(folder, "13", None, "13.log") == JobRecord("13", None, "13.log")


def test_record_of_this_job_gets_the_log_that_slurm_names(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    replace(NEW_RECORD, attempts=2).write(folder)
    assert JobRecord.load(folder, "12", None, "/other.log") == replace(NEW_RECORD, attempts=2, log="/other.log")
    assert JobRecord.load(folder, "12", None, "").log == "12.log"


@pytest.mark.parametrize(
    ("text", "is_damaged"),
    [
        ('{"job_id": "12"}', False),
        ('{"job_id": "12", "step": null, "attempts": null}', False),
        ('{"job_id": "12", "step": "many"}', True),
        ('{"job_id": "12", "attempts": {}}', True),
        ('{"job_id": "12", "without_progress": 1.5}', True),
        ("{", True),
        ("", True),
    ],
)
def test_damaged_record_is_replaced_with_one_note(
    text: str, is_damaged: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "job.json").write_text(text)
    (tmp_path / "checkpoints" / "step-00000090").mkdir(parents=True)
    assert JobRecord.load(RunFolder(tmp_path), "12", None, "12.log") == replace(NEW_RECORD, step=90)
    error = capsys.readouterr().err
    assert error.count("\n") == is_damaged and ("job.json" in error) == is_damaged


def test_new_record_starts_at_the_newest_checkpoint(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    folder.write_json("status.json", {"state": "failed", "step": 190, "reason": "no checkpoint of this step exists"})
    for step in (80, 90):
        (folder.checkpoints / f"step-{step:08}").mkdir(parents=True)
    (folder.checkpoints / "step-00000100.partial").mkdir()
    assert newest_checkpoint_step(folder) == 90
    assert JobRecord.load(folder, "13", None, "13.log") == JobRecord("13", None, "13.log", step=90)


def attempts_until_the_end(
    outcome: tuple[int, str] | None, received: signal.Signals | None, steps: list[int], attempt: Attempt
) -> tuple[int, str]:
    """Returns after how many attempts the job ends, and the reason; 0 if it does not end."""
    record = NEW_RECORD
    for number, step in enumerate(steps, start=1):
        decision = decide(outcome, 1, received, record, step, limit=3, attempt=attempt)
        record = decision.record
        if decision.action == "end":
            return number, decision.reason
    return 0, ""


@pytest.mark.parametrize(
    ("outcome", "received", "attempt", "ends_after"),
    [
        # The ranks stop after one step, because their clock says that the job is over.
        ((75, stop.JOB_END), None, Attempt(9.0, 1790.0, 7200.0), 3),
        ((75, stop.JOB_END), None, Attempt(200.0, 1790.0, None), 3),  # the start alone takes minutes
        ((75, stop.JOB_END), None, Attempt(1600.0, 1790.0, 0.0), 0),
        # SLURM's warning comes at once, or after a fair part of the time.
        ((75, "SIGUSR1"), USR1, Attempt(12.0, 115.0, 0.0), 3),
        ((75, "SIGUSR1"), USR1, Attempt(60.0, 175.0, 0.0), 0),
        ((75, "SIGUSR1"), USR1, Attempt(400.0, 86400.0, 0.0), 0),
        # A rank dies again and again: at once, or after hours of work.
        (None, None, Attempt(30.0, 86400.0, 0.0), 3),
        (None, None, Attempt(30.0, None, None), 3),
        (None, None, Attempt(7200.0, 86400.0, 0.0), 0),
    ],
)
def test_attempt_that_ends_at_once_is_no_progress_although_it_saves_a_step(
    outcome: tuple[int, str] | None, received: signal.Signals | None, attempt: Attempt, ends_after: int
) -> None:
    number, reason = attempts_until_the_end(outcome, received, list(range(1, 12)), attempt)
    assert number == ends_after
    if ends_after:
        assert f"the last one ended after {attempt.seconds:.0f} s" in reason and reason.count("\n") == 0
        assert ("7,200 s ahead of the controller's" in reason) == (attempt.clock_offset == 7200.0)


def test_sentence_on_a_clock() -> None:
    assert describe_clock("n1", -90.0) == "the clock of n1 is 90 s behind the controller's"
    assert describe_clock("n1", 7200.4) == "the clock of n1 is 7,200 s ahead of the controller's"
    assert describe_clock("n1", 59.0) == "the clock of n1 agrees with the controller's"


@pytest.mark.parametrize("seed", range(20))
def test_job_never_starts_more_often_in_a_row_than_its_limit_without_progress(seed: int) -> None:
    draw = random.Random(seed)
    limit, record, step, in_a_row = draw.randint(1, 5), NEW_RECORD, 0, 0
    for _ in range(200):
        outcome, received = draw.choice(
            [(None, None), (None, USR1), ((75, "SIGUSR1"), USR1), ((75, stop.JOB_END), None), ((75, "SIGTERM"), TERM)]
        )
        attempt = Attempt(draw.choice([1.0, 30.0, 5000.0]), draw.choice([None, 100.0, 9000.0]))
        is_newer = draw.random() < 0.4
        step += is_newer
        decision = decide(outcome, 1, received, record, step, limit, attempt)
        record = decision.record
        is_cut_short = received == TERM
        has_worked = is_newer and (is_cut_short or not attempt.was_short)
        has_worked &= not (outcome == (75, stop.JOB_END) and attempt.ended_before_its_time)
        in_a_row = 0 if has_worked else in_a_row + (not is_cut_short)
        assert record.without_progress == in_a_row
        if not is_cut_short:
            assert (decision.action == "end") == (in_a_row >= limit)
        if in_a_row >= limit:
            break
