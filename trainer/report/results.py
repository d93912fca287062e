"""Collects a run's results for report pages: headline numbers as text, and charts of its curves."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from trainer.format import format_duration
from trainer.report.figures import CURVES
from trainer.report.svg import Series, line_chart
from trainer.run.record import RunRecord


class Results(NamedTuple):
    """A run's headline numbers as text. "-" means that the run has no such number yet."""

    state: str
    reason: str
    """why the run stopped or failed; may be empty"""
    test_accuracy: str
    tta_accuracy: str
    """with test-time augmentation"""
    test_loss: str
    time: str
    images_per_second: str
    epochs: str
    steps: str
    world_size: str
    restarts: str


def read_results(record: RunRecord) -> Results:
    """Returns the headline numbers. Raises FolderError if a file of the run cannot be read."""
    test_row, train_row, summary = last_test_row(record), record.last_train_row, record.current_summary
    seconds = summary.get("seconds") or train_row.get("seconds")
    loss = test_row.get("loss")
    return Results(
        state=str(record.status.get("state", "unknown")),
        reason=str(record.status.get("reason") or ""),
        test_accuracy=_format_percent(test_row.get("accuracy")),
        tta_accuracy=_format_percent(test_row.get("tta_accuracy")),
        test_loss="-" if loss is None else f"{loss:.4f}",
        time="-" if seconds is None else format_duration(seconds),
        images_per_second=format_count(summary.get("train", train_row).get("samples_per_second")),
        epochs=f"{train_row.get('epoch', 0):.4g}",
        steps=format_count(record.status.get("step")),
        world_size=format_count(record.environment.get("world_size")),
        restarts=str(record.restarts),
    )


def last_test_row(record: RunRecord) -> dict[str, Any]:
    """Returns the last test row, or {}. RunRecord.last_test_row finds it only near the end of metrics.jsonl."""
    return next((row for row in reversed(record.rows) if row["split"] == "test"), {})


def curve_charts(records: Sequence[RunRecord]) -> str:
    """Returns the charts of all curves as HTML. For one run each split has a color, for several runs each run."""
    charts = []
    for metric, title in CURVES:
        series = _series(records[0], metric) if len(records) == 1 else _series_of_runs(records, metric)
        percent, from_zero = metric == "accuracy", metric == "samples_per_second"
        chart = line_chart(series, "epoch", title, percent=percent, from_zero=from_zero)
        charts.append(f"<figure><figcaption>{title}</figcaption>{chart}</figure>")
    return f'<div class="charts">{"".join(charts)}</div>'


def _series(record: RunRecord, metric: str) -> list[Series]:
    splits = ("train", "test", "validation")
    series = [Series(split, record.points(split, metric), color) for color, split in enumerate(splits)]
    return [line for line in series if line.points]


def _series_of_runs(records: Sequence[RunRecord], metric: str) -> list[Series]:
    """Dashes the train curves if there are test curves to compare with."""
    has_test = any(record.points("test", metric) for record in records)
    return [
        Series(f"{record.name}: {line.name}", line.points, color, dashed=line.name == "train" and has_test)
        for color, record in enumerate(records)
        for line in _series(record, metric)
    ]


def format_count(value: float | None) -> str:
    """Returns a whole number with thousands separators, or "-" without a finite value."""
    return "-" if value is None or not math.isfinite(value) else f"{value:,.0f}"


def _format_percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2%}"
