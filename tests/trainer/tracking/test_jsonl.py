"""Tests JSON Lines files: rows are written at once, and a full disk loses none."""

import json
from pathlib import Path

import pytest

from trainer.tracking.jsonl import FileIO, JsonLines, MetricsFile


def test_metrics_row_is_in_the_file_at_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tracker = MetricsFile(path, print)
    tracker.log("train", {"loss": 0.5, "grad_norm": float("nan")}, 7)
    assert json.loads(path.read_text()) == {"split": "train", "step": 7, "loss": 0.5, "grad_norm": None}
    tracker.close()


def test_lines_for_a_full_disk_are_written_later_and_block_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, warnings = tmp_path / "metrics.jsonl", list[str]()
    rows = JsonLines(path, warnings.append)
    rows.write({"step": 1})

    class FullDisk(FileIO):
        def write(self, content: object) -> int:
            return super().write(b'{"st')  # a full disk takes a part of the bytes

    with monkeypatch.context() as patch, FullDisk(path, "ab") as full_disk:
        patch.setattr(rows, "_file", full_disk)
        for step in (2, 3):
            rows.write({"step": step})
        assert len(warnings) == 1 and "No space left" in warnings[0]
        with pytest.raises(OSError, match="No space left"):
            rows.flush()
        assert path.read_text() == '{"step": 1}\n', "no partial line"
    rows.flush()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]
    rows.close()


def test_deleted_file_is_created_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    rows = JsonLines(path, print)
    rows.write({"step": 1})
    path.unlink()
    rows.write({"step": 2})
    assert path.read_text() == '{"step": 2}\n'
    rows.close()
