"""Under real launchers: a rank that is killed is started again; a command that was interrupted goes on."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support.processes import ENDLESS, MAIN, REPOSITORY, Done, Ranks, torchrun
from support.runs import RUN, VIRTUAL, differing, status


@pytest.mark.slow
def test_torchrun_starts_a_killed_rank_again(launch: Callable[..., Done], ranks: Ranks) -> None:
    worker = str(REPOSITORY / "tests" / "support" / "workers" / "dies.py")
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
        "import json, signal, subprocess, time, pathlib\n"
        f"command = {[sys.executable, MAIN, *RUN, *ENDLESS, 'run.name=x']!r}\n"
        "process = subprocess.Popen(command)\n"
        "while not pathlib.Path('runs/x/metrics.jsonl').exists(): time.sleep(0.01)\n"
        "process.send_signal(signal.SIGINT)\n"
        "print('first', process.wait(150))\n"
        "step = json.loads(pathlib.Path('runs/x/status.json').read_text())['step']\n"
        "print('second', subprocess.run([*command, f'train.max_steps={step + 9}']).returncode)\n"
    )
    done = launch([sys.executable, "-c", code])
    assert "first 75\n" in done.out and "second 0\n" in done.out, done.out + done.err
