"""Batch scripts, site file and log folder, in a checkout and after an installation; no SLURM."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from support.processes import REPOSITORY

from launch.slurm import scripts
from trainer.errors import FolderError

SCRIPTS = REPOSITORY / "slurm"
# Like SLURM 22.05 for the last task of an array: every task is listed, and the job name is the user's.
SCONTROL = """#!/bin/sh
test "$*" = "show job 7" || exit 1
echo "JobId=7 JobName=Command=/other/train.sh"
echo "   Command={script} --config digits"
echo
echo "   Command=/second/train.sh"
"""


def install(root: Path, folder: str) -> Path:
    """Copies the scripts into a folder below a project's root and returns it."""
    return Path(shutil.copytree(SCRIPTS, root / folder, ignore=shutil.ignore_patterns("logs", "site.sh")))


def run_spool_copy(script: Path, tmp_path: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs a copy of a script as SLURM does, with a scontrol that names the original, and with echo as Python."""
    spool, bin_folder = tmp_path / "spool", tmp_path / "bin"
    spool.mkdir()
    bin_folder.mkdir()
    copy = Path(shutil.copy(script, spool / "slurm_script"))
    scontrol = bin_folder / "scontrol"
    scontrol.write_text(SCONTROL.format(script=script))
    scontrol.chmod(0o755)
    path = f"{bin_folder}:{os.environ['PATH']}"
    return subprocess.run(
        ["bash", str(copy), "a b", "$(id)"], capture_output=True, text=True, check=False, timeout=60,
        env={"PATH": path, "SAMECURVE_PYTHON": "echo"} | env,
    )  # fmt: skip


@pytest.mark.parametrize("folder", ["slurm", "launch/scripts"])
@pytest.mark.parametrize(("script", "command"), [("train", "batch"), ("sweep", "batch"), ("doctor", "doctor")])
def test_spool_copy_finds_its_project(tmp_path: Path, folder: str, script: str, command: str) -> None:
    root = tmp_path / "my project"
    completed = run_spool_copy(install(root, folder) / f"{script}.sh", tmp_path, SLURM_JOB_ID="7")
    assert completed.stdout == f"{root}/launch/main.py {command} a b $(id)\n", completed.stderr


def test_spool_copy_uses_samecurve_scripts_without_scontrol(tmp_path: Path) -> None:
    folder = install(tmp_path / "project", "slurm")
    completed = run_spool_copy(SCRIPTS / "train.sh", tmp_path, SAMECURVE_SCRIPTS=str(folder))
    assert completed.stdout == f"{tmp_path}/project/launch/main.py batch a b $(id)\n", completed.stderr
    assert completed.returncode == 0


def test_script_outside_a_job_says_how_to_submit_it(tmp_path: Path) -> None:
    completed = run_spool_copy(SCRIPTS / "train.sh", tmp_path)
    assert completed.returncode and "from the project folder by: sbatch slurm/train.sh" in completed.stderr


def test_folders_in_a_checkout() -> None:
    assert scripts.scripts_folder() == SCRIPTS and scripts.log_folder() == SCRIPTS / "logs"


def test_folders_after_an_installation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = install(tmp_path / "site-packages", "launch/scripts")
    monkeypatch.chdir(tmp_path)
    assert scripts.scripts_folder(tmp_path / "site-packages") == folder
    assert scripts.create_log_folder(tmp_path / "site-packages") == tmp_path / "slurm-logs"
    assert (tmp_path / "slurm-logs").is_dir()


def test_log_folder_that_cannot_be_created_is_a_user_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path / "site-packages", "launch/scripts")
    (tmp_path / "slurm-logs").write_text("a file")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FolderError, match=r"cannot create the folder of the job logs.*call samecurve from a folder"):
        scripts.create_log_folder(tmp_path / "site-packages")
