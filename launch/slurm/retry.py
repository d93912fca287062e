"""Decides after each attempt of a job whether the job ends, restarts the ranks, or goes back into the queue.

Restarts are unlimited while the run makes progress; attempts in a row without progress are limited. Progress is a newer
checkpoint after a fair part of the time that the attempt had. An attempt that saves a step and ends at once, although
hours are left, has made none: it would be repeated without end.
"""

import math
import signal
import sys
from dataclasses import dataclass, replace
from typing import Literal

from trainer.errors import FolderError
from trainer.run import stop
from trainer.run.folder import RunFolder
from trainer.run.record import RunRecord
from trainer.text.escape import escape

STOPPED = 75
_COUNTS = ("attempts", "without_progress", "step")
CLOCK_SKEW_SECONDS = 60.0
_AT_ONCE_SECONDS, _SHORT_SECONDS, _SHORT_FRACTION = 20.0, 300.0, 0.1


@dataclass(frozen=True, slots=True)
class JobRecord:
    """The state that a job keeps between attempts, in job.json of the run folder."""

    job_id: str
    array_task: int | None
    log: str
    """path of the file with the job's output"""
    attempts: int = 0
    without_progress: int = 0
    """number of latest attempts in a row that ended early without progress"""
    step: int = 0
    """step of the newest checkpoint when the last attempt ended"""

    def write(self, folder: RunFolder) -> None:
        """Writes job.json. Raises FolderError when the folder cannot be created or written."""
        from trainer.run.files import write_error

        try:
            folder.path.mkdir(parents=True, exist_ok=True)
            folder.write_json("job.json", {name: getattr(self, name) for name in self.__slots__})
        except OSError as error:
            raise write_error(f"job.json in {folder.path}", error) from None

    @classmethod
    def load(cls, folder: RunFolder, job_id: str, array_task: int | None, log: str) -> "JobRecord":
        """Returns the record of this job, or a new one when the folder has none, a damaged one or that of another job.

        Prints a line about a damaged record: it must not cost the job.
        """
        new = cls(job_id, array_task, log, step=newest_checkpoint_step(folder))
        try:
            record = RunRecord(folder.path).job_file
        except FolderError as error:
            print(f"samecurve: {escape(error)}; the job counts its attempts anew", file=sys.stderr, flush=True)
            return new
        if record.get("job_id") != job_id:
            return new
        counts = {name: record[name] for name in _COUNTS if record.get(name) is not None}
        return replace(new, log=log or record.get("log") or "", **counts)


def newest_checkpoint_step(folder: RunFolder) -> int:
    """Returns the step in the name of the newest checkpoint; 0 without one."""
    names = [path.name for path in folder.checkpoints.glob("step-*")] if folder.checkpoints.is_dir() else []
    return max((int(name[5:]) for name in names if name[5:].isdecimal()), default=0)


@dataclass(frozen=True, slots=True)
class Attempt:
    """How long an attempt took, and what was left of its job when it began."""

    seconds: float
    seconds_left: float | None = None
    """until the end of the job, by the controller's clock; None: no limit, or unknown"""
    clock_offset: float | None = None
    """seconds by which the clock of the first node is ahead of the controller's; None: unknown"""

    @property
    def was_short(self) -> bool:
        """Whether the attempt ended long before it had to."""
        left = math.inf if self.seconds_left is None else self.seconds_left
        return self.seconds < max(_AT_ONCE_SECONDS, min(_SHORT_SECONDS, _SHORT_FRACTION * left))

    @property
    def ended_before_its_time(self) -> bool:
        """Whether half of the job's time was left."""
        return self.seconds_left is not None and self.seconds < self.seconds_left / 2

    def __str__(self) -> str:
        left = "" if self.seconds_left is None else f", when {self.seconds_left:,.0f} s of the job's time were left"
        clock = "" if self.clock_offset is None else f"; {describe_clock('the first node', self.clock_offset)}"
        return f"the last one ended after {self.seconds:,.0f} s{left}{clock}"


def describe_clock(name: str, offset: float) -> str:
    """Returns a sentence on a clock. offset: seconds ahead of the controller's."""
    if abs(offset) < CLOCK_SKEW_SECONDS:
        return f"the clock of {name} agrees with the controller's"
    return f"the clock of {name} is {abs(offset):,.0f} s {'ahead of' if offset > 0 else 'behind'} the controller's"


@dataclass(frozen=True, slots=True)
class Decision:
    """What the job does next, its exit code, the reason for the log, and the updated record."""

    action: Literal["end", "restart", "requeue"]
    code: int
    reason: str
    record: JobRecord


def decide(
    outcome: tuple[int, str] | None,
    code: int,
    received: signal.Signals | None,
    record: JobRecord,
    step: int,
    limit: int,
    attempt: Attempt,
    is_preempted: bool = False,
) -> Decision:
    """Returns the decision after an attempt.

    outcome: exit code and reason that the ranks wrote (trainer/run/exit.py); None: they wrote nothing.
    code: exit code of the command that ran the ranks.
    received: the signal that the job received, if any.
    step: step of the newest checkpoint now.
    limit: number of attempts without progress after which the job gives up.
    attempt: its times.
    is_preempted: whether SLURM is about to give the nodes to another job.
    """
    was_cut_short = received == signal.SIGTERM  # SLURM sent it, so the run is not at fault
    is_job_end = outcome is not None and outcome[1] == stop.JOB_END
    # SLURM chooses when it sends SIGTERM and when it preempts, so these attempts may be short.
    ended_too_early = attempt.was_short and not was_cut_short and not is_preempted
    has_progress = step > record.step and not ended_too_early and not (is_job_end and attempt.ended_before_its_time)
    stuck = 0 if has_progress else record.without_progress + (not was_cut_short)
    record = replace(record, attempts=record.attempts + 1, without_progress=stuck, step=max(step, record.step))
    if outcome is not None and outcome[0] in (0, 2):
        reason = "finished" if outcome[0] == 0 else f"a restart would fail again: {outcome[1]}"
        return Decision("end", outcome[0], reason, record)
    if was_cut_short:
        saved = "SLURM ends this job (scancel, preemption or scontrol requeue); the ranks saved a checkpoint"
        reason = saved if outcome else "SLURM ended this job before the ranks saved a checkpoint"
        return Decision("end", STOPPED, reason, record)
    # With a grace time, SLURM signals a preemption to the ranks at once but to this job only after the grace time.
    time_is_over = received == signal.SIGUSR1 or is_preempted or is_job_end
    # Neither the end of the launcher nor launch/signals.py's SIGTERM to its ranks is a stop that the user requested.
    is_orphaned = outcome is not None and (outcome[1] == stop.LAUNCHER_END or (outcome[1] == "SIGTERM" and code >= 128))
    if not time_is_over and not is_orphaned and (outcome is not None or received is not None):
        cause = outcome[1] if outcome else signal.Signals(received or 0).name
        return Decision("end", STOPPED, f"stopped by {cause}", record)
    reason = "the time of this job is over" if time_is_over else f"the ranks ended early (exit code {code})"
    reason = "another job gets these nodes" if is_preempted else reason
    if stuck >= limit:
        reason += f"; giving up after {stuck} attempts in a row without progress (newest checkpoint: step {step:,})"
        reason += f"; {attempt}"
        return Decision("end", code or 1, reason, record)
    return Decision("requeue" if time_is_over else "restart", code or STOPPED, f"{reason}, at step {step:,}", record)
