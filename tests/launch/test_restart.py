"""Tests restarts with real launchers: of a killed rank by torchrun, of an interrupted command by the user."""

import sys
from collections.abc import Callable

import pytest
from support.processes import ENDLESS, MAIN, REPOSITORY, CommandResult, Ranks, torchrun
from support.runs import RUN, VIRTUAL, difference_between, read_status


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
