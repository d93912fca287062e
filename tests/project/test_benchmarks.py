"""The benchmarks' referee: turns are taken one at a time, and one who fails is quoted."""

import sys
from pathlib import Path

import pytest
from support.processes import REPOSITORY

sys.path.append(str(REPOSITORY / "benchmarks"))
from turns import Contestant, race, speed_ratio

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


def contestant(name: str, diary: Path, seconds: float) -> Contestant:
    return Contestant(
        name, [sys.executable, "-c", PROGRAM, str(REPOSITORY / "benchmarks"), name, str(diary), str(seconds)]
    )


def test_contestants_take_turns_and_every_second_round_goes_the_other_way(tmp_path: Path) -> None:
    diary = tmp_path / "diary"
    fast, slow = contestant("a", diary, 0.001), contestant("b", diary, 0.05)
    race([fast, slow], rounds=3, steps=2, warmup_steps=1)
    assert diary.read_text().split() == ["a", "b", *"aabb", *"bbaa", *"aabb"]
    assert len(fast.seconds) == len(slow.seconds) == 3 and min(slow.seconds) >= 0.05
    assert speed_ratio(fast, slow) > 1 > speed_ratio(slow, fast)


def test_one_who_ends_is_quoted() -> None:
    with pytest.raises(RuntimeError, match=r"broken: no answer\n.*it was me"):
        race([Contestant("broken", [sys.executable, "-c", "raise SystemExit('it was me')"])], 1, 1, 1)
