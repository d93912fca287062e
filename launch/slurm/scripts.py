"""Locates the batch scripts, the site file and the folder of the job logs, in a checkout and after an installation."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from launch.hardware import INSTALL_ROOT
from launch.slurm import client
from trainer.errors import ConfigError, FolderError
from trainer.run.files import write_problem

# The site file may change PATH, so `env` is found before. bash sources BASH_ENV at its start, so it is set afterwards.
_READ_SITE = '[ -z "$3" ] || export BASH_ENV=$3; env=$(type -P env); source "$1"; read_site "$2" && exec "$env" -0'


def scripts_folder(install_root: Path = INSTALL_ROOT) -> Path:
    """Returns the folder of train.sh, sweep.sh and doctor.sh: slurm/ in a checkout, launch/scripts/ once installed."""
    installed = install_root / "launch" / "scripts"
    return installed if installed.is_dir() else install_root / "slurm"


def log_folder(install_root: Path = INSTALL_ROOT) -> Path:
    """Returns the folder of the job logs: slurm/logs/ of a checkout, else slurm-logs/ below the current folder."""
    scripts = scripts_folder(install_root)
    return scripts / "logs" if scripts == install_root / "slurm" else Path.cwd() / "slurm-logs"


def create_log_folder(install_root: Path = INSTALL_ROOT) -> Path:
    """Creates the folder of the job logs: SLURM ends a job without a message when it is missing. Raises FolderError."""
    folder = log_folder(install_root)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FolderError(
            f"cannot create the folder of the job logs, {folder} ({error.strerror}); "
            "call samecurve from a folder that you can write to and that all nodes share"
        ) from None
    if problem := write_problem(folder):
        raise FolderError(
            f"the folder of the job logs, {folder}, cannot be written ({problem}); SLURM would end the job without a "
            "message. Free space or restore access there"
        )
    return folder


def site_file(install_root: Path = INSTALL_ROOT) -> Path | None:
    """Returns the path of the site file: SAMECURVE_SITE, else site.sh beside the batch scripts; None without one."""
    if named := os.environ.get("SAMECURVE_SITE"):
        return Path(named).absolute()
    default = scripts_folder(install_root) / "site.sh"
    return default if default.exists() or default.is_symlink() else None


def site_environment(environment: Mapping[str, str], install_root: Path = INSTALL_ROOT) -> dict[str, str]:
    """Returns the environment after the site file, for sbatch: it may set SBATCH_ACCOUNT and others.

    Prints what the site file prints to stderr. Raises ConfigError if the site file cannot be used, or sets something
    that the job cannot use.
    """
    site = site_file(install_root)
    result = dict(environment)
    if site is not None:
        if os.environ.get("SAMECURVE_SITE"):
            result["SAMECURVE_SITE"] = str(site)  # the job may start in another folder
        reader = scripts_folder(install_root) / "read_site.sh"
        with tempfile.TemporaryFile() as log:  # no pipe: a program that the site file leaves behind would hold it open
            completed = subprocess.run(
                ["bash", "-c", _READ_SITE, "samecurve", str(reader), str(site), result.pop("BASH_ENV", "")],
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, env=result, check=False,
            )  # fmt: skip
            log.seek(0)
            printed = log.read().decode(errors="replace")
        if completed.returncode:
            lines = printed.splitlines() or [f"samecurve: site file {site}: bash ends with {completed.returncode}"]
            raise ConfigError(lines[-1].removeprefix("samecurve: "))
        print(printed, end="", file=sys.stderr)
        entries = (entry.partition(b"=") for entry in completed.stdout.split(b"\0") if entry)
        result = {os.fsdecode(name): os.fsdecode(value) for name, _, value in entries}
    client.site_srun_arguments(result)
    client.check_sbatch_variables(result)
    return result
