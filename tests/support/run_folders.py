"""Creates run folders without training, and a fake squeue."""

import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest

HERE = socket.gethostname()


def make_run_folder(
    name: str,
    status: tuple[str, int] | None = None,
    session: dict[str, Any] | None = None,
    job: dict[str, Any] | None = None,
    rows: str = "",
) -> Path:
    """Creates runs/NAME with these files and returns its path.

    status: state and step. session: keys that replace those of two default rows of starts.jsonl. job: keys that
    replace those of a default job.json. rows: content of metrics.jsonl.
    """
    path = Path("runs") / name
    path.mkdir(parents=True)
    if status is not None:
        content = json.dumps({"state": status[0], "step": status[1], "reason": f"why {status[0]}"})
        (path / "status.json").write_text(content)
    if job is not None:
        (path / "job.json").write_text(json.dumps({"job_id": "7", "array_task": None, "log": "logs/7.out"} | job))
        os.utime(path / "job.json", (1000, 1000))
    if session is not None:
        row = {"step": 0, "total_steps": 90, "world_size": 2, "host": HERE, "job": None, "array_task": None} | session
        (path / "starts.jsonl").write_text(2 * (json.dumps(row) + "\n"))
    if rows:
        (path / "metrics.jsonl").write_text(rows)
    (path / "config.yaml").write_text("")
    return path


def fake_squeue(monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Puts a squeue into PATH that runs a script and writes its arguments to the file squeue-calls."""
    folder = Path("bin")
    folder.mkdir()
    (folder / "squeue").write_text(f'#!/bin/sh\necho "$@" >> {Path.cwd()}/squeue-calls\n{script}\n')
    (folder / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder.resolve()}:/usr/bin:/bin")
