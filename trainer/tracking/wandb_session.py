"""Where W&B's rows of a run end, so that each line of metrics.jsonl becomes a row once, whatever ended the sessions.

Rows go to W&B in the order of the lines, and every session begins by making up for what its forerunner lost: what W&B
has is a beginning of the lines, and maybe some beyond the checkpoint, which the run will come by again.
"""

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_SPLITS = ("train", "validation", "test")  # as their rows follow one another at a step
_INSPECT_SECONDS = 60.0
RowPosition = tuple[float, int]
"""samples seen, and the place of the split"""


def row_position(split: str, scalars: Mapping[str, Any]) -> RowPosition:
    """Of a row among all rows."""
    return float(scalars["samples"]), _SPLITS.index(split)


def last_position(row: Mapping[str, Any]) -> RowPosition | None:
    """Of the last row in a W&B run's summary, or in one row; None when there is none. Names are `split/name`."""
    found = [
        row_position(split, {"samples": row[f"{split}/samples"]}) for split in _SPLITS if f"{split}/samples" in row
    ]
    return max(found, default=None)


class UnreadableError(Exception):
    """W&B's own reader does not come to an end, or does not read a session at all."""


def last_position_on_disk(folder: Path, but: Path, is_online: bool) -> RowPosition | None:
    """Of the last row in the files of a run's sessions under folder, one of them left out. By W&B's own reader.

    is_online: of an online session that was not closed only the server knows what it had. Raises UnreadableError.
    """
    found = sorted(
        (path for path in folder.glob("*run-*-*") if path.is_dir()), key=lambda path: path.name.split("run-")[1]
    )
    for session in reversed([path for path in found if path.resolve() != but.resolve()]):
        records = _records(session)
        ends = [
            end for record in records if (end := last_position(record.get("history", {}).get("item", {}))) is not None
        ]
        was_closed = any(record.get("type") == "exit" for record in records)
        if ends and (was_closed or not is_online or session.name.startswith("offline")):
            return max(ends)
    return None


def missing_rows(metrics: Path, end: RowPosition | None) -> Iterator[tuple[str, int, dict[str, float]]]:
    """The lines of metrics.jsonl beyond the end: split, step and scalars of each. A number that is null is left out."""
    for line in metrics.read_text(encoding="utf-8").splitlines() if metrics.is_file() else ():
        row = json.loads(line)
        split, step = row.pop("split"), row.pop("step")
        if end is None or row_position(split, row) > end:
            yield split, step, {name: value for name, value in row.items() if value is not None}


def _records(session: Path) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(session)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_INSPECT_SECONDS, check=False)
        records: list[dict[str, Any]] = [json.loads(line) for line in done.stdout.splitlines()]
    except (subprocess.TimeoutExpired, ValueError) as error:
        raise UnreadableError(f"{session.name}: {type(error).__name__}") from None
    if done.returncode and not records and any(session.glob("*.wandb")):
        raise UnreadableError(f"{session.name}: {done.stderr.strip()[-160:]}")
    return records
