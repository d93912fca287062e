"""The proof itself: it passes where it should, fails where it should, and says what it could not try."""

import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from support.processes import REPOSITORY

from launch.verify import command as verify

QUIET = ["run.seed=3", "eval.every_epochs=0"]


def run(*arguments: str) -> tuple[int, str, str]:
    # Its own limit for each run comes first: then it ends what it has started.
    command = [sys.executable, str(REPOSITORY / "launch" / "main.py"), "verify", *arguments, "--timeout-seconds=150"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=500)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.slow
def test_ranks_are_the_same_with_virtual_ranks_and_not_without(tmp_path: Path) -> None:
    keep = tmp_path / "kept"
    code, out, err = run("ranks", "--ranks", "1,2", "--steps", "5", "--keep", str(keep), *QUIET)
    assert code == 0 and "SAME: wanted the same bits on 1, 2 ranks" in out, out + err
    assert (keep / "ranks-2" / "summary.json").is_file()
    # The same question about plain ranks has another answer: that shows that it is really asked.
    code, out, _ = run("ranks", "--ranks", "1,2", "--steps", "5", "train.virtual_ranks=null", *QUIET)
    assert code == 1 and "DIFFERENT" in out and "tensors differ" in out


@pytest.mark.slow
def test_killed_runs_go_on(tmp_path: Path) -> None:
    keep = str(tmp_path / "kept")
    # This seed's kills come early, at 27 and 41: a run that is seen late is not at its end yet.
    code, out, err = run("resume", "--kills", "2", "--ranks", "1,2", "--seed", "269", "--steps", "600", "--keep", keep)
    assert code == 0 and "SAME: wanted the same bits after 2 kills" in out, out + err
    assert "kill 2 of 2: after step" in out and "step-00000" in out
    commands = [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])]  # a zombie has none
    left = [command for command in commands if f"run.root={keep}" in command]
    assert not left  # of what was killed


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["ranks", "train.epoch=3"], "did you mean 'train.epochs'"),
        (["ranks", "--rank", "2"], "is neither an option nor a setting"),
        (["ranks", "--ranks", "0"], "invalid _numbers value"),
        (["resume", "--config", "digit"], "did you mean 'digits'"),
        (["nothing"], "invalid choice"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = verify.main(arguments)
    except SystemExit as stop:
        code = int(str(stop.code))
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert code == 2 and words in line


def test_a_run_that_fails_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert verify.main(["ranks", "--ranks", "1", "data.global_batch_size=9999"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "larger than the training set" in line and "--keep" in line


def test_a_folder_to_keep_must_be_empty(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert verify.main(["ranks", "--keep", str(tmp_path / "full")]) == 2
    assert "wanted a folder that is empty" in capsys.readouterr().err
