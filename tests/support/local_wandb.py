"""Runs a W&B server on this machine for the real client, and reads the rows that the client logged.

The server is one file outside this project. SAMECURVE_WANDB_SERVER is its path.
"""

import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from support.processes import REPOSITORY

SERVER = Path(os.environ.get("SAMECURVE_WANDB_SERVER", REPOSITORY.parent / "shared" / "tools" / "wandb_server.py"))
MISSING = "" if SERVER.is_file() else "needs a local W&B server: set SAMECURVE_WANDB_SERVER"
API_KEY = "f" * 40
WANDB = str(Path(sys.executable).parent / "wandb")


class Server:
    """A running W&B server in a process group of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        script = Path(__file__).with_name("wandb_server_with_sweeps.py")
        command = [sys.executable, str(script), str(SERVER), str(folder)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
        assert self._process.stdout is not None
        self.url: str = json.loads(self._process.stdout.readline())["base_url"]

    def request(self, path: str, body: dict[str, object] | None = None) -> Any:
        """Sends GET, or POST with a body, and returns the JSON of the answer."""
        data = json.dumps(body).encode() if body is not None else None
        with urllib.request.urlopen(self.url + path, data=data, timeout=10) as answer:
            return json.loads(answer.read())

    def inject_fault(self, **fault: object) -> None:
        """Makes requests fail from now on. Without arguments the server works again."""
        self.request("/_/fault", dict(fault))

    def only_run(self) -> Any:
        """Returns the only run that the server has."""
        (run,) = self.request("/_/runs").values()
        return run

    def stop(self) -> None:
        """Kills the server. A second call does nothing."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()


ValueCounts = Counter[tuple[int, str, float]]
"""how often each value was logged: (step, W&B key, value)"""


def metrics_file_values(folder: Path) -> ValueCounts:
    """Counts the values in metrics.jsonl of a run folder."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return Counter(
        (row["step"], f"{row['split']}/{name}", value)
        for row in rows
        for name, value in row.items()
        if name not in ("split", "step")
    )


def wandb_values(history: Iterable[dict[str, Any]]) -> ValueCounts:
    """Counts the metrics in rows of W&B. A dot in a key marks a detail of a table or an image, not a metric."""
    return Counter(
        (row["step"], name, value)
        for row in history
        for name, value in row.items()
        if "/" in name and "." not in name and isinstance(value, (int, float))
    )


def sync_sessions(server: Server, *sessions: Path) -> None:
    """Uploads sessions with `wandb sync`, as a user does."""
    command = [WANDB, "sync", "--yes", "--include-online", *map(str, sessions)]
    env = os.environ | {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": API_KEY}
    result = subprocess.run(command, env=env, timeout=60, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def read_records(session: Path) -> list[dict[str, Any]]:
    """Returns all records of a session file, read by W&B's own command."""
    return [json.loads(line) for line in _inspect(session).splitlines()]


def read_rows(session: Path) -> list[dict[str, Any]]:
    """Returns the history rows of a session file."""
    return [record["history"]["item"] for record in read_records(session) if record["type"] == "history"]


def read_summary(session: Path) -> dict[str, Any]:
    """Returns W&B's summary of a session file: run id, state, exit code, settings and last metrics."""
    summary: dict[str, Any] = json.loads(_inspect(session, "--summary"))
    return summary


def _inspect(session: Path, *options: str) -> str:
    command = [WANDB, "leet", "inspect", "--json", *options, str(session)]
    return subprocess.run(command, timeout=60, capture_output=True, text=True, check=True).stdout
