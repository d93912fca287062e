"""Tests launch/torchrun.sh with machines that join and fail: the run continues and keeps the bits."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from support.processes import ENDLESS, REPOSITORY, Ranks, free_port, last_step
from support.runs import VIRTUAL, difference_between, read_status

SCRIPT = str(REPOSITORY / "launch" / "torchrun.sh")
RUN_FOLDER = Path("runs/elastic")


@pytest.fixture
def start_machine() -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Starts torchrun.sh with one rank, which torchrun treats as a machine. The end of the test kills what is left."""
    machines: list[subprocess.Popen[bytes]] = []

    def start(*settings: str, **env: str) -> subprocess.Popen[bytes]:
        with Path(f"machine-{len(machines)}.log").open("wb") as log:
            command = ["bash", SCRIPT, *settings]
            machines.append(subprocess.Popen(command, env=os.environ | env, stdout=log, stderr=subprocess.STDOUT))
        return machines[-1]

    yield start
    for machine in machines:
        power_off(machine)


def power_off(machine: "subprocess.Popen[bytes]") -> None:
    """Kills a launcher and its ranks."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(machine.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
    machine.kill()
    machine.wait()


def wait_until(condition: Callable[[], object], timeout_seconds: float = 180) -> None:
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        logs = "\n".join(path.read_text() for path in sorted(Path.cwd().glob("machine-*.log")))
        assert time.monotonic() < deadline, logs
        time.sleep(0.05)


def world_size() -> int:
    path = RUN_FOLDER / "environment.json"
    return int(json.loads(path.read_text())["world_size"]) if path.exists() else 0


def current_step() -> int:
    return last_step(RUN_FOLDER)


@pytest.mark.slow
def test_machine_that_joins_and_fails_changes_no_bit(
    start_machine: Callable[..., subprocess.Popen[bytes]], ranks: Ranks
) -> None:
    settings = [*VIRTUAL, *ENDLESS, "checkpoint.every_steps=50", "log.every_steps=5"]
    env = {"NODES": "1:4", "RANKS": "1", "HEAD": "127.0.0.1", "PORT": str(free_port()), "LAST_CALL_SECONDS": "1"}
    env["SAMECURVE_PYTHON"] = sys.executable
    first = start_machine(*settings, "run.name=elastic", **env)
    wait_until(lambda: world_size() == 1 and current_step() > 50)
    second = start_machine(*settings, "run.name=elastic", **env)
    wait_until(lambda: world_size() == 2)
    join_step = current_step()
    wait_until(lambda: current_step() > join_step)
    power_off(second)
    wait_until(lambda: world_size() == 1 and current_step() > join_step + 20)
    (RUN_FOLDER / "stop").touch()
    assert first.wait(timeout=180) == 0
    stopped = read_status("elastic")
    assert stopped["state"] == "stopped"
    length = f"train.max_steps={int(str(stopped['step'])) + 20}"
    for name in ("elastic", "whole"):
        ranks.run(1, *settings, length, f"run.name={name}", fault="")
    assert not difference_between("whole", "elastic")


@pytest.mark.parametrize("ignored", ["HUP", "INT", ""])
def test_signals_that_the_script_was_started_to_ignore_are_not_handled(ignored: str, tmp_path: Path) -> None:
    """As by nohup, or for a background job of a script. A stand-in for Python prints what torchrun would get."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\n[ "$1" = -c ] && echo folder || echo "$PET_SIGNALS_TO_HANDLE"\n')
    python.chmod(0o755)
    command = ["sh", "-c", f'trap "" {ignored}; exec bash "$0"' if ignored else 'exec bash "$0"', SCRIPT]
    env = os.environ | {"SAMECURVE_PYTHON": str(python), "RANKS": "2"}
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=True)
    names = ["SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2"]
    # A process that starts pytest may itself ignore SIGINT.
    expected = [name for name in names if name[3:] != ignored and name not in inherited_ignored()]
    assert result.stdout.strip().split(",") == expected


def inherited_ignored() -> list[str]:
    return [number.name for number in signal.Signals if signal.getsignal(number) == signal.SIG_IGN]


@pytest.mark.parametrize("python", ["", "/no/such/python"])
def test_machine_without_python_is_told_in_one_line(tmp_path: Path, python: str) -> None:
    for name in ("dirname", "realpath"):
        (tmp_path / name).symlink_to(str(shutil.which(name)))
    env = {"PATH": str(tmp_path)} | ({"SAMECURVE_PYTHON": python} if python else {})
    command = [str(shutil.which("bash")), SCRIPT, "--config", "digits"]
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 2, result.stderr
    assert f"({python or 'neither python nor python3 in PATH'}); set SAMECURVE_PYTHON" in result.stderr
    assert result.stderr.startswith("samecurve: no Python on ") and result.stderr.count("\n") == 1
