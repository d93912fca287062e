"""Who asks to stop, when it is looked at, and what is agreed; whole runs are in test_kill.py."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from trainer.config.load import load_config
from trainer.errors import ConfigError
from trainer.run import stop
from trainer.run.stop import StepTimes, StopCheck, StopSignals


@pytest.fixture
def signals() -> Iterator[StopSignals]:
    made = StopSignals(speaks=False)
    with made.at_step_ends():
        yield made
    made.close()


def never(steps: int) -> bool:
    return False


def alone(values: list[float]) -> list[float]:
    return values


def paced(*seconds: float) -> StepTimes:
    pace = StepTimes()
    for value in seconds:
        pace.step(value)
    return pace


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_is_noted(signals: StopSignals, number: signal.Signals) -> None:
    check = StopCheck(signals, None, None, paced(10.0), 1, alone)
    assert check(1, 0.0, never) == ""
    os.kill(os.getpid(), number)
    until = time.monotonic() + 5
    while not signals.received and time.monotonic() < until:
        time.sleep(0.001)
    assert check(2, 0.0, never) == number.name


def test_what_was_there_before_comes_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    made = StopSignals(speaks=False)
    assert signal.getsignal(signal.SIGTERM) != before
    made.close()
    assert signal.getsignal(signal.SIGTERM) == before


def test_the_largest_reason_of_any_rank_counts(signals: StopSignals) -> None:
    check = StopCheck(signals, None, None, paced(1.0), 2, lambda values: [3.0, values[1]])
    assert check(1, 0.0, never) == stop.REASONS[3] == "SIGUSR1"


def test_short_steps_are_not_all_asked(signals: StopSignals, tmp_path: Path) -> None:
    exchanges = []

    def counted(values: list[float]) -> list[float]:
        exchanges.append(values)
        return values

    check = StopCheck(signals, tmp_path, None, paced(0.01), 2, counted)
    assert [check(step, 0.0, never) for step in range(1, 101)] == [""] * 100
    assert len(exchanges) == 5  # every twenty steps, be they as short as they may
    alone_check = StopCheck(signals, tmp_path, None, paced(0.01), 1, counted)
    exchanges.clear()
    assert [alone_check(step, 0.0, never) for step in range(1, 11)] == [""] * 10 and len(exchanges) < 10
    (tmp_path / "stop").touch()
    time.sleep(0.11)
    assert alone_check(11, 0.0, never)
    (tmp_path / "stop").unlink()
    slow = StopCheck(signals, tmp_path, None, paced(3.0), 2, counted)
    exchanges.clear()
    assert [slow(step, 0.0, never) for step in range(1, 11)] == [""] * 10 and len(exchanges) == 10


def test_a_file_asks_and_goes(signals: StopSignals, tmp_path: Path) -> None:
    check = StopCheck(signals, tmp_path, None, paced(3.0), 1, alone)
    assert check(1, 0.0, never) == ""
    (tmp_path / "stop").touch()
    assert check(2, 0.0, never) == "the file `stop` in the run folder"
    check.done()
    check.done()
    assert not (tmp_path / "stop").exists()


def test_the_deadline_leaves_time_for_two_steps_a_save_and_an_evaluation(
    signals: StopSignals, monkeypatch: pytest.MonkeyPatch
) -> None:
    pace = paced(100.0, 2.0, 3.0)  # the first one warms up and does not count
    pace.evaluation(20.0)
    now = time.time()
    monkeypatch.setattr(stop.time, "time", lambda: now)

    def reason(deadline: float, evaluates: bool = False) -> str:
        return StopCheck(signals, None, (deadline, "the time limit"), pace, 1, alone)(3, 4.0, lambda _: evaluates)

    assert reason(now + 2 * 3 + 4 + 1) == "" and reason(now + 2 * 3 + 4 - 0.1) == "the time limit"
    assert reason(now + 2 * 3 + 4 + 20 + 1, evaluates=True) == ""
    assert reason(now + 2 * 3 + 4 + 20 - 0.1, evaluates=True) == "the time limit"


def test_a_slow_step_is_forgotten_after_some_hundred() -> None:
    pace = paced(100.0, 1.0, 1.0, 9.0, *[1.0] * 110)
    assert pace.step_seconds == 9.0
    for _ in range(90):
        pace.step(1.0)
    assert pace.step_seconds == 1.0


def test_after_one_slow_step_ranks_soon_ask_as_seldom_as_before(signals: StopSignals) -> None:
    asked = []

    def noted(values: list[float]) -> list[float]:
        asked.append(step)
        return values

    pace = paced(3.0, 0.005, 2.0)  # the third one, log, looks for kernels
    check = StopCheck(signals, None, None, pace, 2, noted)
    for step in range(200):
        pace.step(0.005)
        assert check(step, 0.0, never) == ""
    assert asked[:5] == [0, 1, 2, 3, 4] and asked[-3:] == [asked[-1] - 40, asked[-1] - 20, asked[-1]]
    assert len(asked) < 45


def test_towards_a_deadline_ranks_ask_as_if_all_steps_were_slow(
    signals: StopSignals, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [1000.0]
    monkeypatch.setattr(stop.time, "time", lambda: clock[0])
    pace = paced(1.0, 1.0, 1.0, *[0.005] * 60)
    check = StopCheck(signals, None, (1100.0, "the time limit"), pace, 2, alone)
    step = 0
    while clock[0] < 1097.0:
        clock[0] += 0.005
        pace.step(0.005)
        pace.step(1.0 if step % 40 == 0 else 0.005)
        step += 1
        assert check(step, 0.0, never) == ""
    reason = ""
    while not reason and clock[0] < 1200.0:  # all of a sudden each is slow
        clock[0] += 1.0
        pace.step(1.0)
        step += 1
        reason = check(step, 0.0, never)
    assert reason == "the time limit" and clock[0] <= 1100.0


def test_the_earlier_deadline_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    assert stop.deadline(None, 1000.0) is None and stop.deadline(60.0, 1000.0) == (1060.0, "the time limit")
    monkeypatch.setenv("SLURM_JOB_END_TIME", "1030")
    assert stop.deadline(60.0, 1000.0) == stop.deadline(None, 1000.0) == (1030.0, stop.JOB_END)
    monkeypatch.setenv("SLURM_JOB_END_TIME", "not yet known")
    assert stop.deadline(60.0, 1000.0) == (1060.0, "the time limit")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("5400", 5400), ("90s", 90), ("90m", 5400), ("1h30m", 5400), ("2d", 172800), ("1d2h3m4s", 93784),
        ("1:30:00", 5400), ("45:00", 2700), ("2-12:00:00", 216000), ("1-01:00", 90000),
    ],
)  # fmt: skip
def test_times_are_read(text: str, seconds: float) -> None:
    assert load_config([], [f"train.time_limit={text}"]).train.time_limit_seconds == seconds


@pytest.mark.parametrize("text", ["soon", "-5", "1:2:3:4", "0", "", "1.5h", "h"])
def test_what_is_no_time_is_told(text: str) -> None:
    with pytest.raises(ConfigError, match=r"train\.time_limit=.*wanted a time such as 90m"):
        load_config([], [f"train.time_limit={text}"])


def test_a_time_in_a_file_may_stand_without_quotes(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("train: {time_limit: 1:30:00}")  # YAML 1.1 makes it the number 5400
    assert load_config([tmp_path / "x.yaml"], []).train.time_limit_seconds == 5400
