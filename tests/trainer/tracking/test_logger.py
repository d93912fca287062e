"""Tests the order and the timing of MetricLogger: rows are sent once a second, and before every other event."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from support.processes import SMALL

from trainer import main
from trainer.config.load import load_config
from trainer.inference.evaluation import Evaluation, evaluate_split
from trainer.run.checkpoint import Progress
from trainer.tracking.console import NullConsole
from trainer.tracking.jsonl import NullJsonLines
from trainer.tracking.logger import MetricLogger
from trainer.tracking.tracker import Tracker


class RecordingTracker(Tracker):
    """Records the steps of rows, and the names of other events."""

    def __init__(self) -> None:
        self.events: list[int | str] = []
        self.wall_times: list[float | None] = []

    def log(self, split: str, scalars: dict[str, float], step: int, wall_time: float | None = None) -> None:
        self.events.append(step)
        self.wall_times.append(wall_time)

    def on_start(self, *_: object) -> None:
        self.events.append("start")

    def log_media(self, *_: object) -> None:
        self.events.append("media")

    def log_summary(self, *_: object) -> None:
        self.events.append("summary")

    def alert(self, title: str, text: str, urgent: bool) -> None:
        self.events.append(title)

    def flush(self) -> None:
        self.events.append("flush")

    def close(self, failed: bool = False) -> None:
        self.events.append("close")


class FailingTracker(RecordingTracker):
    """Raises an error for the row of step 2 and at close."""

    def log(self, split: str, scalars: dict[str, float], step: int, wall_time: float | None = None) -> None:
        if step == 2:
            raise OSError("step 2 fails")
        super().log(split, scalars, step)

    def close(self, failed: bool = False) -> None:
        super().close(failed)
        raise RuntimeError("close fails")


class FakeClock:
    """Replaces the clock of the logger."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seconds = 0.0
        clock = SimpleNamespace(monotonic=lambda: self.seconds, time=lambda: 1e9 + self.seconds, perf_counter=lambda: 0)
        monkeypatch.setattr("trainer.tracking.logger.time", clock)


class LoggerUnderTest(MetricLogger):
    """A logger with fixed metrics."""

    def __init__(self, *trackers: Tracker) -> None:
        components: Any = SimpleNamespace(
            batches=SimpleNamespace(samples_before=lambda step: step),
            durations=SimpleNamespace(total_steps=100, steps_per_epoch=10),
            schedule=SimpleNamespace(lr_factor=lambda step: 1.0),
        )
        super().__init__(load_config([], ["run.name=x"]), components, Progress(), NullConsole())
        self.trackers = [*trackers]

    def log_step(self, step: int) -> None:
        meter: Any = SimpleNamespace(read=lambda: {"loss": 1.0, "samples_per_second": 10.0})
        self._progress.step = step
        self.log_training(meter)


def test_training_rows_are_sent_once_a_second_with_their_own_times(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, tracker = FakeClock(monkeypatch), RecordingTracker()
    logger = LoggerUnderTest(tracker)
    for step, clock.seconds in enumerate([0.0, 0.1, 0.9, 1.0, 1.5]):
        logger.log_step(step)
        tracker.events.append("|")
    assert tracker.events == [0, "|", "|", "|", 1, 2, 3, "|", "|"]
    assert tracker.wall_times == [1e9, 1e9 + 0.1, 1e9 + 0.9, 1e9 + 1.0]


def test_pending_rows_are_sent_before_evaluation_alert_checkpoint_and_close(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeClock(monkeypatch)
    tracker = RecordingTracker()
    logger = LoggerUnderTest(tracker)
    logger.log_step(3)
    tracker.events.clear()
    logger.log_step(4)
    logger.log_evaluation("test", Evaluation(0.5, 0.5, 4, (), ()))
    logger.log_step(5)
    logger.alert("alert", "", urgent=False)
    logger.log_step(6)
    logger.flush()  # by the thread that writes checkpoints: it must not send rows
    logger.before_checkpoint()
    logger.log_step(7)
    logger.close(failed=False)
    logger.close(failed=True)
    assert tracker.events == [4, 4, 5, "x: alert", "flush", 6, 7, "close"]


def test_event_without_pending_rows_does_not_delay_the_next_row(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, tracker = FakeClock(monkeypatch), RecordingTracker()
    logger = LoggerUnderTest(tracker)
    logger.log_step(1)
    clock.seconds = 60.0
    logger.alert("alert", "", urgent=False)
    logger.log_step(2)
    assert tracker.events == [1, "x: alert", 2]


SUMMARY = {"test": {"accuracy": 0.5}, "steps": 2}
ANY = cast(Any, None)


@pytest.mark.parametrize(
    ("send", "event"),
    [
        (lambda logger: logger.log_first_batch(ANY, ANY, ANY), "start"),
        (lambda logger: logger.log_media(ANY), "media"),
        (lambda logger: logger.log_summary(SUMMARY, ANY), "summary"),
        (lambda logger: logger.warn("warning"), "x: loss or gradient not finite"),
    ],
)
def test_event_is_sent_after_pending_rows(send: Callable[[MetricLogger], None], event: str) -> None:
    tracker = RecordingTracker()
    logger = LoggerUnderTest(tracker)
    logger.log_step(1)
    logger.log_step(2)
    send(logger)
    assert tracker.events[:3] == [1, 2, event]


def test_console_prints_pending_rows_before_profile_and_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = FakeClock(monkeypatch)
    printed: list[str] = []

    class RecordingConsole(NullConsole):
        def log_training(self, rows: Any) -> None:
            printed.extend(f"step {row.step}" for row in rows)

        def log_profile(self, operations: Any, title: str) -> None:
            printed.append(title)

        def log(self, text: str) -> None:
            printed.append(text)

    logger = LoggerUnderTest()
    logger._console = RecordingConsole()
    logger.log_step(2)
    clock.seconds = 0.5
    logger.log_step(3)
    logger.log_profile([], "profile")
    logger.log_step(4)
    logger.warn("warning")
    assert printed == ["step 2", "step 3", "profile", "step 4", "warning"]


def test_tracker_that_logs_immediately_gets_each_row_at_once() -> None:
    immediate, other = RecordingTracker(), RecordingTracker()
    immediate.logs_immediately = True
    logger = LoggerUnderTest(immediate, other)
    for step in (1, 2, 3):
        logger.log_step(step)
    assert immediate.events == [1, 2, 3] and other.events == [1]
    logger.before_checkpoint()
    assert immediate.events == other.events == [1, 2, 3]


def test_rows_reach_all_other_trackers_if_one_fails() -> None:
    failing, other = FailingTracker(), RecordingTracker()
    logger = LoggerUnderTest(failing, other)
    printed: list[int] = []
    logger._console = console = NullConsole()
    console.log_training = lambda rows: printed.extend(row.step for row in rows)  # type: ignore[method-assign]
    for step in (1, 2, 3):
        logger.log_step(step)
    with pytest.raises(OSError, match="step 2 fails"):
        logger.before_checkpoint()
    assert failing.events == [1] and other.events == printed == [1, 2, 3]
    with pytest.raises(RuntimeError, match="close fails"):
        logger.close(failed=True)
    assert failing.events == [1, "close"] and other.events == [1, 2, 3, "close"]


def test_failing_tracker_does_not_keep_others_open() -> None:
    closed: list[tuple[str, bool]] = []

    class ClosingTracker(Tracker):
        def close(self, failed: bool = False) -> None:
            closed.append(("tracker", failed))

    class ClosingLines(NullJsonLines):
        def close(self, failed: bool = False) -> None:
            closed.append(("bad steps", failed))

    logger = LoggerUnderTest(FailingTracker(), ClosingTracker())
    logger.bad_steps_file = ClosingLines()
    with pytest.raises(RuntimeError, match="close fails"):
        logger.close(failed=True)
    assert closed == [("tracker", True), ("bad steps", True)]


def test_evaluation_that_metrics_file_has_already_is_not_logged_again() -> None:
    tracker = RecordingTracker()
    logger = LoggerUnderTest(tracker)
    logger.logged_splits = {"test"}
    logger.log_evaluation("test", Evaluation(0.5, 0.5, 4, (), ()))
    assert tracker.events == []
    logger.log_evaluation("validation", Evaluation(0.5, 0.5, 4, (), ()))
    logger._progress.step = 9
    logger.log_evaluation("test", Evaluation(0.5, 0.5, 4, (), ()))
    assert tracker.events == [0, 9]


class TestWholeRun:
    """Real runs with a tracker that records events."""

    def test_checkpoint_is_written_after_its_rows(self, monkeypatch: pytest.MonkeyPatch) -> None:
        tracker = RecordingTracker()
        monkeypatch.setattr("trainer.tracking.logger._FLUSH_INTERVAL_SECONDS", 1e9)
        monkeypatch.setattr("trainer.session.build_trackers", lambda *_: [tracker])
        settings = ["train.max_steps=6", "log.every_steps=1", "checkpoint.every_steps=3", "eval.every_epochs=0"]
        assert main.main([*SMALL, *settings]) == 0
        rows_before_flush = tracker.events[: tracker.events.index("flush")]
        assert rows_before_flush[:3] == [1, 2, 3]

    def test_rows_are_sent_before_an_evaluation_starts(self, monkeypatch: pytest.MonkeyPatch) -> None:
        tracker = RecordingTracker()
        events_before_evaluation: list[list[int | str]] = []

        def evaluate(*arguments: Any) -> Any:
            events_before_evaluation.append([*tracker.events])
            return evaluate_split(*arguments)

        monkeypatch.setattr("trainer.tracking.logger._FLUSH_INTERVAL_SECONDS", 1e9)
        monkeypatch.setattr("trainer.session.build_trackers", lambda *_: [tracker])
        monkeypatch.setattr("trainer.build.evaluate_split", evaluate)
        assert main.main([*SMALL, "train.max_steps=3", "log.every_steps=1"]) == 0
        assert events_before_evaluation == [[1, 2, 3]]

    def test_profile_is_written_if_a_tracker_fails_to_close(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def evaluate(*_: object) -> None:
            raise ArithmeticError("evaluation fails")

        tracker = FailingTracker()
        monkeypatch.setattr("trainer.session.build_trackers", lambda *_: [tracker])
        monkeypatch.setattr("trainer.build.evaluate_split", evaluate)
        settings = ["train.max_steps=50", "train.profile=20-40", "eval.every_epochs=1", "run.name=x"]
        with pytest.raises(RuntimeError, match="close fails"):
            main.main([*SMALL, *settings])
        assert tracker.events[-2:] == ["x: failed", "close"]
        assert list(Path("runs/x/profile").glob("rank-0.*"))


def test_best_evaluation_so_far_is_of_the_validation_part(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeClock(monkeypatch)
    logger, texts = LoggerUnderTest(), []
    monkeypatch.setattr(logger._console, "log_evaluation", lambda *arguments: texts.append(arguments[-1]))
    for step, accuracy in ((1, 0.5), (2, 0.75), (3, 0.75)):
        logger._progress.step = step
        logger.log_evaluation("test", Evaluation(0.5, accuracy, 4, (), ()))
    assert texts == ["test 50.00% at step 1", "test 75.00% at step 2", "test 75.00% at step 2"]
    logger._config = load_config([], ["run.name=x", "data.validation_fraction=0.5"])
    logger.best = None
    for split, accuracy in (("validation", 0.5), ("test", 0.9)):
        logger.log_evaluation(split, Evaluation(0.5, accuracy, 4, (), ()))
    assert texts[3:] == ["validation 50.00% at step 3"] * 2
