"""Trackers, with the real clients: what is logged is read back from their own files."""

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from support.processes import SMALL
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from trainer import main
from trainer.config.load import load_config
from trainer.config.schema import RunConfig
from trainer.errors import UserError
from trainer.inference import evaluation
from trainer.inference.evaluation import Evaluation, evaluate_chunks
from trainer.run.checkpoint import Progress
from trainer.run.folder import RunFolder
from trainer.tracking import trackers
from trainer.tracking.console import NullConsole
from trainer.tracking.jsonl import FileIO, JsonLines, MetricsFile, NullJsonLines
from trainer.tracking.logger import MetricLogger
from trainer.tracking.tensorboard import TensorBoardTracker
from trainer.tracking.tracker import Tracker
from trainer.tracking.trackers import build_trackers, wandb_run_id
from trainer.tracking.wandb import WandbTracker
from trainer.tracking.wandb_mode import decide_mode

LEET = [str(Path(sys.executable).parent / "wandb"), "leet", "inspect", "--json"]
ROW = {"loss": 0.5, "accuracy": 0.25, "lr": 1e-3}


def config(*overrides: str) -> RunConfig:
    return load_config([], ["run.name=x", *overrides])


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    (tmp_path / "run of mine").mkdir()
    return RunFolder(tmp_path / "run of mine")


def test_json_lines_are_written_through(folder: RunFolder) -> None:
    tracker = MetricsFile(folder.metrics, print)
    tracker.log("train", ROW, 7)
    assert json.loads(folder.metrics.read_text()) == {"split": "train", "step": 7, **ROW}
    tracker.close()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # TensorBoard's reader, of its own protobuf
def test_tensorboard_takes_back_what_a_killed_run_wrote_beyond_its_checkpoint(folder: RunFolder) -> None:
    first = TensorBoardTracker(folder.path / "tensorboard", first_step=0, warn=print)
    for step in (1, 2, 3):
        first.log("train", {"loss": float(step)}, step)
    first.close()
    second = TensorBoardTracker(folder.path / "tensorboard", first_step=2, warn=print)
    second.log("train", {"loss": 30.0}, 3)
    second.close()
    events = EventAccumulator(str(folder.path / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    assert [(row.step, row.value) for row in events.Scalars("train/loss")] == [(1, 1.0), (2, 2.0), (3, 30.0)]
    from_the_start = TensorBoardTracker(folder.path / "tensorboard", first_step=0, warn=print)
    from_the_start.log("train", {"loss": 10.0}, 1)
    from_the_start.flush()  # on the disk now, whatever becomes of this process
    events = EventAccumulator(str(folder.path / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    assert [(row.step, row.value) for row in events.Scalars("train/loss")] == [(1, 10.0)]
    from_the_start.close()


@pytest.mark.filterwarnings("ignore")  # wandb's own, of its imports
def test_wandb_offline_holds_every_row_and_the_settings(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    (folder.path / "starts.jsonl").write_text("{}\n{}\n{}\n")
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    settings = ["run.name=sweep/a", "log.wandb=auto", "log.project=p q", "log.tags=[fast, small]", "log.notes=a note"]
    tracker = WandbTracker(config(*settings), folder, "abcd1234", said.append)
    for step in (10, 20):
        tracker.log("train", ROW, step)
        tracker.log("test", {"accuracy": 0.5}, step)
    tracker.close()
    (line,) = said
    assert line.startswith("W&B: offline (no API key") and "wandb sync '" in line  # a folder with blanks is quoted
    (place,) = (folder.path / "wandb").glob("offline-run-*")
    assert str(place) in line
    shown = subprocess.run(
        [*LEET, "--summary", str(place)],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    run = json.loads(shown.stdout)
    assert run["state"] == "finished" and run["exit_code"] == 0 and run["project"] == "p q"
    assert run["run_id"] == "abcd1234"
    assert (
        run["summary"]["train/loss"] == 0.5 and run["summary"]["step"] == 20 and run["summary"]["test/accuracy"] == 0.5
    )
    assert run["config"]["optim"]["lr"] == 0.1
    assert run["config"]["restarts"] == 2 and run["config"]["slurm"]["job"] == "77"
    shown = subprocess.run([*LEET, str(place)], capture_output=True, text=True, timeout=60, check=True)
    (about,) = [row["run"] for row in map(json.loads, shown.stdout.splitlines()) if row.get("type") == "run"]
    assert about["run_group"] == "sweep" and about["tags"] == ["fast", "small"] and about["notes"] == "a note"
    assert about["job_type"] == "train"


@pytest.mark.filterwarnings("ignore")  # wandb's own, of its imports, and of TensorBoard's reader
def test_rows_have_the_time_when_they_were_measured(folder: RunFolder) -> None:
    built = build_trackers(config("log.wandb=offline"), folder, 0, "abcd1234", print)
    assert [type(tracker) for tracker in built] == [MetricsFile, WandbTracker, TensorBoardTracker]
    for tracker in built:
        tracker.log("train", ROW, 7, at=1.7e9)
        tracker.log("train", ROW, 8, at=1.7e9 + 0.5)
        tracker.close()
    wanted = [(7, 1.7e9), (8, 1.7e9 + 0.5)]
    (place,) = (folder.path / "wandb").glob("offline-run-*")
    shown = subprocess.run([*LEET, str(place)], capture_output=True, text=True, timeout=60, check=True)
    items = [record["history"]["item"] for record in map(json.loads, shown.stdout.splitlines()) if "history" in record]
    assert [(item["step"], item["_timestamp"]) for item in items] == wanted
    events = EventAccumulator(str(folder.path / "tensorboard"))
    events.Reload()
    assert [(row.step, row.wall_time) for row in events.Scalars("train/loss")] == wanted


class Told(trackers.Tracker):
    """Keeps the steps of its rows, and by name what else it is told."""

    def __init__(self) -> None:
        self.all: list[int | str] = []
        self.at: list[float | None] = []

    def log(self, split: str, scalars: dict[str, float], step: int, at: float | None = None) -> None:
        self.all.append(step)
        self.at.append(at)

    def alert(self, title: str, text: str, urgent: bool) -> None:
        self.all.append(title)

    def flush(self) -> None:
        self.all.append("flush")

    def close(self, failed: bool = False) -> None:
        self.all.append("close")


class Now:
    """A clock that goes where it is put."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seconds = 0.0
        clock = SimpleNamespace(monotonic=lambda: self.seconds, time=lambda: 1e9 + self.seconds, perf_counter=lambda: 0)
        monkeypatch.setattr("trainer.tracking.logger.time", clock)


class Journals:
    """A metric_logger that tells these trackers, and a meter whose readings are what they are."""

    def __init__(self, *told: trackers.Tracker) -> None:
        batches = SimpleNamespace(samples_before=lambda step: step)
        durations = SimpleNamespace(total_steps=100, steps_per_epoch=10)
        schedule = SimpleNamespace(lr_factor=lambda step: 1.0)
        parts: Any = SimpleNamespace(batches=batches, durations=durations, schedule=schedule)
        self.metric_logger = MetricLogger(config(), parts, Progress(), NullConsole())
        self.metric_logger.trackers = [*told]

    def training(self, step: int) -> None:
        meter: Any = SimpleNamespace(read=lambda: {"loss": 1.0, "samples_per_second": 10.0})
        self.metric_logger._progress.step = step
        self.metric_logger.training(meter)


def test_training_is_told_once_a_second_and_before_all_else(monkeypatch: pytest.MonkeyPatch) -> None:
    now, told = Now(monkeypatch), Told()
    of = Journals(told)
    for step, now.seconds in enumerate([0.0, 0.1, 0.9, 1.0, 1.5]):
        of.training(step)
        told.all.append("|")
    assert told.all == [0, "|", "|", "|", 1, 2, 3, "|", "|"]
    assert told.at == [1e9, 1e9 + 0.1, 1e9 + 0.9, 1e9 + 1.0], "when it was measured"
    told.all.clear()
    of.metric_logger.evaluated("test", Evaluation(0.5, 0.5, 4, (), ()))
    of.training(5)
    of.metric_logger.alert("alert", "", urgent=False)
    of.training(6)
    of.metric_logger.flush()  # the thread that saves does that: it takes no rows along
    of.metric_logger.saves()
    of.training(7)
    of.metric_logger.close(failed=False)
    of.metric_logger.close(failed=True)
    assert told.all == [4, 4, 5, "x: alert", "flush", 6, 7, "close"]


def test_what_is_told_while_nothing_waits_does_not_keep_the_next_row(monkeypatch: pytest.MonkeyPatch) -> None:
    now, told = Now(monkeypatch), Told()
    of = Journals(told)
    of.training(1)
    now.seconds = 60.0
    of.metric_logger.alert("alert", "", urgent=False)
    of.training(2)
    assert told.all == [1, "x: alert", 2]


def test_whatever_is_told_comes_after_the_rows_before_it() -> None:
    told, what = Told(), cast(Any, None)
    told.begins = told.show = told.finished = lambda *_: told.all.append("this")  # type: ignore[method-assign]
    summary = {"test": {"accuracy": 0.5}, "steps": 2}
    for tell in (
        lambda metric_logger: metric_logger.shows_beginning(what, what, what),
        lambda metric_logger: metric_logger.shows(what),
        lambda metric_logger: metric_logger.finished(summary, what),
        lambda metric_logger: metric_logger.warn("this"),
    ):
        told.all.clear()
        of = Journals(told)
        of.training(1)
        of.training(2)
        tell(of.metric_logger)
        assert told.all[:2] == [1, 2] and len(told.all) > 2
    shown: list[str] = []
    of.metric_logger._console = console = NullConsole()
    console.training = lambda rows: shown.extend(f"step {row.step}" for row in rows)  # type: ignore[method-assign, misc]
    console.profiled = lambda _, title: shown.append(title)  # type: ignore[method-assign]
    console.log = shown.append  # type: ignore[method-assign]
    of.training(3)
    of.metric_logger.profiled([], "profile")
    of.training(4)
    of.metric_logger.warn("warning")
    assert shown == ["step 3", "profile", "step 4", "warning"]


def test_what_is_told_at_once_does_not_wait() -> None:
    at_once, later = Told(), Told()
    at_once.logs_immediately = True
    of = Journals(at_once, later)
    for step in (1, 2, 3):
        of.training(step)
    assert at_once.all == [1, 2, 3] and later.all == [1]
    of.metric_logger.saves()
    assert at_once.all == later.all == [1, 2, 3]


def test_a_row_that_a_tracker_fails_on_is_told_to_all_others() -> None:
    class Failing(Told):
        def log(self, split: str, scalars: dict[str, float], step: int, at: float | None = None) -> None:
            if step == 2:
                raise OSError("no")
            super().log(split, scalars, step, at)

    failing, other = Failing(), Told()
    of = Journals(failing, other)
    shown: list[int] = []
    of.metric_logger._console = console = NullConsole()
    console.training = lambda rows: shown.extend(row.step for row in rows)  # type: ignore[method-assign]
    for step in (1, 2, 3):
        of.training(step)
    with pytest.raises(OSError, match="no"):
        of.metric_logger.saves()
    assert failing.all == [1] and other.all == shown == [1, 2, 3]
    of.metric_logger.close(failed=True)
    assert failing.all == [1, "close"] and other.all == [1, 2, 3, "close"]


def test_a_checkpoint_comes_after_the_rows_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    told = Told()
    monkeypatch.setattr("trainer.tracking.logger._SECONDS", 1e9)
    monkeypatch.setattr(trackers, "build", lambda *_: [told])
    arguments = [*SMALL, "train.max_steps=6", "log.every_steps=1", "checkpoint.every_steps=3", "eval.every_epochs=0"]
    assert main.main(arguments) == 0
    steps, flushed = [], []
    for each in told.all:
        if each == "flush":
            flushed.append(list(steps))
        elif isinstance(each, int):
            steps.append(each)
    assert flushed[0][:3] == [1, 2, 3]


def test_an_evaluation_does_not_keep_rows_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    told, before = Told(), []
    evaluate = evaluate_chunks
    monkeypatch.setattr("trainer.tracking.logger._SECONDS", 1e9)
    monkeypatch.setattr(trackers, "build", lambda *_: [told])
    monkeypatch.setattr(evaluation, "evaluate", lambda *given: before.append([*told.all]) or evaluate(*given))
    assert main.main([*SMALL, "train.max_steps=3", "log.every_steps=1"]) == 0
    assert before == [[1, 2, 3]]


def test_a_tracker_that_cannot_close_leaves_no_profile_unwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    def evaluate(*_: object) -> None:
        raise ArithmeticError("of the run")

    class Failing(Told):
        def close(self, failed: bool = False) -> None:
            super().close(failed)
            raise RuntimeError("of W&B's own")

    told = Failing()
    monkeypatch.setattr(trackers, "build", lambda *_: [told])
    monkeypatch.setattr(evaluation, "evaluate", evaluate)
    with pytest.raises(RuntimeError, match="of W&B's own"):
        main.main([*SMALL, "train.max_steps=50", "train.profile=20-40", "eval.every_epochs=1", "run.name=x"])
    assert told.all[-2:] == ["x: failed", "close"]
    assert list(Path("runs/x/profile").glob("rank-0.*"))


def test_a_continued_run_keeps_its_wandb_id(folder: RunFolder) -> None:
    asked = config("log.wandb=offline")
    first = wandb_run_id(asked, folder, of_checkpoint="")
    assert re.fullmatch("[0-9a-f]{8}", first) and wandb_run_id(asked, folder, of_checkpoint="") == first
    assert wandb_run_id(asked, folder, of_checkpoint="abcd1234") == first, "that of the folder counts"
    (folder.path / "wandb" / "run-id").unlink()
    assert wandb_run_id(asked, folder, of_checkpoint="abcd1234") == "abcd1234"
    assert (folder.path / "wandb" / "run-id").read_text() == "abcd1234"
    off = config("log.wandb=off")
    assert wandb_run_id(off, folder, of_checkpoint="") == "", "no id where there is no run"
    assert wandb_run_id(off, folder, of_checkpoint="abcd1234") == "abcd1234", "for when it is on again"


class TestWandBMode:
    @pytest.fixture(autouse=True)
    def nobody_listens(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import wandb

        wandb.teardown()  # it reads its variables once a process
        monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # the port of discard: refused at once

    def test_auto_without_a_key_is_offline(self) -> None:
        mode, why = decide_mode("auto")
        assert mode == "offline" and "WANDB_API_KEY" in why

    def test_auto_without_a_network_is_offline(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
        mode, why = decide_mode("auto")
        assert mode == "offline" and "no connection to http://127.0.0.1:9" in why and "k" * 40 not in why

    def test_a_key_of_wandb_login_counts(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "netrc").write_text(f"machine 127.0.0.1 login user password {'k' * 40}\n")
        (tmp_path / "netrc").chmod(0o600)
        monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
        assert "no connection" in decide_mode("auto")[1]

    def test_online_that_cannot_be_is_an_error(self) -> None:
        with pytest.raises(UserError, match=r"log\.wandb=online: no API key.*log\.wandb=offline"):
            decide_mode("online")

    def test_wandbs_own_variable_counts_for_auto(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
        monkeypatch.setenv("WANDB_MODE", "offline")
        assert decide_mode("auto") == ("offline", "as set")


def test_trackers_are_those_that_were_asked_for(folder: RunFolder) -> None:
    built = build_trackers(config("log.wandb=off", "log.tensorboard=false"), folder, 0, "abcd1234", print)
    assert [type(tracker) for tracker in built] == [MetricsFile]
    for tracker in built:
        tracker.close()


def test_a_checkpoint_is_not_to_be_had_while_lines_wait(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    rows = JsonLines(folder.metrics, said.append)
    rows.write({"step": 1})

    class Full(FileIO):
        def write(self, content: object) -> int:
            return super().write(b'{"st')  # a disk takes what fits

    with monkeypatch.context() as disk, Full(folder.metrics, "ab") as full:
        disk.setattr(rows, "_file", full)
        for step in (2, 3):
            rows.write({"step": step})
        assert len(said) == 1 and "No space left" in said[0]
        with pytest.raises(OSError, match="No space left"):
            rows.flush()
        assert folder.metrics.read_text() == '{"step": 1}\n'  # no half of a line
    rows.flush()
    assert [json.loads(line)["step"] for line in folder.metrics.read_text().splitlines()] == [1, 2, 3]
    rows.close()


@pytest.mark.filterwarnings("ignore")  # wandb's own, of its imports
def test_a_disk_that_is_full_costs_wandbs_pictures_not_its_rows(folder: RunFolder) -> None:
    said: list[str] = []
    tracker = WandbTracker(config("log.wandb=offline"), folder, "abcd1234", said.append)
    log = tracker._run.log

    def full(row: dict[str, object]) -> None:  # a mock of the disk alone, which wandb asks for room behind this call
        if any(not isinstance(value, (int, float)) for value in row.values()):
            raise OSError(28, "No space left on device")
        log(row)

    tracker._run.log = full
    tracker.log("test", ROW, 10)
    tracker._held["test/mistakes"] = object()
    tracker.close()
    assert "left out (No space left on device)" in said[-1]
    (place,) = (folder.path / "wandb").glob("offline-run-*")
    shown = subprocess.run([*LEET, "--summary", str(place)], capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(shown.stdout)["summary"]["test/loss"] == 0.5


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("setting", ["log.project=a/b", f"log.tags=[{'t' * 70}]"])
def test_what_wandb_does_not_take_is_one_line(folder: RunFolder, setting: str) -> None:
    with pytest.raises(UserError, match="W&B does not take this run"):
        WandbTracker(config("log.wandb=offline", setting), folder, "abcd1234", print)


def test_online_beside_wandbs_own_no_is_refused(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    with pytest.raises(UserError, match="WANDB_MODE=disabled forbids it"):
        wandb_run_id(config("log.wandb=online"), folder, of_checkpoint="")


def test_a_tracker_that_cannot_close_leaves_no_other_one_open(folder: RunFolder) -> None:
    closed: list[tuple[str, bool]] = []

    class Failing(Tracker):
        def close(self, failed: bool = False) -> None:
            raise RuntimeError("of W&B's own")

    class Other(Tracker):
        def close(self, failed: bool = False) -> None:
            closed.append(("other", failed))

    class Rows(NullJsonLines):
        def close(self, failed: bool = False) -> None:
            closed.append(("rows", failed))

    metric_logger = MetricLogger(
        config(), cast(Any, None), Progress(), NullConsole()
    )  # its parts are not wanted for this
    metric_logger.trackers, metric_logger.bad_steps = [Failing(), Other()], Rows()
    with pytest.raises(RuntimeError, match="of W&B's own"):
        metric_logger.close(failed=True)
    assert closed == [("other", True), ("rows", True)]
