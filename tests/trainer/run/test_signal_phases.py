"""A signal in a phase of a run: it ends as it should, and the same command ends it with the same bits.

Of the 60 pairs, the slow tests send one signal in each phase, each signal at least once, to a single process; and one
signal in each of three phases to one of two ranks. The fast tests send one signal in each of three phases.
"""

import itertools
import random
import shutil
import signal
from pathlib import Path

import pytest
from support.processes import Ranks
from support.runs import VIRTUAL, difference_between, read_status

from trainer.run import checkpoint

PHASES = (
    "start", "waiting for data", "forward pass", "backward pass", "evaluation", "checkpoint", "writing",
    "agreement on stopping", "result", "end",
)  # fmt: skip
SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGKILL")
RUN = [*VIRTUAL, "train.max_steps=120", "log.tensorboard=false"]


def sample(seed: int, count: int) -> list[tuple[str, str]]:
    """Draws pairs of a phase and a signal: no phase twice, and no signal again before each was drawn."""
    generator = random.Random(seed)
    phases, signals = generator.sample(PHASES, len(PHASES)), generator.sample(SIGNALS, len(SIGNALS))
    return list(zip(phases, itertools.cycle(signals), strict=False))[:count]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the folder for a copy of the undisturbed run; empty before the first test."""
    return tmp_path_factory.mktemp("whole")


def expected_code(phase: str, name: str) -> int:
    """Returns the exit code of a single process."""
    number = signal.Signals[name]
    if number == signal.SIGKILL:
        return -9
    if phase == "start" and number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        return 128 + number
    return 0 if phase in ("result", "end") else 75


def check(ranks: Ranks, world_size: int, phase: str, name: str, whole_run: Path) -> None:
    """Sends the signal to the last rank, continues the run, and compares it with an undisturbed one."""
    last_rank = str(world_size - 1)
    started = ranks.start(
        world_size, *RUN, "run.name=x", fault="signal_in_phase", SIGNAL=name, SIGNAL_PHASE=phase, SIGNAL_RANK=last_rank
    )
    codes = ranks.join(started, timeout_seconds=60)
    log = ranks.log.read_text()
    assert Path("sent").read_text() == f"{name} in {phase}", log
    assert codes[-1] == expected_code(phase, name), log
    assert "Traceback" not in log
    if codes[-1] == 75:
        assert set(codes) == {75}, log
        status = read_status("x")
        assert (status["state"], status["reason"]) == ("stopped", name)
        newest, damaged = checkpoint.find_newest_valid(Path("runs/x/checkpoints"))
        assert newest is not None and newest.name == f"step-{status['step']:08}" and not damaged
    ranks.run(world_size, *RUN, "run.name=x")
    if not any(whole_run.iterdir()):  # once for all tests: virtual ranks give the same bits on any number of ranks
        ranks.run(1, *RUN, "run.name=whole")
        shutil.copytree("runs/whole", whole_run, dirs_exist_ok=True)
    shutil.copytree(whole_run, "runs/whole", dirs_exist_ok=True)
    assert not difference_between("whole", "x")


@pytest.mark.parametrize(("phase", "name"), sample(seed=1, count=3))
def test_signal_in_three_phases_keeps_the_bits(ranks: Ranks, whole_run: Path, phase: str, name: str) -> None:
    check(ranks, 1, phase, name, whole_run)


@pytest.mark.slow
@pytest.mark.parametrize(("phase", "name"), sample(seed=2, count=len(PHASES)))
def test_signal_in_each_phase_keeps_the_bits(ranks: Ranks, whole_run: Path, phase: str, name: str) -> None:
    check(ranks, 1, phase, name, whole_run)


@pytest.mark.slow
@pytest.mark.parametrize(("phase", "name"), [pair for pair in sample(seed=3, count=10) if pair[0] != "writing"][:3])
def test_signal_to_one_of_two_ranks_keeps_the_bits(ranks: Ranks, whole_run: Path, phase: str, name: str) -> None:
    """Rank 1 writes no checkpoint."""
    check(ranks, 2, phase, name, whole_run)
