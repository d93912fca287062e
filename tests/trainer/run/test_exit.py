"""Errors under real launchers: one line from rank 0, and no rank hangs."""

from collections.abc import Callable
from pathlib import Path

import pytest
from support.processes import ACCELERATE, MAIN, REPOSITORY, SMALL, CommandResult, torchrun

from trainer.run.exit import OUTCOME_VARIABLE, is_outcome_requested, read_outcome, would_repeat_failure, write_outcome


def test_accelerate_cpu_flag_that_starts_one_process_is_refused(launch: Callable[..., CommandResult]) -> None:
    done = launch([*ACCELERATE, "--cpu", "--num_processes", "2", MAIN, *SMALL])
    assert done.code != 0
    (line,) = [line for line in done.err.splitlines() if line.startswith("samecurve: ")]
    assert "asked for several processes" in line and "multi_cpu.yaml" in line
    assert not Path("runs").exists()


def test_user_error_on_two_ranks_is_one_line(launch: Callable[..., CommandResult], image_folder: Path) -> None:
    (image_folder / "train" / "cat" / "0.png").write_bytes(b"broken")  # only rank 0 decodes it
    folder = ["data.name=image_folder", f"data.root={image_folder}", "data.global_batch_size=4", "run.root=runs"]
    for settings, message in ((["train.epoch=3"], "did you mean 'train.epochs'"), (folder, "cannot be decoded")):
        done = launch(torchrun(2, MAIN, *SMALL, *settings), timeout_seconds=150)
        assert done.code != 0
        lines = [line for line in done.err.splitlines() if line.startswith("samecurve: ")]
        assert len(lines) == 1 and message in lines[0], done.err
        assert "Traceback" not in done.err.split("torch/distributed")[0]
        assert "exitcode  : 2" in done.err  # torchrun reports the rank's exit code and itself exits with 1
    assert not list(Path("runs").glob("*/config.yaml"))


def test_defect_on_one_rank_ends_all_ranks_with_its_traceback(launch: Callable[..., CommandResult]) -> None:
    done = launch(
        torchrun(2, str(REPOSITORY / "tests" / "support" / "workers" / "failing_rank.py"), *SMALL), timeout_seconds=150
    )
    assert done.code != 0
    report = done.err[done.err.rindex("Failures:") :]  # either rank may be listed first
    assert "RuntimeError: planted on rank 1" in report  # torchrun's report contains it


def test_user_error_of_an_earlier_attempt_would_repeat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "outcome"
    monkeypatch.setenv(OUTCOME_VARIABLE, str(path))
    assert read_outcome(path) is None and not would_repeat_failure(rank=0)
    write_outcome(2, "wrong setting")
    assert read_outcome(path) == (2, "wrong setting")
    assert would_repeat_failure(rank=0) and would_repeat_failure(rank=1) and path.exists()


def test_other_outcome_of_an_earlier_attempt_is_removed_by_rank_0(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "outcome"
    monkeypatch.setenv(OUTCOME_VARIABLE, str(path))
    write_outcome(75, "SIGTERM")
    assert not would_repeat_failure(rank=1) and path.exists()
    assert not would_repeat_failure(rank=0) and not path.exists()


def test_no_outcome_is_written_without_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(OUTCOME_VARIABLE, raising=False)
    write_outcome(2, "wrong setting")  # does nothing
    assert not is_outcome_requested() and not would_repeat_failure(rank=0)


def test_full_disk_does_not_hide_the_exit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(OUTCOME_VARIABLE, str(tmp_path / "missing" / "outcome"))
    write_outcome(0, "")
    assert "outcome cannot be written (No such file or directory)" in capfd.readouterr().err
