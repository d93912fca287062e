"""How an attempt of a job ended in, what to do next out: end, start the ranks again, or queue the job again.

A run may be started any number of times as long as it comes further; so many attempts without a new checkpoint end it.
"""

import signal
from dataclasses import dataclass, replace
from typing import Any, Literal

from trainer.run import stop
from trainer.run.folder import RunFolder

STOPPED = 75


@dataclass(frozen=True, slots=True)
class JobRecord:
    """What a job remembers from attempt to attempt, in job.json of the run folder."""

    job_id: str
    array_task: int | None
    log: str
    """path of the job's output"""
    attempts: int = 0
    without_progress: int = 0
    """attempts in a row, so far, that ended early and left no newer checkpoint"""
    step: int = 0
    """of the newest checkpoint when the last attempt ended"""

    def write(self, folder: RunFolder) -> None:
        """Raises FolderError when the folder cannot be made or written."""
        from trainer.run.files import write_error

        try:
            folder.path.mkdir(parents=True, exist_ok=True)
            folder.write_json("job.json", {name: getattr(self, name) for name in self.__slots__})
        except OSError as error:
            raise write_error(f"job.json in {folder.path}", error) from None

    @classmethod
    def of(cls, folder: RunFolder, job_id: str, array_task: int | None, log: str) -> "JobRecord":
        """That of this job, or a new one when the folder has another's."""
        found: Any = folder.read_json("job.json")
        if found is None or found.get("job_id") != job_id:
            return cls(job_id, array_task, log, step=newest_checkpoint_step(folder))
        return cls(**{name: found[name] for name in cls.__slots__ if name in found})


def newest_checkpoint_step(folder: RunFolder) -> int:
    """The step of the newest checkpoint, by its name; 0 where there is none."""
    names = [path.name for path in folder.checkpoints.glob("step-*")] if folder.checkpoints.is_dir() else []
    return max((int(name[5:]) for name in names if name[5:].isdecimal()), default=0)


@dataclass(frozen=True, slots=True)
class Decision:
    action: Literal["end", "again", "requeue"]
    code: int
    why: str
    record: JobRecord


def decide(
    found: tuple[int, str] | None,
    code: int,
    received: signal.Signals | None,
    record: JobRecord,
    step: int,
    limit: int,
    is_preempted: bool = False,
) -> Decision:
    """found: what the ranks left (trainer/outcome.py); code: of the command that ran them; received: the signal that
    the job got, if any; step: of the newest checkpoint now; limit: attempts without progress that are too many;
    is_preempted: whether SLURM is about to give the nodes to another job."""
    cut_short = received == signal.SIGTERM  # by SLURM; no fault of the run's
    stuck = 0 if step > record.step else record.without_progress + (not cut_short)
    record = replace(record, attempts=record.attempts + 1, without_progress=stuck, step=max(step, record.step))
    if found is not None and found[0] in (0, 2):
        done = "finished" if found[0] == 0 else f"not to be repeated: {found[1]}"
        return Decision("end", found[0], done, record)
    if cut_short:
        why = "SLURM ends this job (scancel, a preempting job or scontrol requeue), with a checkpoint"
        return Decision("end", STOPPED, why if found else "SLURM ended this job before the ranks could save", record)
    # With a grace time SLURM tells the ranks of a preemption, and this job only when that is over.
    time_is_over = received == signal.SIGUSR1 or is_preempted or (found is not None and found[1] == stop.JOB_END)
    # The ranks of a torchrun that was killed are asked to stop as well, by launch/relay.py.
    is_orphaned = found is not None and found[1] == "SIGTERM" and code >= 128
    if not time_is_over and not is_orphaned and (found is not None or received is not None):
        return Decision(
            "end", STOPPED, f"stopped by {found[1] if found else signal.Signals(received or 0).name}", record
        )
    what = "the time of this job is over" if time_is_over else f"the ranks ended before their time (code {code})"
    what = "another job gets these nodes" if is_preempted else what
    if stuck >= limit:
        why = f"{what}, {stuck} times in a row without a newer checkpoint than step {step:,}: given up"
        return Decision("end", code or 1, why, record)
    return Decision("requeue" if time_is_over else "again", code or STOPPED, f"{what}, at step {step:,}", record)
