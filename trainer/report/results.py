"""Collects a run's results for report pages: headline numbers as text, and charts of its curves."""

import math
from typing import Any, NamedTuple

from trainer.format import format_duration
from trainer.report.figures import CURVES
from trainer.report.scales import Kind
from trainer.report.svg import Mark, Series, line_chart
from trainer.run.record import RunRecord

SPLITS = ("train", "test", "validation")
"""in the order of their colors"""
CHART_KINDS: dict[str, Kind] = {"loss": "loss", "accuracy": "accuracy", "samples_per_second": "from_zero"}


class Results(NamedTuple):
    """A run's headline numbers as text. "-" means that the run has no such number yet."""

    state: str
    reason: str
    """why the run stopped or failed; may be empty"""
    test_accuracy: str
    tta_accuracy: str
    """with test-time augmentation"""
    test_loss: str
    validation_accuracy: str
    best_accuracy: str
    best_split: str
    """split of best_accuracy: validation, or test without a validation part"""
    best_step: str
    parameters: str
    """the number of weights"""
    time: str
    images_per_second: str
    epochs: str
    steps: str
    world_size: str
    restarts: str


def read_results(record: RunRecord) -> Results:
    """Returns the headline numbers. Raises FolderError if a file of the run cannot be read."""
    test_row, train_row, summary = last_row(record, "test"), record.last_train_row, record.current_summary
    seconds, loss, best = summary.get("seconds") or train_row.get("seconds"), test_row.get("loss"), record.best
    speed = (summary.get("train") or train_row).get("samples_per_second")
    return Results(
        state=record.status.get("state") or "unknown",
        reason=record.status.get("reason") or "",
        test_accuracy=format_percent(test_row.get("accuracy")),
        tta_accuracy=format_percent(test_row.get("tta_accuracy")),
        test_loss="-" if loss is None else f"{loss:.4f}" if abs(loss) < 1e6 else f"{loss:.4g}",
        validation_accuracy=format_percent(last_row(record, "validation").get("accuracy")),
        best_accuracy=format_percent(best.accuracy if best else None),
        best_split=record.selection_split,
        best_step=format_count(best.step if best else None),
        parameters=format_count(record.environment.get("parameters")),
        time="-" if seconds is None else format_duration(seconds),
        images_per_second=format_count(speed),
        epochs=f"{train_row.get('epoch') or 0:.4g}",
        steps=format_count(record.status.get("step")),
        world_size=format_count(record.environment.get("world_size")),
        restarts=str(record.restarts),
    )


def last_row(record: RunRecord, split: str) -> dict[str, Any]:
    """Returns the last row of a split, or {}. RunRecord.last_test_row finds it only near the end of metrics.jsonl."""
    return next((row for row in reversed(record.rows) if row["split"] == split), {})


def curve_charts(record: RunRecord) -> str:
    """Returns the charts of all curves of a run as HTML. Each split has a color; the best step is marked."""
    charts = []
    for metric, title in CURVES:
        kind = CHART_KINDS.get(metric, "plain")
        mark = best_mark(record) if metric in ("loss", "accuracy") else None
        chart = line_chart(split_series(record, metric), "epoch", title, kind, mark)
        charts.append(f"<figure><figcaption>{title}</figcaption>{chart}</figure>")
    return f'<div class="charts">{"".join(charts)}</div>'


def split_series(record: RunRecord, metric: str) -> list[Series]:
    """Returns the curve of each split that has the metric."""
    series = [Series(split, record.points(split, metric), color) for color, split in enumerate(SPLITS)]
    return [line for line in series if line.points]


def best_mark(record: RunRecord) -> Mark | None:
    """Returns the mark of the best step, with its split; None before the first evaluation."""
    best = record.best
    if best is None or best.epoch is None:
        return None
    return Mark(best.epoch, f"best {best.split} accuracy {best.accuracy:.2%}, step {best.step:,}")


def format_count(value: float | None) -> str:
    """Returns a whole number with thousands separators, or "-" without a finite value."""
    return "-" if value is None or not math.isfinite(value) else f"{value:,.0f}"


def format_percent(value: float | None) -> str:
    """Returns a share in percent, or "-" without one."""
    return "-" if value is None else f"{value:.2%}"
