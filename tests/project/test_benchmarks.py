"""benchmarks/turns.py lets one contestant at a time take steps, and quotes the output of one that fails."""

import subprocess
import sys
from pathlib import Path
from time import perf_counter

import pytest
from support.processes import REPOSITORY

sys.path.append(str(REPOSITORY / "benchmarks"))
from turns import Contestant, race, speed_ratio

BENCHMARKS = REPOSITORY / "benchmarks"

PROGRAM = """
import sys, time
sys.path.append(sys.argv[1])
from turns import Turn
turn = Turn()
turn.begin()
while True:
    with open(sys.argv[3], "a") as file:
        file.write(sys.argv[2] + " ")
    time.sleep(float(sys.argv[4]))
    turn()
"""


def make_contestant(name: str, log: Path, step_seconds: float) -> Contestant:
    """Returns a contestant that writes its name to the log in each step."""
    return Contestant(name, [sys.executable, "-c", PROGRAM, str(BENCHMARKS), name, str(log), str(step_seconds)])


def test_contestants_take_turns_in_alternating_order(tmp_path: Path) -> None:
    log = tmp_path / "log"
    fast, slow = make_contestant("a", log, 0.001), make_contestant("b", log, 0.05)
    race([fast, slow], rounds=3, steps=2, warmup_steps=1)
    assert log.read_text().split() == ["a", "b", *"aabb", *"bbaa", *"aabb"]
    assert len(fast.step_seconds) == len(slow.step_seconds) == 3 and min(slow.step_seconds) >= 0.05
    assert speed_ratio(fast, slow) > 1 > speed_ratio(slow, fast)


def test_turn_returns_seconds_of_one_step(tmp_path: Path) -> None:
    contestant = make_contestant("a", tmp_path / "log", 0.01)
    contestant.start()
    try:
        contestant.take_turn(1)
        start = perf_counter()
        step_seconds = contestant.take_turn(10)
        assert step_seconds >= 0.01 and 10 * step_seconds <= perf_counter() - start
    finally:
        contestant.end()


def test_output_of_failed_contestant_is_quoted() -> None:
    contestant = Contestant("broken", [sys.executable, "-c", "raise SystemExit('the reason')"])
    with pytest.raises(RuntimeError, match=r"broken: the contestant did not finish its turn.*\n.*the reason"):
        race([contestant], 1, 1, 1)


@pytest.mark.slow
def test_every_benchmark_prints_its_help() -> None:
    """Imports each benchmark, so that a renamed function of the trainer is noticed."""
    shared = {"report.py", "turns.py"}
    scripts = [path for path in sorted(BENCHMARKS.glob("*.py")) if path.name not in shared]
    assert len(scripts) > 10
    for path in scripts:
        done = subprocess.run([sys.executable, str(path), "--help"], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0 and f"python benchmarks/{path.name}" in done.stdout, done.stderr
