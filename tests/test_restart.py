"""Under real launchers: a rank that is killed is started again; a command that was interrupted goes on."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import MAIN, Done, Ranks, torchrun
from test_kill import RUN, VIRTUAL, status
from test_virtual_ranks import differing


@pytest.mark.slow
def test_torchrun_starts_a_killed_rank_again(launch: Callable[..., Done], ranks: Ranks) -> None:
    worker = str(Path(__file__).parent / "workers" / "dies.py")
    ranks.run(2, *VIRTUAL, "run.name=whole")
    command = torchrun(2, worker, *VIRTUAL, "run.name=broken")
    done = launch([*command[:3], "--max-restarts=2", *command[3:]])
    assert done.code == 0, done.err
    assert "rank 1" in done.err and status("broken")["state"] == "finished"
    assert not differing("whole", "broken")


@pytest.mark.slow
def test_the_command_itself_is_stopped_by_ctrl_c(launch: Callable[..., Done], tmp_path: Path) -> None:
    # One whole command from the outside, as a shell starts it: SIGINT while it trains, then the same command again.
    code = (
        "import os, signal, subprocess, sys, time, pathlib\n"
        f"command = {[sys.executable, MAIN, *RUN, 'run.name=x']!r}\n"
        "process = subprocess.Popen(command)\n"
        "while not pathlib.Path('runs/x/metrics.jsonl').exists(): time.sleep(0.01)\n"
        "process.send_signal(signal.SIGINT)\n"
        "print('first', process.wait(60), 'second', subprocess.run(command).returncode)\n"
    )
    done = launch([sys.executable, "-c", code])
    assert "first 75 second 0" in done.out, done.out + done.err
