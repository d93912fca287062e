"""The doctor's SLURM job, with fakes of SLURM's commands."""

import argparse
import os
from pathlib import Path

import pytest

from launch.doctor import job
from launch.slurm.client import Allocation, SlurmError
from trainer.errors import FolderError

ALLOCATION = Allocation("7", 7, ("n1", "n2"), 0, 16, 1, None)


def arguments(**changes: object) -> argparse.Namespace:
    options = {"config": ["digits"], "nodes": 2, "ranks": None, "gpus_per_node": None, "partition": None}
    return argparse.Namespace(**options | {"short": True, "json": False, "timeout_seconds": 60.0} | changes)


@pytest.fixture
def fake_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Puts an sbatch that runs nothing and a squeue whose job has ended into PATH; `sbatch` records its arguments."""
    folder = tmp_path / "bin"
    folder.mkdir()
    commands = {
        "sbatch": f'printf "%s\\n" "$SAMECURVE_SCRIPTS" "$@" > {tmp_path}/sbatch; echo "7;cluster"',
        "squeue": "echo slurm_load_jobs error: Invalid job id specified >&2; exit 1",
        "scontrol": "echo JobId=7 JobState=FAILED ExitCode=3:0 NodeList=n2",
    }
    for name, text in commands.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return tmp_path / "sbatch"


def test_step_runs_one_task_on_each_node_beside_other_steps() -> None:
    command = job.step_command(ALLOCATION, ("python", "main.py"))
    assert command[:3] == ("srun", "--overlap", "--nodes=2") and command[-2:] == ("python", "main.py")
    assert {"--ntasks=2", "--ntasks-per-node=1", "--cpus-per-task=16", "--kill-on-bad-exit=0"} <= set(command)


def test_sbatch_command_passes_resources_and_settings() -> None:
    command = job.sbatch_command(
        arguments(ranks=4, gpus_per_node=8, partition="gpu"), ["optim.lr=1"], Path("/runs/100%")
    )
    script = command.index(str(job.scripts_folder() / "doctor.sh"))
    options, passed = command[:script], command[script + 1 :]
    assert {"--nodes=2", "--ntasks-per-node=4", "--gpus-per-node=8", "--partition=gpu", "--time=3"} <= set(options)
    assert "--output=/runs/100%%/doctor-%j.log" in options
    assert passed == ["--config", "digits", "--timeout-seconds=60", "--short", "--ranks=4", "optim.lr=1"]


def test_submit_prints_the_log_and_returns_the_exit_code(fake_slurm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("runs").mkdir()
    Path("runs/doctor-7.log").write_bytes(b"report\n\x1b[31mred \xff\n")
    assert job.submit(arguments(), []) == 3
    out, error = capsys.readouterr()
    assert out == "report\n\\x1b[31mred \\xff\n"
    assert error.startswith("samecurve: job 7 is in the queue; its log: ") and "runs/doctor-7.log" in error
    assert fake_slurm.read_text().splitlines()[0] == str(job.scripts_folder())


def test_job_without_log_is_an_error(fake_slurm: Path) -> None:
    with pytest.raises(SlurmError, match=r"job 7 on n2 ended as FAILED \(3:0\) without its log, .*set run.root"):
        job.submit(arguments(), [])


def test_controller_that_is_away_for_a_moment_costs_no_report(
    fake_slurm: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("launch.slurm.client._RETRY_INTERVAL_SECONDS", 0.0)
    away = "[ -e {0} ] || {{ touch {0}; echo Unable to contact slurm controller >&2; exit 1; }}\n"
    for name in ("squeue", "scontrol"):
        path = fake_slurm.parent / "bin" / name
        path.write_text(path.read_text().replace("\n", "\n" + away.format(fake_slurm.parent / f"{name}-away"), 1))
    Path("runs").mkdir()
    Path("runs/doctor-7.log").write_text("report\n")
    assert job.submit(arguments(), []) == 3 and capsys.readouterr().out == "report\n"


def test_run_root_that_cannot_be_written_is_a_user_error(fake_slurm: Path) -> None:
    with pytest.raises(FolderError, match=r"cannot write the doctor's log into run\.root /proc/sys "):
        job.submit(arguments(), ["run.root=/proc/sys"])  # nobody can write there, not even root
    assert not fake_slurm.exists()


def test_run_root_that_cannot_be_created_is_a_user_error(fake_slurm: Path) -> None:
    Path("file").write_text("")
    with pytest.raises(FolderError, match=r"cannot create run\.root"):
        job.submit(arguments(), ["run.root=file/runs"])
    assert not fake_slurm.exists()
