"""Finds run folders: all runs below a folder, or one run by its name."""

import difflib
import os
from pathlib import Path

from trainer.errors import UserError

_RUN_FILES = ("config.yaml", "status.json", "job.json")  # a folder with one of them is a run folder
_SKIPPED_FOLDERS = {"checkpoints", "tensorboard", "wandb", "logs"}  # inside a run: large, and without other runs


class NoRunError(UserError):
    """No run has this name."""


def is_run_folder(path: Path) -> bool:
    return any((path / name).is_file() for name in _RUN_FILES)


def has_started(path: Path) -> bool:
    """Returns whether a folder belongs to a run that has started training."""
    return (path / "config.yaml").is_file() and (path / "environment.json").is_file()


def find_runs(root: Path) -> list[Path]:
    """Returns the run folders at and below a folder, including runs of sweeps, sorted by path."""
    paths = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if name not in _SKIPPED_FOLDERS and not name.startswith("."))
        if any(name in files for name in _RUN_FILES):
            paths.append(Path(folder))
    return paths


def find_run(name: str, root: Path) -> Path:
    """Returns the folder of a run. name: a path below root, or any path.

    Raises NoRunError, with similar names, if there is no such run.
    """
    for path in (root / name, Path(name).expanduser()):
        if is_run_folder(path):
            return path
    names = [path.relative_to(root).as_posix() for path in find_runs(root)]
    similar = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    similar = similar or [run_name for run_name in names if name in run_name][:3]
    if similar:
        raise NoRunError(f"no run '{name}' under {root}; did you mean {' or '.join(similar)}?")
    raise NoRunError(
        f"no run '{name}' under {root}; `samecurve status` lists all runs there; --root changes the folder"
    )


def find_run_or_weights(name: str, root: Path) -> Path:
    """Returns the path of a weights file or of a checkpoint folder if name is one; otherwise the folder of a run.

    Raises NoRunError if there is none of them.
    """
    path = Path(name).expanduser()
    return path if path.is_file() or (path / "manifest.json").is_file() else find_run(name, root)
