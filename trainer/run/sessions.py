"""Records each start of training (a session) in starts.jsonl: time, step, world size, host and SLURM job.

A resumed run adds a row and removes none: the number of restarts is the number of rows less one.
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

from trainer.distributed.environment import parse_int
from trainer.run.folder import RunFolder
from trainer.run.record import RunRecord

SESSIONS_FILE = "starts.jsonl"


def append_session(folder: RunFolder, step: int, total_steps: int, world_size: int) -> bytes:
    """Adds a row for a session that starts after `step` steps. Only rank 0 calls it. Returns all rows. Raises OSError.

    Replaces the whole file: an append by a killed process could leave half a row.
    """
    row = {
        "time": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "step": step,
        "total_steps": total_steps,
        "world_size": world_size,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        **_slurm_job(),
    }
    path = folder.path / SESSIONS_FILE
    earlier_rows = path.read_bytes() if path.is_file() else b""  # as they are: a damaged byte must not stop a start
    rows = earlier_rows + json.dumps(row).encode() + b"\n"
    folder.write_file(SESSIONS_FILE, lambda partial: partial.write_bytes(rows))
    return rows


def session_summary(folder: RunFolder) -> dict[str, object]:
    """Returns the number of restarts and the SLURM job of this session, for W&B."""
    return {"restarts": RunRecord(folder.path).restarts, "slurm": _slurm_job()}


def _slurm_job() -> dict[str, object]:
    """Returns the SLURM job of this process. A task of an array has the array's id and a task number, too."""
    return {
        "job": os.environ.get("SLURM_JOB_ID"),
        "array_job": os.environ.get("SLURM_ARRAY_JOB_ID"),
        "array_task": parse_int(os.environ.get("SLURM_ARRAY_TASK_ID", "")),
    }


def describe_environment() -> dict[str, object]:
    """Returns versions, commit, machine and command, which a user needs to repeat the run."""
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
    """Returns the commit of this code, with -dirty if files differ from it; None outside a git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None
