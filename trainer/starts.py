"""A start of training in, a line of `starts.jsonl` in the run folder out: how often it was begun, where, in which job.

A run that goes on adds a line and takes none away: restarts are lines less one.
"""

import datetime
import json
import os
import socket

from trainer.folder import RunFolder

NAME = "starts.jsonl"


def add(folder: RunFolder, step: int, total_steps: int, world_size: int) -> None:
    """Training begins, or goes on, after `step` steps. Called by rank 0. Raises OSError.

    The file is replaced whole: a process that is killed leaves no half of a line for the next one to append to.
    """
    row = {
        "time": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "step": step,
        "total_steps": total_steps,
        "world_size": world_size,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        **_job(),
    }
    path = folder.path / NAME
    before = path.read_text(encoding="utf-8") if path.is_file() else ""
    folder.write(NAME, before + json.dumps(row) + "\n")


def last(folder: RunFolder) -> dict[str, object]:
    """restarts, how often it was begun again; and of SLURM's job, the last one's: job, array_job, array_task."""
    path = folder.path / NAME
    rows = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return {"restarts": max(0, len(rows) - 1), "slurm": _job()}


def _job() -> dict[str, object]:
    """The SLURM job that this process runs in; an element of an array has the array's id and its own number too."""
    task = os.environ.get("SLURM_ARRAY_TASK_ID", "")
    return {
        "job": os.environ.get("SLURM_JOB_ID"),
        "array_job": os.environ.get("SLURM_ARRAY_JOB_ID"),
        "array_task": int(task) if task.isdigit() else None,
    }
