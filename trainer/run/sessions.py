"""A start of training in, a line of `starts.jsonl` in the run folder out: how often it was begun, where, in which job.

A run that goes on adds a line and takes none away: restarts are lines less one.
"""

import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import socket
import subprocess
import sys
from pathlib import Path

from trainer.run.folder import RunFolder

SESSIONS_FILE = "starts.jsonl"


def append_session(folder: RunFolder, step: int, total_steps: int, world_size: int) -> None:
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
    path = folder.path / SESSIONS_FILE
    before = path.read_text(encoding="utf-8") if path.is_file() else ""
    folder.write(SESSIONS_FILE, before + json.dumps(row) + "\n")


def session_summary(folder: RunFolder) -> dict[str, object]:
    """restarts, how often it was begun again; and of SLURM's job, the last one's: job, array_job, array_task."""
    path = folder.path / SESSIONS_FILE
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


def describe_environment() -> dict[str, object]:
    """Versions, commit, machine and command: what a person needs to repeat the run."""
    packages = ("torch", "torchvision", "accelerate", "numpy", "tensorboard", "wandb", "omegaconf", "safetensors")
    return {
        "command": shlex.join([sys.executable, *sys.argv]),
        "directory": str(Path.cwd()),
        "started": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in packages},
        "launcher": {name: os.environ[name] for name in ("SLURM_JOB_ID", "TORCHELASTIC_RUN_ID") if name in os.environ},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """The commit of the code that runs, with -dirty when it was changed since; None outside a git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
