"""Tests restarts with real launchers: of a killed rank by torchrun, of an interrupted command by the user."""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.processes import ENDLESS, MAIN, REPOSITORY, CommandResult, Ranks, last_step, torchrun
from support.runs import RUN, VIRTUAL, difference_between, read_status

from trainer.run.stop import LAUNCHER_END


@pytest.mark.slow
def test_torchrun_restart_of_killed_rank_keeps_the_bits(launch: Callable[..., CommandResult], ranks: Ranks) -> None:
    worker = str(REPOSITORY / "tests" / "support" / "workers" / "killed_rank.py")
    ranks.run(2, *VIRTUAL, "run.name=whole")
    command = torchrun(2, worker, *VIRTUAL, "run.name=broken")
    result = launch([*command[:3], "--max-restarts=2", *command[3:]])
    assert result.code == 0, result.err
    assert "rank 1" in result.err and read_status("broken")["state"] == "finished"
    assert not difference_between("whole", "broken")


@pytest.mark.slow
def test_ctrl_c_saves_and_the_same_command_continues(launch: Callable[..., CommandResult]) -> None:
    # Another Python process starts the command as a shell would, sends SIGINT during training and runs it again.
    program = (
        "import json, signal, subprocess, time, pathlib\n"
        f"command = {[sys.executable, MAIN, *RUN, *ENDLESS, 'run.name=x']!r}\n"
        "process = subprocess.Popen(command)\n"
        "while not pathlib.Path('runs/x/metrics.jsonl').exists(): time.sleep(0.01)\n"
        "process.send_signal(signal.SIGINT)\n"
        "print('first', process.wait(150))\n"
        "step = json.loads(pathlib.Path('runs/x/status.json').read_text())['step']\n"
        "print('second', subprocess.run([*command, f'train.max_steps={step + 9}']).returncode)\n"
    )
    result = launch([sys.executable, "-c", program])
    assert "first 75\n" in result.out and "second 0\n" in result.out, result.out + result.err


@pytest.mark.slow
def test_ranks_of_a_killed_torchrun_save_and_the_same_command_continues_at_once(
    launch: Callable[..., CommandResult], ranks: Ranks
) -> None:
    """torchrun has the ranks' store, which ends with it."""
    run = [*VIRTUAL, *ENDLESS, "checkpoint.every_steps=0", "checkpoint.every_epochs=0", "run.name=x"]
    process = subprocess.Popen(torchrun(2, MAIN, *run), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: last_step(Path("runs/x")) > 20)
    finally:
        process.kill()
        process.wait()
    wait_for(lambda: read_status("x")["state"] == "stopped")
    status = read_status("x")
    assert status["reason"] == LAUNCHER_END and int(str(status["step"])) > 20
    length = f"train.max_steps={int(str(status['step'])) + 20}"
    result = launch([*torchrun(2, MAIN, *run), length])
    assert result.code == 0, result.err
    ranks.run(1, *run[:-1], length, "run.name=whole", fault="")
    assert not difference_between("whole", "x")


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
