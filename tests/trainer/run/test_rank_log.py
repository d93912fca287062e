"""Rank logs: each session adds its lines, an error or a kill is visible, and a full disk loses no line."""

import errno
import io
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console as Terminal
from support.processes import SMALL, Ranks

from trainer.errors import TrainingError
from trainer.run import rank_log
from trainer.run.rank_log import RankLog
from trainer.tracking.console import Console, TrainingRow


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "runs" / "x"
    path.mkdir(parents=True)
    return path


def read_log(folder: Path, rank: int) -> str:
    return (folder / "logs" / f"rank-{rank}.log").read_text()


def test_log_contains_a_killed_peer_and_then_the_next_session(ranks: Ranks) -> None:
    run = [*SMALL, "run.root=runs", "run.name=x", "log.every_steps=2", "checkpoint.every_steps=3"]
    started = ranks.start(2, *run, "train.epochs=9999")
    folder = Path("runs/x")
    ranks.wait_for_step(folder, 6)
    os.kill(started[1].pid, signal.SIGKILL)
    assert ranks.join(started) == [1, -9]
    first = read_log(folder, 0)
    lines = first.splitlines()
    assert f"rank 0 of 2 on cpu (cpu:0), process {started[0].pid}, at step 0" in lines[0]
    assert lines[1].startswith("training x: lenet") and lines[2].startswith("step 2/")
    assert f"samecurve: rank 1 (process {started[1].pid}) is gone" in lines[-2] and "Traceback" not in first
    assert lines[-1].endswith("rank 0 ends early")
    assert len(read_log(folder, 1).splitlines()) == 1  # a killed rank logs no end
    first_starts = (folder / "starts.jsonl").read_text()

    status = json.loads((folder / "status.json").read_text())
    job = {"SLURM_JOB_ID": "15", "SLURM_ARRAY_JOB_ID": "13", "SLURM_ARRAY_TASK_ID": "1"}
    ranks.run(2, *run, f"train.max_steps={status['step'] + 9}", "train.epochs=99", **job)
    for rank in (0, 1):
        heads = [line for line in read_log(folder, rank).splitlines() if line.startswith("== ")]
        assert f"rank {rank} of 2" in heads[-2] and heads[-1].endswith(f"rank {rank} ends")
    assert read_log(folder, 0).startswith(first) and "at step 0" not in read_log(folder, 0)[len(first) :]
    assert "│ nine  │" in read_log(folder, 0) and "test at step" in read_log(folder, 0)

    assert (folder / "starts.jsonl").read_text().startswith(first_starts)
    rows = [json.loads(line) for line in (folder / "starts.jsonl").read_text().splitlines()]
    assert [row["job"] for row in rows] == [None, "15"]
    assert rows[0]["step"] == 0 and rows[1]["step"] > 0 and rows[1]["step"] % 3 == 0
    assert rows[1]["total_steps"] == status["step"] + 9 and rows[0]["world_size"] == 2
    assert (rows[1]["array_job"], rows[1]["array_task"]) == ("13", 1) and rows[0]["pid"] == started[0].pid


def test_lines_before_on_start_are_not_written(folder: Path) -> None:
    with pytest.raises(TrainingError), RankLog(folder, 0) as log:
        log.write("early")
        raise TrainingError("refused")
    assert not (folder / "logs").exists()


def test_machine_without_the_run_folder_has_no_log(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with RankLog(tmp_path / "elsewhere" / "x", 3) as log:
        log.on_start(0, 4, "cpu")
    assert not (tmp_path / "elsewhere").exists() and capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("error", "has_traceback"), [(TrainingError("too many"), False), (ValueError("a defect"), True)]
)
def test_user_error_is_one_line_and_defect_has_its_traceback(
    folder: Path, error: Exception, has_traceback: bool
) -> None:
    with pytest.raises(type(error)), RankLog(folder, 1) as log:
        log.on_start(5, 2, "cpu")
        raise error
    lines = read_log(folder, 1).splitlines()
    assert len(lines) == 3 or has_traceback
    assert ("Traceback" in lines[1] and __file__ in lines[2]) if has_traceback else lines[1] == "samecurve: too many"
    assert str(error) in lines[-2] and "at step 5" in lines[0]


class FullDiskFile(io.FileIO):
    """A file on a disk with 5 free bytes, until `has_room`."""

    has_room = False

    def write(self, content: bytes) -> int:  # type: ignore[override]
        if FullDiskFile.has_room:
            return super().write(content)
        if os.fstat(self.fileno()).st_size >= 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(content[:5])


def test_full_disk_is_one_warning_and_loses_no_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rank_log, "FileIO", FullDiskFile)
    with RankLog(folder, 0) as log:
        log.on_start(0, 1, "cpu")
        log.write("first")
        log.write("second")
        assert read_log(folder, 0) == "== 20"
        warning = capfd.readouterr().err
        assert warning.count("\n") == 1 and "rank-0.log cannot be written (No space left on device)" in warning
        monkeypatch.setattr(FullDiskFile, "has_room", True)
        log.write("third")
    lines = read_log(folder, 0).splitlines()
    assert lines[0].startswith("== 20") and lines[1:4] == ["first", "second", "third"]


def test_removed_log_is_created_again(folder: Path) -> None:
    with RankLog(folder, 0) as log:
        log.on_start(0, 1, "cpu")
        (folder / "logs" / "rank-0.log").unlink()
        log.write("after")
    assert read_log(folder, 0).splitlines()[0] == "after"


@pytest.mark.parametrize("with_bar", [True, False])
def test_log_contains_the_lines_that_a_progress_bar_replaces(with_bar: bool, tmp_path: Path) -> None:
    lines: list[str] = []
    write_log: Callable[[str], None] = lines.append
    console = Console(write_log)
    console._terminal = Terminal(file=io.StringIO(), force_terminal=with_bar, width=40)
    console.start(0, 9)
    console.log_training(
        [TrainingRow(3, {"epoch": 0.5, "loss": 1.0, "accuracy": 0.25, "samples_per_second": 99.0}, 0.0, 4.0)]
    )
    console.log_evaluation("test", 3, {"loss": 2.0, "accuracy": 0.5})
    scores = {"name": "a class", "precision": 1.0, "recall": 1.0, "f1": 1.0, "support": 2}
    console.log_summary(
        {
            "test": {"classes": [scores], "accuracy": 0.5, "num_samples": 2},
            "train": {"samples_per_second": 99.0},
            "world_size": 1, "steps": 9, "epochs": 1.5, "seconds": 3.0,
        },
        tmp_path,
    )  # fmt: skip
    assert lines[0] == "step 3/9  epoch 0.50  loss 1.0000  accuracy 25.0%  99 images/s  4.0 s left"
    assert lines[1].startswith("test at step 3") and "a class" in lines[2] and "\x1b" not in "".join(lines)
    assert lines[3].startswith("test accuracy 50.00%") and lines[4].startswith("all files")
