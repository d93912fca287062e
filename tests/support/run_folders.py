"""Run folders as a run leaves them, and a SLURM queue that is made up."""

import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest

HERE = socket.gethostname()


def make(
    name: str,
    status: tuple[str, int] | None = None,
    start: dict[str, Any] | None = None,
    job: dict[str, Any] | None = None,
    rows: str = "",
) -> Path:
    """A run folder with these files."""
    path = Path("runs") / name
    path.mkdir(parents=True)
    if status is not None:
        text = json.dumps({"state": status[0], "step": status[1], "reason": f"why {status[0]}"})
        (path / "status.json").write_text(text)
    if job is not None:
        (path / "job.json").write_text(json.dumps({"job_id": "7", "array_task": None, "log": "logs/7.out"} | job))
        os.utime(path / "job.json", (1000, 1000))
    if start is not None:
        row = {"step": 0, "total_steps": 90, "world_size": 2, "host": HERE, "job": None, "array_task": None} | start
        (path / "starts.jsonl").write_text(2 * (json.dumps(row) + "\n"))
    if rows:
        (path / "metrics.jsonl").write_text(rows)
    (path / "config.yaml").write_text("")
    return path


def fake_squeue(monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """No SLURM: a script that prints what the real squeue printed, and notes that it was called."""
    place = Path("bin")
    place.mkdir()
    (place / "squeue").write_text(f'#!/bin/sh\necho "$@" >> {Path.cwd()}/asked\n{script}\n')
    (place / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{place.resolve()}:/usr/bin:/bin")
