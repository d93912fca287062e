"""A run's folder: who may use it, and files in it that are always whole."""

import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from trainer import config as configs
from trainer.errors import FolderError
from trainer.settings import RunConfig, schema

# Settings that an unfinished run may be continued with in another value: they do not change what it has done so far.
MAY_CHANGE = {
    "run.root", "run.resume", "data.root", "data.download", "data.cache_dir", "data.workers",
    "train.epochs", "train.max_steps", "train.device", "train.threads_per_rank", "train.compile",
    "eval.every_epochs", "eval.batch_size",
    "checkpoint.every_steps", "checkpoint.every_epochs", "checkpoint.keep",
    "log.every_steps", "log.tensorboard", "log.wandb", "log.project",
}  # fmt: skip


class RunFolder:
    """`<run.root>/<run.name>/`; docs/design.md lists what lies in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.metrics = path / "metrics.jsonl"

    def check(self, config: RunConfig) -> None:
        """Raises FolderError when it cannot be written, or holds a run that this one would write over."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.path):
                pass
        except OSError as error:
            raise FolderError(
                f"run folder {self.path} cannot be written ({error.strerror}); set run.root to a folder that can"
            ) from None
        before = self._settings()
        if before is None:
            return
        if config.run.resume == "never":
            raise FolderError(
                f"run folder {self.path} already holds a run and run.resume=never; "
                "choose another run.name or remove the folder"
            )
        changed = [
            f"{name} was {before[name]}, now {value}"
            for name, value in configs.flatten(config).items()
            if name not in MAY_CHANGE and before[name] != value
        ]
        if changed:
            raise FolderError(
                f"run folder {self.path} already holds a run with other settings ({'; '.join(changed)}); "
                "choose another run.name, or the same settings to go on with it"
            )

    def begin(self, config: RunConfig, devices: dict[str, object]) -> None:
        """Writes what the run is: config.yaml and environment.json."""
        self.write("config.yaml", configs.to_yaml(config))
        self.write_json("environment.json", environment() | devices)

    def status(self, state: str, step: int, reason: str = "") -> None:
        """state: running, finished, stopped or failed."""
        self.write_json("status.json", {"state": state, "step": step, "reason": reason})

    def write_json(self, name: str, content: Any) -> None:
        self.write(name, json.dumps(content, indent=1, ensure_ascii=False) + "\n")

    def write(self, name: str, text: str) -> None:
        """Replaces a file whole: nobody reads half of it, whenever this process dies."""
        self.write_file(name, lambda path: path.write_text(text, encoding="utf-8"))

    def write_file(self, name: str, writer: Callable[[Path], object]) -> None:
        """The same with whatever `writer` writes to the path it is given: beside the place, flushed, renamed."""
        partial = self.path / f".{name}.{os.getpid()}.partial"
        writer(partial)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(self.path / name)

    def read_json(self, name: str) -> Any:
        """A file's content, or None when there is none."""
        path = self.path / name
        return json.loads(path.read_text()) if path.is_file() else None

    def rewind_metrics(self, step: int) -> None:
        """Leaves only the lines of metrics.jsonl up to a step, so that a continued run writes none twice."""
        if not self.metrics.is_file():
            return
        kept = []
        for line in self.metrics.read_text().splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except (ValueError, KeyError):  # the last line of a killed run may be cut off
                continue
        self.write("metrics.jsonl", "".join(kept))

    def _settings(self) -> dict[str, Any] | None:
        """The settings of the run that lies here; one that it did not know yet has its default."""
        path = self.path / "config.yaml"
        if not path.exists():
            return None
        try:
            nested = yaml.safe_load(path.read_text())
            return {
                name: nested.get(name.partition(".")[0], {}).get(name.partition(".")[2], info.default)
                for name, info in schema().items()
            }
        except (OSError, ValueError, AttributeError, yaml.YAMLError):
            raise FolderError(
                f"{path} is not readable as the settings of a run; choose another run.name or remove the folder"
            ) from None


def environment() -> dict[str, object]:
    """Versions, commit, machine and command: what a person needs to repeat the run."""
    packages = ("torch", "torchvision", "accelerate", "numpy", "tensorboard", "wandb", "omegaconf", "safetensors")
    return {
        "command": shlex.join([sys.executable, *sys.argv]),
        "started": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in packages},
        "launcher": {name: os.environ[name] for name in ("SLURM_JOB_ID", "TORCHELASTIC_RUN_ID") if name in os.environ},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """The commit of the code that runs, with -dirty when it was changed since; None outside a git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
