"""Machines come and go under torchrun --nnodes 1:4: the run goes on from its last checkpoint, the same bits."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from support.processes import ENDLESS, REPOSITORY, Ranks, free_port, last_step
from support.runs import VIRTUAL, differing, status

SCRIPT = str(REPOSITORY / "launch" / "torchrun.sh")


@pytest.fixture
def machine() -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """A machine, as far as torchrun can tell: a launcher with one rank, whose all is ended at the end of the test."""
    started: list[subprocess.Popen[bytes]] = []

    def start(*settings: str, **env: str) -> subprocess.Popen[bytes]:
        with Path(f"machine-{len(started)}.log").open("wb") as log:
            command = ["bash", SCRIPT, *settings]
            started.append(subprocess.Popen(command, env=os.environ | env, stdout=log, stderr=subprocess.STDOUT))
        return started[-1]

    yield start
    for process in started:
        lose(process)


def lose(process: "subprocess.Popen[bytes]") -> None:
    """Its power goes."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
    process.kill()
    process.wait()


def seen(what: Callable[[], object], timeout_seconds: float = 180) -> None:
    until = time.monotonic() + timeout_seconds
    while not what():
        logs = "\n".join(path.read_text() for path in sorted(Path.cwd().glob("machine-*.log")))
        assert time.monotonic() < until, logs
        time.sleep(0.05)


def world_size() -> int:
    path = Path("runs/elastic/environment.json")
    return int(json.loads(path.read_text())["world_size"]) if path.exists() else 0


def step() -> int:
    return last_step(Path("runs/elastic"))


@pytest.mark.slow
def test_a_machine_comes_and_another_is_lost(machine: Callable[..., subprocess.Popen[bytes]], ranks: Ranks) -> None:
    settings = [*VIRTUAL, *ENDLESS, "checkpoint.every_steps=50", "log.every_steps=5"]
    env = {"NODES": "1:4", "RANKS": "1", "HEAD": "127.0.0.1", "PORT": str(free_port()), "LAST_CALL_SECONDS": "1"}
    env["SAMECURVE_PYTHON"] = sys.executable
    first = machine(*settings, "run.name=elastic", **env)
    seen(lambda: world_size() == 1 and step() > 50)
    second = machine(*settings, "run.name=elastic", **env)
    seen(lambda: world_size() == 2)
    joined = step()
    seen(lambda: step() > joined)
    lose(second)
    seen(lambda: world_size() == 1 and step() > joined + 20)
    Path("runs/elastic/stop").touch()
    assert first.wait(timeout=180) == 0
    found = status("elastic")
    assert found["state"] == "stopped"
    length = f"train.max_steps={int(str(found['step'])) + 20}"
    for name in ("elastic", "whole"):
        ranks.run(1, *settings, length, f"run.name={name}", plant="")
    assert not differing("whole", "elastic")
