"""Numbers in, words for people out."""

from collections.abc import Sequence
from typing import Any

from rich.table import Table


def format_duration(seconds: float) -> str:
    """3:07:55, 7:55, or 5.2 s."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}" if minutes else f"{seconds:.1f} s"


def class_table(
    classes: list[dict[str, Any]], title: str, scores: Sequence[str] = ("precision", "recall", "f1")
) -> Table:
    """classes: as summary.json has them."""
    table = Table("class", *scores, "images", title=title)
    for column in table.columns[1:]:
        column.justify = "right"
    for row in classes:
        table.add_row(row["name"], *(f"{row[name]:.1%}" for name in scores), f"{row['support']:,}")
    return table
