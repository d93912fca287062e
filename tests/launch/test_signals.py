"""Tests that a launcher forwards the first stop signal once, and that a later Ctrl-C kills the command."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from support.processes import REPOSITORY

from launch import signals
from launch.plan import LaunchPlan
from launch.torchrun import run_plan

# Prints the signals that arrive within half a second of the first one.
COMMAND = """
import signal, time
received = []
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, lambda number, frame: received.append(signal.Signals(number).name))
print("ready", flush=True)
while not received: time.sleep(0.01)
time.sleep({delay})
print("received", *received, flush=True)
raise SystemExit(7)
"""

LAUNCHER = """
import os, sys
from launch.signals import SignalForwarder
print("code", SignalForwarder().run([sys.executable, "-c", sys.argv[1]], os.environ), flush=True)
"""


@pytest.fixture
def launchers() -> Iterator[list["subprocess.Popen[str]"]]:
    processes: list[subprocess.Popen[str]] = []
    yield processes
    for process in processes:
        if process.poll() is None:
            for descendant in psutil.Process(process.pid).children(recursive=True):
                descendant.kill()
        process.kill()
        process.communicate()


def start(
    launchers: list["subprocess.Popen[str]"], delay_seconds: float = 0.5, ignored: signal.Signals | None = None
) -> "subprocess.Popen[str]":
    """Starts a launcher and waits until its command handles signals. ignored: a signal that it is started to ignore."""
    argv = [sys.executable, "-c", LAUNCHER, COMMAND.format(delay=delay_seconds)]
    prefix = [] if ignored is None else ["sh", "-c", f'trap "" {ignored.name[3:]}; exec "$@"', "sh"]
    launchers.append(subprocess.Popen([*prefix, *argv], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True))
    assert launchers[-1].stdout is not None
    assert launchers[-1].stdout.readline() == "ready\n"
    return launchers[-1]


@pytest.mark.parametrize(("sent", "received"), [("SIGTERM", "SIGTERM"), ("SIGINT", "SIGINT"), ("SIGHUP", "SIGHUP")])
def test_repeated_stop_signal_is_forwarded_once(
    launchers: list["subprocess.Popen[str]"], sent: str, received: str
) -> None:
    launcher = start(launchers)
    launcher.send_signal(signal.Signals[sent])
    time.sleep(0.1)
    launcher.send_signal(signal.Signals[sent])
    output, _ = launcher.communicate(timeout=60)
    assert output == f"received {received}\ncode 7\n"


@pytest.mark.parametrize("ignored", [signal.SIGHUP, signal.SIGINT])
def test_ignored_signal_is_not_forwarded(launchers: list["subprocess.Popen[str]"], ignored: signal.Signals) -> None:
    launcher = start(launchers, ignored=ignored)
    launcher.send_signal(ignored)
    time.sleep(0.1)
    launcher.send_signal(signal.SIGTERM)
    output, _ = launcher.communicate(timeout=60)
    assert output == "received SIGTERM\ncode 7\n"


def test_second_ctrl_c_after_a_second_kills_the_command(launchers: list["subprocess.Popen[str]"]) -> None:
    launcher = start(launchers, delay_seconds=600)
    launcher.send_signal(signal.SIGINT)
    time.sleep(1.2)
    launcher.send_signal(signal.SIGINT)
    output, _ = launcher.communicate(timeout=60)
    assert output == f"code {128 + signal.SIGKILL}\n"


@pytest.mark.parametrize(("torchrun_code", "code"), [(0, 0), (1, 128 + signal.SIGTERM)])
def test_ranks_that_end_well_just_after_a_signal_did_not_end_early(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], torchrun_code: int, code: int
) -> None:
    forwarder = SimpleNamespace(received=signal.SIGTERM, run=lambda *_: torchrun_code)
    monkeypatch.setattr(signals, "SignalForwarder", lambda: forwarder)
    plan = LaunchPlan("evaluate", (sys.executable, "launch/elastic.py"), ())
    assert run_plan(plan, Path("runs/x")) == code
    assert ("SIGTERM ended the run" in capsys.readouterr().err) == bool(torchrun_code)
