"""Writes a run folder: locks it for one run, checks the settings of the run in it, replaces its files atomically."""

import contextlib
import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainer.config.changes import changed_settings
from trainer.config.load import to_yaml
from trainer.config.schema import RunConfig, settings_by_name
from trainer.errors import FolderError
from trainer.run.files import error_reason, finite_json, replace_file, reserve_room, write_problem
from trainer.run.lock import LOCK_FILE, FolderLock, LockEvent, is_held
from trainer.run.reading import content
from trainer.run.record import RunRecord, read_lines


class RunFolder:
    """The folder run.root/run.name. docs/run_folder.md lists its files; RunRecord reads them."""

    def __init__(self, path: Path) -> None:
        self._set_path(path)
        self._lock = FolderLock(path)
        self._is_held = False
        self._created: list[Path] = []  # folders of this process, as long as the run has not begun
        self.on_lost: Callable[[LockEvent, str], None] = lambda event, detail: None
        """called in a thread when this process loses the folder that it holds; see FolderLock.try_acquire()"""
        self.on_restored: Callable[[], None] = lambda: None
        """called by restore_if_removed(): writes what the opening of the session has written beside write_settings()"""
        self._config_yaml = ""
        self._environment: dict[str, object] = {}
        os.register_at_fork(after_in_child=self.release)  # DataLoader workers live seconds longer than a killed process

    def _set_path(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.metrics = path / "metrics.jsonl"
        self.bad_steps = path / "bad_steps.jsonl"
        self._reserve = path / ".reserve.partial"  # write_settings() removes it after a kill

    def try_acquire(self, config: RunConfig) -> str:
        """Creates the folder if needed and locks it until release() or the end of the process.

        Returns the name of the process that holds it; empty on success. Raises FolderError if the folder cannot be
        written, or as check_settings().
        """
        self.check_settings(config)  # before a wait, which would be for nothing
        if not self._try_acquire_lock():
            return self._lock.holder
        self.check_settings(config)
        return ""

    def in_use_error(self, holder: str) -> FolderError:
        """Returns the error for a folder that another process holds."""
        return FolderError(
            f"run folder {self.path} is in use by {holder}; wait for its end, or choose another run.name"
        )

    def check_settings(self, config: RunConfig) -> None:
        """Raises FolderError if the folder contains a run that a run with these settings cannot continue, or if it lies
        inside another run or around one."""
        self._check_place()
        if not (self.path / "config.yaml").exists():
            return
        if config.run.resume == "never":
            raise FolderError(
                f"run folder {self.path} already contains a run and run.resume=never; "
                "choose another run.name, or continue it with run.resume=auto"
            )
        stored = RunRecord(self.path).settings
        defaults = {name: info.default for name, info in settings_by_name().items()}  # for settings newer than the run
        changed = changed_settings({name: stored.get(name, default) for name, default in defaults.items()}, config)
        if changed:
            raise FolderError(
                f"run folder {self.path} already contains a run with other settings ({changed}); "
                "use the same settings to continue it, or choose another run.name"
            )

    def check_writable(self) -> None:
        """Raises FolderError if the folder cannot be created or written. Creates nothing."""
        if problem := write_problem(self.path):
            raise FolderError(
                f"run folder {self.path} cannot be written ({problem}); set run.root to a writable folder"
            )

    def _check_place(self) -> None:
        """Raises FolderError if another run is around this folder, or in it: their files and names would collide.

        Looks at two levels below, as deep as the folders of sweeps. More could take minutes if the folder holds a data
        set. A run that lies deeper is refused at its own next start.
        """
        try:
            is_run = _is_run(self.path)
            outer = next((parent for parent in self.path.absolute().parents if _is_run(parent)), None)
            below = itertools.chain(self.path.glob("*/status.json"), self.path.glob("*/*/status.json"))
            inner = None if is_run else next(below, None)
        except OSError:  # it cannot be read, which locking it reports
            return
        if outer is not None:
            raise FolderError(
                f"run folder {self.path} lies inside the run {outer}; choose another run.name or run.root"
            )
        if inner is not None:
            raise FolderError(f"run folder {self.path} contains the run {inner.parent}; choose another run.name")

    def _try_acquire_lock(self) -> bool:
        self.release()
        missing: list[Path] = []
        try:
            missing = [path for path in (self.path, *self.path.parents) if not path.exists()]
            self.path.mkdir(parents=True, exist_ok=True)
            self._created = missing
            self._is_held = self._lock.try_acquire(self.on_lost)
        except OSError as error:
            self._created = []
            if missing and not self.is_in_use():
                with contextlib.suppress(OSError):
                    (self.path / LOCK_FILE).unlink()
                _remove_folders(missing)
            raise FolderError(
                f"run folder {self.path} cannot be written ({error.strerror}); set run.root to a writable folder"
            ) from None
        return self._is_held

    def is_in_use(self) -> bool:
        """Returns whether a process holds the folder, as far as this machine can see."""
        return is_held(self.path)

    def release(self) -> None:
        """Releases the lock and the reserved room, and removes what try_acquire() has created if the run has not begun.

        Does nothing without a lock, and in a forked process.
        """
        if not self._is_held or not self._lock.is_owner:
            self._lock.release()
            return
        self._is_held, created = False, self._created
        self._created = []
        self.release_room()
        if created:  # before the end of the lease, which keeps others from using the folder
            (self.path / LOCK_FILE).unlink(missing_ok=True)
        self._lock.release()
        _remove_folders(created)

    def reserve_room(self, num_bytes: int) -> None:
        """Reserves room on the disk until release_room(). Raises OSError if the disk has too little."""
        reserve_room(self._reserve, num_bytes)

    def release_room(self) -> None:
        self._reserve.unlink(missing_ok=True)

    def follow_if_moved(self) -> bool:
        """Uses the new path of the folder if somebody has renamed it. Returns whether it was renamed."""
        moved_to = self._lock.moved_to() if self._is_held else None
        if moved_to is None:
            return False
        self._set_path(moved_to)
        self._lock.folder = moved_to
        return True

    def write_settings(self, config: RunConfig, environment: dict[str, object]) -> None:
        """Begins the run: writes config.yaml and environment.json, and removes partial files of killed processes."""
        self._created = []
        for partial in self.path.glob(".*.partial"):
            partial.unlink()
        self._config_yaml, self._environment = to_yaml(config), environment
        self._write_settings_files()

    def _write_settings_files(self) -> None:
        self.write("config.yaml", self._config_yaml)
        self.write_json("environment.json", self._environment)

    def restore_if_removed(self) -> bool:
        """Creates the folder again if somebody removed it during the run. Returns whether it did.

        Raises OSError, and FolderError if somebody has renamed the folder: nothing must be written to the old path.
        """
        if self._is_held and (moved_to := self._lock.moved_to()):
            raise FolderError(f"run folder {self.path} was renamed to {moved_to}")
        if self._is_held and not self._lock.is_removed:
            return False
        if not self._try_acquire_lock():
            raise self.in_use_error(self._lock.holder)
        self._write_settings_files()
        self.on_restored()
        return True

    def write_status(self, state: str, step: int, reason: str = "") -> None:
        """Writes status.json. state: running, finished, stopped or failed."""
        self.write_json("status.json", {"state": state, "step": step, "reason": reason})

    def write_json(self, name: str, value: Any) -> None:
        """Replaces a file by JSON. Writes null for NaN and infinity."""
        self.write(name, json.dumps(finite_json(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n")

    def write(self, name: str, text: str) -> None:
        """Replaces a file by a text. A reader sees the old or the new text, even if this process is killed."""
        # A recorded command may contain undecodable bytes of a file name: \\udc80 is their escape in JSON, too.
        self.write_file(name, lambda path: path.write_text(text, encoding="utf-8", errors="backslashreplace"))

    def write_file(self, name: str, writer: Callable[[Path], object]) -> None:
        """Replaces a file by what `writer` writes to the temporary path that it gets."""
        replace_file(self.path / name, writer)

    def remove_rows_after(self, step: int, log: Callable[[str], None]) -> set[str]:
        """Removes the rows that a run resumed after `step` steps writes again, from metrics.jsonl and bad_steps.jsonl.

        Removes lines that are no rows, too, and logs how many. Returns the splits that have an evaluation after exactly
        `step` steps. Raises FolderError if a file cannot be read, and OSError if it cannot be written.
        """
        # metrics.jsonl counts steps taken; bad_steps.jsonl has the index of the bad step, from 0.
        last_rows = self._remove_rows(self.metrics, content.ROW, step, log)
        self._remove_rows(self.bad_steps, content.BAD_STEP, step - 1, log)
        return {row["split"] for row in last_rows} - {"train"}

    def _remove_rows(
        self, path: Path, shape: content.Shape, last_step: int, log: Callable[[str], None]
    ) -> list[dict[str, Any]]:
        """Keeps the rows of a file up to a step. Returns those of that step."""
        last_rows, lines_to_keep, errors = [], [], []
        lines = read_lines(path)
        for index, line in enumerate(lines):
            try:
                row = content.parse_json(line, shape)
            except ValueError as error:
                if index + 1 < len(lines):  # a killed run may cut off its last row
                    errors.append(error)
                continue
            if row["step"] <= last_step:
                lines_to_keep.append(line + "\n")
            if row["step"] == last_step:
                last_rows.append(row)
        if errors:
            damaged = "1 line that is no row" if len(errors) == 1 else f"{len(errors):,} lines that are no rows"
            log(f"{path}: removed {damaged} ({error_reason(errors[0])})")
        if lines:
            self.write(path.name, "".join(lines_to_keep))
        return last_rows


def _is_run(path: Path) -> bool:
    return (path / "config.yaml").is_file() and (path / "status.json").is_file()


def _remove_folders(folders: list[Path]) -> None:
    """Removes empty folders, up to the first one in which somebody has put a file."""
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()
