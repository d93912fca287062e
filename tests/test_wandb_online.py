"""W&B online: the real client against a local server, which these tests need and otherwise skip.

The server is a file of one process, not part of this project: SAMECURVE_WANDB_SERVER names it.
"""

import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import MAIN, REPOSITORY, Done

SERVER = Path(os.environ.get("SAMECURVE_WANDB_SERVER", REPOSITORY.parent / "shared" / "tools" / "wandb_server.py"))
pytestmark = pytest.mark.skipif(not SERVER.is_file(), reason="needs a local W&B server: set SAMECURVE_WANDB_SERVER")
RUN = [sys.executable, MAIN, "--config", "digits", "log.tensorboard=false", "train.max_steps=40"]


class Server:
    def __init__(self, url: str) -> None:
        self.url = url

    def ask(self, path: str, body: dict[str, object] | None = None) -> Any:
        data = json.dumps(body).encode() if body is not None else None
        with urllib.request.urlopen(self.url + path, data=data, timeout=10) as answer:
            return json.loads(answer.read())


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    command = [sys.executable, str(SERVER), "--port", "0", "--dir", str(tmp_path / "server")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None
    url = json.loads(process.stdout.readline())["base_url"]
    monkeypatch.setenv("WANDB_BASE_URL", url)
    monkeypatch.setenv("WANDB_API_KEY", "f" * 40)
    yield Server(url)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()


def test_auto_goes_online_with_a_key_and_a_network(launch: Callable[..., Done], server: Server) -> None:
    done = launch(RUN)
    assert done.code == 0 and "W&B: online, http" in done.out, done.err
    (run,) = server.ask("/_/runs").values()
    rows = [json.loads(line) for line in Path("runs/digits/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in run["history"]] == [row["step"] for row in rows] == [20, 23, 40, 40]
    assert (
        run["history"][0]["train/loss"] == rows[0]["loss"] and run["summary"]["test/accuracy"] == rows[-1]["accuracy"]
    )
    assert run["complete"] and run["exitcode"] == 0


@pytest.mark.slow
def test_a_server_that_fails_at_the_start_is_offline(launch: Callable[..., Done], server: Server) -> None:
    server.ask("/_/fault", {"op": "UpsertBucket", "status": 500})
    done = launch(RUN)
    assert done.code == 0 and "W&B: offline (Timed out" in done.out and "wandb sync" in done.out, done.err


@pytest.mark.slow
def test_a_server_that_fails_at_the_end_does_not_hold_the_run(launch: Callable[..., Done], server: Server) -> None:
    server.ask("/_/fault", {"match": "file_stream", "status": 500})
    done = launch(RUN)
    assert done.code == 0 and "W&B: not all was uploaded within" in done.out, done.err
