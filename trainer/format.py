"""Formats durations and per-class scores for the terminal and the report."""

from collections.abc import Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from trainer.text.escape import escape


def format_duration(seconds: float) -> str:
    """Formats a duration as 3:07:55, 7:55 or 5.2 s."""
    minutes, whole_seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02}:{whole_seconds:02}"
    return f"{minutes}:{whole_seconds:02}" if minutes else f"{seconds:.1f} s"


def class_table(
    classes: list[dict[str, Any]], title: str, scores: Sequence[str] = ("precision", "recall", "f1")
) -> Table:
    """Returns a table with one row per class: name, scores in percent, number of images.

    classes: the list `classes` of summary.json.
    """
    table = Table("class", *scores, "images", title=title)
    for column in table.columns[1:]:
        column.justify = "right"
    for row in classes:
        table.add_row(Text(escape(row["name"])), *(f"{row[score]:.1%}" for score in scores), f"{row['support']:,}")
    return table
