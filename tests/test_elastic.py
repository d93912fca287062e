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
from conftest import REPOSITORY, Ranks, free_port
from test_kill import VIRTUAL
from test_virtual_ranks import differing

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


def seen(what: Callable[[], object], timeout_seconds: float = 90) -> None:
    until = time.monotonic() + timeout_seconds
    while not what():
        logs = "\n".join(path.read_text() for path in sorted(Path.cwd().glob("machine-*.log")))
        assert time.monotonic() < until, logs
        time.sleep(0.05)


def world_size() -> int:
    path = Path("runs/elastic/environment.json")
    return int(json.loads(path.read_text())["world_size"]) if path.exists() else 0


def step() -> int:
    path = Path("runs/elastic/metrics.jsonl")
    lines = path.read_text().splitlines() if path.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)


@pytest.mark.slow
def test_a_machine_comes_and_another_is_lost(machine: Callable[..., subprocess.Popen[bytes]], ranks: Ranks) -> None:
    settings = [*VIRTUAL, "train.max_steps=400", "train.epochs=100", "checkpoint.every_steps=50", "log.every_steps=5"]
    ranks.run(1, *settings, "run.name=whole", plant="")
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
    assert first.wait(timeout=120) == 0
    assert not differing("whole", "elastic")
