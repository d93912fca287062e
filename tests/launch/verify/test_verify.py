"""`samecurve verify` reports equal runs as SAME, different runs as DIFFERENT, and mistakes in one line."""

import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from support.processes import REPOSITORY, Samecurve

SHORT_RUN = ["run.seed=3", "eval.every_epochs=0"]


def verify(*arguments: str, module: bool = False) -> tuple[int, str, str]:
    """Runs the command in a process. Returns its exit code, stdout and stderr."""
    command = ["-m", "trainer.verify"] if module else [str(REPOSITORY / "launch" / "main.py"), "verify"]
    # The command's own limit for each run ends before ours: it then kills the processes it has started.
    command = [sys.executable, *command, *arguments, "--timeout-seconds=150"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=500)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.slow
def test_ranks_are_same_with_virtual_ranks_and_different_without(tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    code, out, err = verify("ranks", "--ranks", "1,2", "--steps", "5", "--keep", str(folder), *SHORT_RUN)
    assert code == 0 and out.splitlines()[-1] == "SAME: expected the same bits on 1, 2 ranks", out + err
    assert (folder / "ranks-2" / "summary.json").is_file()
    # Without virtual ranks the runs do differ: the comparison is not blind.
    code, out, _ = verify("ranks", "--ranks", "1,2", "--steps", "5", "train.virtual_ranks=null", *SHORT_RUN)
    assert code == 1 and out.splitlines()[-1].startswith("DIFFERENT: ") and "tensors differ" in out


@pytest.mark.slow
def test_killed_runs_resume_to_same_bits_and_leave_no_processes(tmp_path: Path) -> None:
    folder = str(tmp_path / "kept")
    # The kills of this seed come early, at steps 27 and 41, so that the run cannot finish before it is seen.
    code, out, err = verify(
        "resume", "--kills", "2", "--ranks", "1,2", "--seed", "269", "--steps", "600", "--keep", folder
    )
    assert code == 0 and out.splitlines()[-1] == "SAME: expected the same bits after 2 kills", out + err
    assert "kill 2 of 2: after step" in out and "newest checkpoint step-00000" in out
    commands = [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])]  # a zombie has none
    assert not [command for command in commands if f"run.root={folder}" in command]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ranks", "train.epoch=3"], "did you mean 'train.epochs'"),
        (["ranks", "--rank", "2"], "is neither an option nor a setting"),
        (["ranks", "--ranks", "0"], "expected world sizes such as 1,2,4, got '0'"),
        (["ranks", "--ranks", "1,x"], "expected world sizes such as 1,2,4, got '1,x'"),
        (["resume", "--config", "digit"], "did you mean 'digits'"),
        (["nothing"], "invalid choice"),
    ],
)
def test_invalid_argument_is_refused_in_one_line(
    arguments: list[str], message: str, capfd: pytest.CaptureFixture[str], samecurve: Samecurve
) -> None:
    try:
        _, err = samecurve("verify", *arguments, code=2)
    except SystemExit as stop:  # argparse
        assert stop.code == 2
        err = capfd.readouterr().err
    assert message in err and err.count("\n") == 1


def test_former_module_name_forwards_to_the_command() -> None:
    code, _, err = verify("ranks", "--ranks", "0", module=True)
    assert code == 2 and "expected world sizes" in err


def test_failed_run_is_reported_with_its_error_and_log(samecurve: Samecurve) -> None:
    _, err = samecurve("verify", "ranks", "--ranks", "1", "data.global_batch_size=9999", code=2)
    assert "did not finish (samecurve: " in err and "larger than the training set" in err
    assert "ranks-1.log, which --keep DIR preserves" in err and err.count("\n") == 1


def test_keep_folder_with_files_is_refused(tmp_path: Path, samecurve: Samecurve) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    _, err = samecurve("verify", "ranks", "--keep", str(tmp_path / "full"), code=2)
    assert "expected an empty or new folder" in err
