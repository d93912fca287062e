"""Finds run folders: all runs below a folder, one run by its name, or the runs that several names stand for."""

import difflib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from trainer.errors import UserError
from trainer.run.record import is_file
from trainer.text.escape import shorten

_RUN_FILES = ("config.yaml", "status.json", "job.json")  # a folder with one of them is a run folder
_SKIPPED_FOLDERS = {"checkpoints", "tensorboard", "wandb", "logs"}  # inside a run: large, and without other runs
_SHOWN_CHARACTERS = 80


class NoRunError(UserError):
    """No run has this name."""


def is_run_folder(path: Path) -> bool:
    return any(is_file(path / name) for name in _RUN_FILES)


def has_started(path: Path) -> bool:
    """Returns whether a folder belongs to a run that has started training."""
    return is_file(path / "config.yaml") and is_file(path / "environment.json")


def find_runs(root: Path, warn: Callable[[str], None] = lambda text: None) -> list[Path]:
    """Returns the run folders at and below a folder, including runs of sweeps, sorted by path.

    warn: receives a line for each folder that this user may not read.
    """

    def skip(error: OSError) -> None:
        warn(f"{error.filename} is skipped, because it cannot be read ({error.strerror})")

    paths = []
    for folder, subfolders, files in os.walk(root, onerror=skip):
        subfolders[:] = sorted(name for name in subfolders if name not in _SKIPPED_FOLDERS and not name.startswith("."))
        if any(name in files for name in _RUN_FILES):
            paths.append(Path(folder))
    return paths


def find_run(name: str, root: Path) -> Path:
    """Returns the folder of a run. name: a path below root, or any path.

    Raises NoRunError, with similar names, if there is no such run.
    """
    for path in (root / name, expand_user(name)):
        if is_run_folder(path):
            return path
    names = [path.relative_to(root).as_posix() for path in find_runs(root)]
    name = shorten(name, _SHOWN_CHARACTERS)
    similar = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    similar = similar or [run_name for run_name in names if name in run_name][:3]
    if similar:
        raise NoRunError(f"no run '{name}' under {root}; did you mean {' or '.join(similar)}?")
    raise NoRunError(
        f"no run '{name}' under {root}; `samecurve status` lists all runs there; --root changes the folder"
    )


def find_runs_of(names: Sequence[str], root: Path, warn: Callable[[str], None]) -> list[Path]:
    """Returns the folders of the runs that the names stand for, in the order of the names.

    names: of runs or of folders with runs, such as a sweep; paths below root, or any paths. A file among them, such as
    the results.json of a sweep that a shell's * includes, is skipped if other names are runs.
    warn: receives a line for each name that was skipped and for each folder that stands for several runs.
    Raises NoRunError if a name is neither a run nor a folder with runs.
    """
    paths: list[Path] = []
    skipped = []
    for name in names:
        try:
            paths.append(find_run(name, root))
            continue
        except NoRunError:
            candidates = (root / name, expand_user(name))
            folder = next(filter(_is_folder, candidates), None)
            runs = [] if folder is None else find_runs(folder, warn)
            if not runs and not any(map(is_file, candidates)):
                raise
        if runs:
            warn(f"{name} is a folder with {len(runs)} run{'s' if len(runs) > 1 else ''}")
            paths += [path for path in runs if path not in paths]
        else:
            skipped.append(name)
    if not paths:
        raise NoRunError(f"{' and '.join(skipped)}: expected folders of runs, found files; give the folder of a run")
    for name in skipped:
        warn(f"{name} is skipped, because it is a file and not a run")
    return paths


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # a folder above it is closed to this user
        return False


def find_run_or_weights(name: str, root: Path) -> Path:
    """Returns the path of a weights file or of a checkpoint folder if name is one; otherwise the folder of a run.

    Raises NoRunError if there is none of them.
    """
    path = expand_user(name)
    is_weights = is_file(path) or is_file(path / "manifest.json")
    return path if is_weights else find_run(name, root)


def expand_user(name: str) -> Path:
    """Returns the path, with `~user` as it is if the home folder of that user is unknown."""
    try:
        return Path(name).expanduser()
    except RuntimeError:
        return Path(name)
