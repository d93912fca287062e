"""Temporary folders of launches. Each names its owner, so that a later start can remove what a kill has left.

torchrun makes a folder /tmp/torchelastic_* for each launch and never removes it. A rank removes it at a good end.
"""

import contextlib
import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from trainer.process.identity import ProcessIdentity

_PREFIX, _TORCHRUN_PREFIX = "samecurve-", "torchelastic_"
_OWNER_FILE = "samecurve-owner.json"
_WORTHLESS_FILES = {_OWNER_FILE, "outcome.json", "error.json"}


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """Yields a new folder that this process owns, and removes it at the end."""
    folder = new_folder(os.getpid())
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def new_folder(owner_pid: int) -> Path:
    """Returns a new folder. The owner removes it, or a later start does when the owner has ended."""
    remove_stale_folders()
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
    _write_owner(folder, owner_pid)
    return folder


def remove_stale_folders() -> None:
    """Removes the folders of this user whose owner on this machine has ended."""
    root = Path(tempfile.gettempdir())
    for prefix in (_PREFIX, _TORCHRUN_PREFIX):
        for folder in root.glob(f"{prefix}*"):
            owner = _owner(folder)
            if owner is not None and owner.is_gone:
                _remove_without_logs(folder)


class LauncherFolder:
    """The folder that a launcher has made for its ranks and does not remove itself."""

    def __init__(self, launcher_pid: int) -> None:
        """launcher_pid: 0 for a process without a launcher, which has no such folder."""
        self._path: Path | None = None
        error_file = Path(os.environ.get("TORCHELASTIC_ERROR_FILE", ""))  # FOLDER/ID/attempt_0/RANK/error.json
        folder = error_file.parents[3] if len(error_file.parents) > 3 else Path()
        is_temporary = folder.parent == Path(tempfile.gettempdir())
        if not launcher_pid or not is_temporary or not folder.name.startswith((_PREFIX, _TORCHRUN_PREFIX)):
            return
        owner = _owner(folder)
        if owner is None:
            with contextlib.suppress(OSError):  # a full disk: the folder stays
                _write_owner(folder, launcher_pid)
        if owner is None or owner.pid == launcher_pid:  # not `samecurve train`, which removes its folder itself
            self._path = folder

    def remove(self) -> None:
        if self._path is not None:
            _remove_without_logs(self._path)


def _write_owner(folder: Path, pid: int) -> None:
    (folder / _OWNER_FILE).write_text(json.dumps(dataclasses.asdict(ProcessIdentity.of(pid))))


def _owner(folder: Path) -> ProcessIdentity | None:
    """Returns the owner that a folder of this user names; None if it names none."""
    try:
        if folder.stat().st_uid != os.getuid():
            return None
        return ProcessIdentity(**json.loads((folder / _OWNER_FILE).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _remove_without_logs(folder: Path) -> None:
    """Removes a folder, unless it holds files that somebody may want, such as the logs of `torchrun --redirects`."""
    files = [Path(parent) / name for parent, _, names in os.walk(folder) for name in names]
    if not any(file.name not in _WORTHLESS_FILES and _has_content(file) for file in files):
        shutil.rmtree(folder, ignore_errors=True)


def _has_content(file: Path) -> bool:
    try:
        return file.stat().st_size > 0
    except FileNotFoundError:  # another process has just removed it; or a link that leads nowhere
        return False
    except OSError:  # it may have content
        return True
