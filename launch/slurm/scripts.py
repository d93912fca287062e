"""Locates the batch scripts, the site file and the folder of the job logs, in a checkout and after an installation."""

import os
from collections.abc import Sequence
from pathlib import Path

from launch.hardware import INSTALL_ROOT
from trainer.errors import FolderError


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
    return folder


def with_site_file(argv: Sequence[str], install_root: Path = INSTALL_ROOT) -> list[str]:
    """Returns the sbatch command, run after the site file if one exists: it may set SBATCH_ACCOUNT and others.

    The arguments reach sbatch as positional parameters, so that the shell never interprets the user's words.
    """
    site_file = Path(os.environ.get("SAMECURVE_SITE") or scripts_folder(install_root) / "site.sh")
    if not site_file.is_file():
        return [*argv]
    return ["bash", "-c", 'source "$1"; shift; exec "$@"', "samecurve", str(site_file), *argv]
