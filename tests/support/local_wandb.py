"""A W&B server on this machine for the real client, and what that client leaves: rows that are counted.

The server is a file of one process, not part of this project: SAMECURVE_WANDB_SERVER names it.
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
KEY = "f" * 40
WANDB = str(Path(sys.executable).parent / "wandb")


class Server:
    """Ends with its group, also when a test has ended it before."""

    def __init__(self, place: Path) -> None:
        self.place = place
        command = [sys.executable, str(SERVER), "--port", "0", "--dir", str(place)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
        assert self._process.stdout is not None
        self.url: str = json.loads(self._process.stdout.readline())["base_url"]

    def ask(self, path: str, body: dict[str, object] | None = None) -> Any:
        data = json.dumps(body).encode() if body is not None else None
        with urllib.request.urlopen(self.url + path, data=data, timeout=10) as answer:
            return json.loads(answer.read())

    def fault(self, **how: object) -> None:
        """What it does from now on; nothing: it is well again."""
        self.ask("/_/fault", dict(how))

    def run(self) -> Any:
        """The only one it has."""
        (run,) = self.ask("/_/runs").values()
        return run

    def end(self) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()


Values = Counter[tuple[int, str, float]]


def logged(folder: Path) -> Values:
    """Every number of metrics.jsonl: at which step, W&B's name for it, and how often it is there."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return Counter(
        (row["step"], f"{row['split']}/{name}", value)
        for row in rows
        for name, value in row.items()
        if name not in ("split", "step")
    )


def values(history: Iterable[dict[str, Any]]) -> Values:
    """The same of W&B's history: numbers at our own steps. Of tables and images leet has some, with a dot."""
    return Counter(
        (row["step"], name, value)
        for row in history
        for name, value in row.items()
        if "/" in name and "." not in name and isinstance(value, (int, float))
    )


def sync(server: Server, *paths: Path) -> None:
    """`wandb sync`, as a person does it."""
    command = [WANDB, "sync", "--yes", "--include-online", *map(str, paths)]
    env = os.environ | {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": KEY}
    done = subprocess.run(command, env=env, timeout=60, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def inspect(session: Path) -> list[dict[str, Any]]:
    """What W&B's own reader says of a session's file, record by record."""
    return [json.loads(line) for line in _leet(session).splitlines()]


def summarize(session: Path) -> dict[str, Any]:
    """What it says of the whole."""
    about: dict[str, Any] = json.loads(_leet(session, "--summary"))
    return about


def _leet(session: Path, *options: str) -> str:
    command = [WANDB, "leet", "inspect", "--json", *options, str(session)]
    return subprocess.run(command, timeout=60, capture_output=True, text=True, check=True).stdout
