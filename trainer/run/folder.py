"""A run's folder: who may use it, and files in it that are always whole."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import yaml

from trainer.config.changes import changed_settings
from trainer.config.load import to_yaml
from trainer.config.schema import RunConfig, settings_by_name
from trainer.errors import FolderError
from trainer.run import lock
from trainer.run.files import finite_json, replace_file


class RunFolder:
    """`<run.root>/<run.name>/`; docs/design.md lists what lies in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.metrics = path / "metrics.jsonl"
        self.bad_steps = path / "bad_steps.jsonl"
        self._lock: IO[str] | None = None
        self._about: tuple[str, dict[str, object]] = ("", {})
        os.register_at_fork(after_in_child=self.release)  # DataLoader's workers outlive a killed process by seconds

    def check(self, config: RunConfig) -> None:
        """Raises FolderError when it cannot be written, or holds a run that this one would write over."""
        self._take_hold()
        self.fits(config)

    def fits(self, config: RunConfig) -> None:
        """Raises FolderError when it holds a run that this one would write over. Only looks."""
        before = self._settings()
        if before is None:
            return
        if config.run.resume == "never":
            raise FolderError(
                f"run folder {self.path} already holds a run and run.resume=never; "
                "choose another run.name or remove the folder"
            )
        changed = changed_settings(before, config)
        if changed:
            raise FolderError(
                f"run folder {self.path} already holds a run with other settings ({changed}); "
                "choose another run.name, or the same settings to go on with it"
            )

    def _take_hold(self) -> None:
        """Two runs in one folder would write over each other. The lock ends with the process, however that ends."""
        self.release()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = lock.acquire(self.path)
        except BlockingIOError:
            raise FolderError(
                f"run folder {self.path} is in use by another process; wait for it, or choose another run.name"
            ) from None
        except OSError as error:
            raise FolderError(
                f"run folder {self.path} cannot be written ({error.strerror}); set run.root to a folder that can"
            ) from None

    def in_use(self) -> bool:
        """Whether a run is on in it, as far as this machine can tell."""
        return lock.is_held(self.path)

    def release(self) -> None:
        """Lets go of the folder."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def begin(self, config: RunConfig, environment: dict[str, object]) -> None:
        """Writes what the run is: config.yaml and environment.json."""
        for left_behind in self.path.glob(".*.partial"):  # by a process that was killed
            left_behind.unlink()
        self._about = (to_yaml(config), environment)
        self._write_about()

    def _write_about(self) -> None:
        config, about = self._about
        self.write("config.yaml", config)
        self.write_json("environment.json", about)

    def made_anew(self) -> bool:
        """Whether somebody removed the folder while the run was on; if so it is made anew. Raises OSError."""
        try:
            if self._lock is not None and os.fstat(self._lock.fileno()).st_ino == (self.path / lock.NAME).stat().st_ino:
                return False
        except FileNotFoundError:
            pass
        self._take_hold()
        self._write_about()
        return True

    def status(self, state: str, step: int, reason: str = "") -> None:
        """state: running, finished, stopped or failed."""
        self.write_json("status.json", {"state": state, "step": step, "reason": reason})

    def write_json(self, name: str, content: Any) -> None:
        self.write(name, json.dumps(finite_json(content), indent=1, ensure_ascii=False, allow_nan=False) + "\n")

    def write(self, name: str, text: str) -> None:
        """Replaces a file whole: nobody reads half of it, whenever this process dies."""
        self.write_file(name, lambda path: path.write_text(text, encoding="utf-8"))

    def write_file(self, name: str, writer: Callable[[Path], object]) -> None:
        """The same with whatever `writer` writes to the path it is given: beside the place, flushed, renamed."""
        replace_file(self.path / name, writer)

    def read_json(self, name: str) -> Any:
        """A file's content, or None when there is none."""
        path = self.path / name
        return json.loads(path.read_text()) if path.is_file() else None

    def rewind(self, step: int) -> set[str]:
        """Leaves only the lines that were written before a run had got to a step, so that it writes none twice.

        Returns the splits that have been evaluated at that very step.
        """
        evaluated = set()
        for path in (self.metrics, self.bad_steps):
            if not path.is_file():
                continue
            kept = []
            for line in path.read_text().splitlines():
                try:
                    row = json.loads(line)
                    # A line of metrics has the number of steps taken, a bad step its own, from 0.
                    if row["step"] < step or (row["step"] == step and path == self.metrics):
                        kept.append(line + "\n")
                    if row["step"] == step and row.get("split", "train") != "train":
                        evaluated.add(row["split"])
                except (ValueError, KeyError):  # the last line of a killed run may be cut off
                    continue
            self.write(path.name, "".join(kept))
        return evaluated

    def _settings(self) -> dict[str, Any] | None:
        """The settings of the run that lies here; one that it did not know yet has its default."""
        path = self.path / "config.yaml"
        if not path.exists():
            return None
        try:
            nested = yaml.safe_load(path.read_text())
            return {
                name: nested.get(name.partition(".")[0], {}).get(name.partition(".")[2], info.default)
                for name, info in settings_by_name().items()
            }
        except (OSError, ValueError, AttributeError, yaml.YAMLError):
            raise FolderError(
                f"{path} is not readable as the settings of a run; choose another run.name or remove the folder"
            ) from None
