"""Finds the last row that W&B has of a run, so that each line of metrics.jsonl becomes one row, also after a kill.

Rows go to W&B in the order of metrics.jsonl, and each session first logs the rows that the session before it lost. So
W&B always has the first lines of metrics.jsonl, and perhaps rows after the checkpoint, which the resumed run reaches
again.
"""

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_SPLITS = ("train", "validation", "test")  # in the order of their rows at one step
_INSPECT_TIMEOUT_SECONDS = 60.0
RowPosition = tuple[float, int]
"""samples seen, index of the split in _SPLITS"""


def row_position(split: str, scalars: Mapping[str, Any]) -> RowPosition:
    """Returns the position of a row. Rows are logged in ascending order of their positions."""
    return float(scalars["samples"]), _SPLITS.index(split)


def last_position(row: Mapping[str, Any]) -> RowPosition | None:
    """Returns the last position in a W&B row or summary, with keys `split/name`; None if it has no metrics."""
    positions = [
        row_position(split, {"samples": row[f"{split}/samples"]}) for split in _SPLITS if f"{split}/samples" in row
    ]
    return max(positions, default=None)


class UnreadableError(Exception):
    """W&B's reader timed out or could not read a session."""


def last_position_on_disk(folder: Path, current_session: Path, is_online: bool) -> RowPosition | None:
    """Returns the position of the last row in the session files of a run; None if there is none.

    folder: W&B's folder in the run folder.
    current_session: this session's folder, which is skipped.
    is_online: skip online sessions that were not closed, because only the server knows which rows it received.
    Raises UnreadableError.
    """
    sessions = sorted(
        (path for path in folder.glob("*run-*-*") if path.is_dir()), key=lambda path: path.name.split("run-")[1]
    )
    for session in reversed([path for path in sessions if path.resolve() != current_session.resolve()]):
        records = _read_records(session)
        positions = [
            position
            for record in records
            if (position := last_position(record.get("history", {}).get("item", {}))) is not None
        ]
        was_closed = any(record.get("type") == "exit" for record in records)
        if positions and (was_closed or not is_online or session.name.startswith("offline")):
            return max(positions)
    return None


def missing_rows(metrics: Path, end: RowPosition | None) -> Iterator[tuple[str, int, dict[str, float]]]:
    """Yields split, step and scalars of the lines in metrics.jsonl after position `end`, without null values."""
    for line in metrics.read_text(encoding="utf-8").splitlines() if metrics.is_file() else ():
        row = json.loads(line)
        split, step = row.pop("split"), row.pop("step")
        if end is None or row_position(split, row) > end:
            yield split, step, {name: value for name, value in row.items() if value is not None}


def _read_records(session: Path) -> list[dict[str, Any]]:
    """Returns the records of a session, read by W&B's own command. Raises UnreadableError."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(session)]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=_INSPECT_TIMEOUT_SECONDS, check=False)
        records: list[dict[str, Any]] = [json.loads(line) for line in result.stdout.splitlines()]
    except (subprocess.TimeoutExpired, ValueError) as error:
        raise UnreadableError(f"{session.name}: {type(error).__name__}") from None
    if result.returncode and not records and any(session.glob("*.wandb")):
        raise UnreadableError(f"{session.name}: {result.stderr.strip()[-160:]}")
    return records
