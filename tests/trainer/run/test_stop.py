"""Stopping: signals, stop file, deadlines and their checks. test_kill.py stops whole runs."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from trainer.run import stop
from trainer.run.stop import StepTimes, StopCheck, StopSignals, StopWhileWaiting


@pytest.fixture
def signals() -> Iterator[StopSignals]:
    stop_signals = StopSignals(is_reporter=False)
    with stop_signals.stop_at_step_end():
        yield stop_signals
    stop_signals.close()


def never(steps: int) -> bool:
    return False


def single_rank(values: list[float]) -> list[float]:
    return values


def step_times_of(*seconds: float) -> StepTimes:
    step_times = StepTimes()
    for value in seconds:
        step_times.record_step(value)
    return step_times


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP])
def test_signal_is_the_stop_reason(signals: StopSignals, number: signal.Signals) -> None:
    check = StopCheck(signals, None, None, step_times_of(10.0), 1, single_rank)
    assert check(1, 0.0, never) == ""
    os.kill(os.getpid(), number)
    deadline = time.monotonic() + 5
    while not signals.received and time.monotonic() < deadline:
        time.sleep(0.001)
    assert check(2, 0.0, never) == number.name


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP])
def test_signal_that_the_process_was_started_to_ignore_stays_ignored(number: signal.Signals) -> None:
    original = signal.signal(number, signal.SIG_IGN)
    try:
        stop_signals = StopSignals(is_reporter=False)
        with stop_signals.stop_at_step_end():
            os.kill(os.getpid(), number)
            assert signal.getsignal(number) == signal.SIG_IGN
            other = signal.SIGUSR1 if number != signal.SIGUSR1 else signal.SIGUSR2
            os.kill(os.getpid(), other)
            wait_until(lambda: stop_signals.received)
            assert stop_signals.received == other.name
        stop_signals.close()
        assert signal.getsignal(number) == signal.SIG_IGN
    finally:
        signal.signal(number, original)


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_wait_for_data_is_interrupted_only_while_it_lasts(signals: StopSignals) -> None:
    signals.request_stop("SIGTERM")
    signals.interrupt_wait(lambda: False)
    time.sleep(0.05)
    with pytest.raises(StopWhileWaiting, match=r"^SIGTERM$"):
        signals.interrupt_wait(lambda: True)
        time.sleep(10)
    signals.interrupt_wait(lambda: False)
    time.sleep(0.05)


def test_end_of_the_launcher_is_the_stop_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    launcher = subprocess.Popen(["sleep", "60"])
    monkeypatch.setattr(stop, "find_launcher", lambda: launcher.pid)
    signals = StopSignals(is_reporter=False)
    with signals.stop_at_step_end():
        assert not signals.received and not signals.has_lost_launcher
        launcher.kill()
        wait_until(lambda: signals.received)
        assert signals.received == stop.LAUNCHER_END and signals.has_lost_launcher
        launcher.wait()
        assert signals.has_lost_launcher
    signals.close()


def test_close_restores_the_signal_handlers() -> None:
    original = signal.getsignal(signal.SIGTERM)
    stop_signals = StopSignals(is_reporter=False)
    assert signal.getsignal(signal.SIGTERM) != original
    stop_signals.close()
    assert signal.getsignal(signal.SIGTERM) == original


def test_close_closes_the_pipe_though_all_signals_are_ignored() -> None:
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
    originals = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        stop_signals = StopSignals(is_reporter=False)
        read_end = stop_signals._read_end
        stop_signals.close()
        stop_signals.close()
        previous = signal.set_wakeup_fd(-1)
        assert previous == -1
        wait_until(lambda: not Path(f"/proc/self/fd/{read_end}").exists())
    finally:
        for number, original in originals.items():
            signal.signal(number, original)


@pytest.mark.parametrize("has_trained", [False, True])
def test_line_about_a_lost_launcher_says_whether_training_was_over(
    has_trained: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    signals = StopSignals(is_reporter=False)
    if has_trained:
        with signals.stop_at_step_end():
            pass
    monkeypatch.setattr(stop, "wait_for_end", lambda pid: None)
    monkeypatch.setattr(stop.os, "_exit", lambda code: None)
    signals._watch_launcher(7)
    signals.close()
    assert f"has ended {'after' if has_trained else 'before'} training" in capsys.readouterr().err


def test_reason_of_another_rank_stops_this_rank(signals: StopSignals) -> None:
    check = StopCheck(signals, None, None, step_times_of(1.0), 2, lambda values: [3.0, values[1]])
    assert check(1, 0.0, never) == stop.REASONS[3] == "SIGUSR1"


def test_short_steps_are_not_all_checked(signals: StopSignals, tmp_path: Path) -> None:
    exchanges = []

    def record_exchange(values: list[float]) -> list[float]:
        exchanges.append(values)
        return values

    check = StopCheck(signals, tmp_path, None, step_times_of(0.01), 2, record_exchange)
    assert [check(step, 0.0, never) for step in range(1, 101)] == [""] * 100
    assert len(exchanges) == 5  # every 20 steps at least
    single_rank_check = StopCheck(signals, tmp_path, None, step_times_of(0.01), 1, record_exchange)
    exchanges.clear()
    assert [single_rank_check(step, 0.0, never) for step in range(1, 11)] == [""] * 10 and len(exchanges) < 10
    (tmp_path / "stop").touch()
    time.sleep(0.11)
    assert single_rank_check(11, 0.0, never)
    (tmp_path / "stop").unlink()
    slow = StopCheck(signals, tmp_path, None, step_times_of(3.0), 2, record_exchange)
    exchanges.clear()
    assert [slow(step, 0.0, never) for step in range(1, 11)] == [""] * 10 and len(exchanges) == 10


def test_stop_file_stops_the_run_and_is_removed(signals: StopSignals, tmp_path: Path) -> None:
    check = StopCheck(signals, tmp_path, None, step_times_of(3.0), 1, single_rank)
    assert check(1, 0.0, never) == ""
    (tmp_path / "stop").touch()
    assert check(2, 0.0, never) == "the file `stop` in the run folder"
    check.remove_stop_file()
    check.remove_stop_file()
    assert not (tmp_path / "stop").exists()


def test_deadline_leaves_time_for_two_steps_a_save_and_an_evaluation(
    signals: StopSignals, monkeypatch: pytest.MonkeyPatch
) -> None:
    step_times = step_times_of(100.0, 2.0, 3.0)  # the first step warms up and does not count
    step_times.record_evaluation(20.0)
    now = time.time()
    monkeypatch.setattr(stop.time, "time", lambda: now)

    def reason(deadline: float, has_evaluation: bool = False) -> str:
        return StopCheck(signals, None, (deadline, "the time limit"), step_times, 1, single_rank)(
            3, 4.0, lambda _: has_evaluation
        )

    assert reason(now + 2 * 3 + 4 + 1) == "" and reason(now + 2 * 3 + 4 - 0.1) == "the time limit"
    assert reason(now + 2 * 3 + 4 + 20 + 1, has_evaluation=True) == ""
    assert reason(now + 2 * 3 + 4 + 20 - 0.1, has_evaluation=True) == "the time limit"


def test_deadline_leaves_time_for_the_steps_in_the_queue_of_a_gpu(
    signals: StopSignals, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time()
    monkeypatch.setattr(stop.time, "time", lambda: now)

    def reason(seconds_left: float, lag_steps: int) -> str:
        deadline = (now + seconds_left, "the time limit")
        return StopCheck(signals, None, deadline, step_times_of(3.0), 1, single_rank, lag_steps)(3, 0.0, never)

    assert reason(8.0, lag_steps=0) == "" and reason(8.0, lag_steps=1) == "the time limit"
    assert reason(10.0, lag_steps=1) == ""


def test_slow_step_counts_for_at_most_200_steps() -> None:
    step_times = step_times_of(100.0, 1.0, 1.0, 9.0, *[1.0] * 110)
    assert step_times.slowest_step_seconds == 9.0
    for _ in range(90):
        step_times.record_step(1.0)
    assert step_times.slowest_step_seconds == 1.0


def test_one_slow_step_does_not_make_checks_frequent_for_long(signals: StopSignals) -> None:
    checked_steps = []

    def record_step_number(values: list[float]) -> list[float]:
        checked_steps.append(step)
        return values

    step_times = step_times_of(3.0, 0.005, 2.0)  # in the third step a GPU selects its kernels
    check = StopCheck(signals, None, None, step_times, 2, record_step_number)
    for step in range(200):
        step_times.record_step(0.005)
        assert check(step, 0.0, never) == ""
    last = checked_steps[-1]
    assert checked_steps[:5] == [0, 1, 2, 3, 4] and checked_steps[-3:] == [last - 40, last - 20, last]
    assert len(checked_steps) < 45


def test_near_the_deadline_all_steps_count_as_slow(signals: StopSignals, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr(stop.time, "time", lambda: clock[0])
    step_times = step_times_of(1.0, 1.0, 1.0, *[0.005] * 60)
    check = StopCheck(signals, None, (1100.0, "the time limit"), step_times, 2, single_rank)
    step = 0
    while clock[0] < 1097.0:
        clock[0] += 0.005
        step_times.record_step(0.005)
        step_times.record_step(1.0 if step % 40 == 0 else 0.005)
        step += 1
        assert check(step, 0.0, never) == ""
    reason = ""
    while not reason and clock[0] < 1200.0:  # from now on each step is slow
        clock[0] += 1.0
        step_times.record_step(1.0)
        step += 1
        reason = check(step, 0.0, never)
    assert reason == "the time limit" and clock[0] <= 1100.0


def test_earlier_of_time_limit_and_job_end_is_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    assert stop.find_deadline(None, 1000.0) is None and stop.find_deadline(60.0, 1000.0) == (1060.0, "the time limit")
    monkeypatch.setenv("SLURM_JOB_END_TIME", "1030")
    assert stop.find_deadline(60.0, 1000.0) == stop.find_deadline(None, 1000.0) == (1030.0, stop.JOB_END)
    for text in ("not yet known", "²", "999"):  # 999: the end of another job
        monkeypatch.setenv("SLURM_JOB_END_TIME", text)
        assert stop.find_deadline(60.0, 1000.0) == (1060.0, "the time limit")
