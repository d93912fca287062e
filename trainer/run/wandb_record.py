"""A run's folder in, what was logged of it to W&B out: its id there, its metrics, what was not uploaded yet."""

import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from trainer.errors import FolderError


@dataclass(frozen=True, slots=True)
class WandbRecord:
    name: str
    id: str
    project: str
    metrics: frozenset[str]
    """as W&B has them: split/name"""
    to_sync: tuple[Path, ...]
    """folders of offline sessions that were not uploaded yet"""


def read_wandb_record(folder: Path) -> WandbRecord | None:
    """None when nothing was logged to W&B. Raises FolderError when the files cannot be read."""
    identity = folder / "wandb" / "run-id"
    if not identity.is_file():
        return None
    try:
        settings = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        offline = (path for path in (folder / "wandb").glob("offline-run-*") if path.is_dir())
        return WandbRecord(
            name=str(settings["run"]["name"]),
            id=identity.read_text(encoding="utf-8").strip(),
            project=str(settings["log"]["project"]),
            metrics=frozenset(_metrics(folder / "metrics.jsonl")),
            to_sync=tuple(sorted(path for path in offline if not list(path.glob("*.wandb.synced")))),
        )
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        problem = " ".join(str(error).split())[:160]
        raise FolderError(f"a file in {folder} is not what a run writes ({problem}); mend or remove it") from None


def sync_command(paths: tuple[Path, ...]) -> str:
    """What uploads them, in the order in which they were written, and one at a time: behind a session that was killed
    `wandb sync` would leave out the others."""
    return " && ".join(shlex.join(["wandb", "sync", "--yes", str(path)]) for path in paths)


def _metrics(path: Path) -> Iterator[str]:
    """The name of each value that a line holds."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.endswith("\n"):  # else it is being written, or cut off
                row = json.loads(line)
                yield from (f"{row['split']}/{name}" for name in row if name not in ("split", "step"))
