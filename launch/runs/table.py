"""Formats a table of text that fits the width of the terminal."""

import shutil
import sys
from collections.abc import Sequence

from trainer.text.escape import escape, shorten

_GAP = "  "
_MIN_NAME_WIDTH = 12  # a narrow terminal does not shorten names further


def terminal_width() -> int | None:
    """Returns the columns of the terminal; None if standard output is not a terminal."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def format_table(
    titles: Sequence[str], rows: Sequence[Sequence[str]], width: int | None, keep: Sequence[str]
) -> list[str]:
    """Returns the lines of a table, the title line first. Omits columns without content.

    The first column contains names and is left-aligned; the others are right-aligned. If the table is wider than
    `width`, shortens the names, then omits columns from the right, except those with a title in `keep`.
    width: in characters; None: unlimited.
    """
    shown = [[escape(cell) for cell in row] for row in rows]
    columns = [[title, *cells] for title, *cells in zip(titles, *shown, strict=True) if any(cells)]
    while True:
        widths = [max(map(len, column)) for column in columns]
        excess = 0 if width is None else sum(widths) + len(_GAP) * (len(widths) - 1) - width
        min_name_width = min(widths[0], _MIN_NAME_WIDTH)
        removable = [column for column in columns[1:] if column[0] not in keep]
        if widths[0] - excess >= min_name_width or not removable:
            break
        columns.remove(removable[-1])
    widths[0] = min(widths[0], max(min_name_width, widths[0] - max(0, excess)))
    columns[0] = [shorten(name, widths[0]) for name in columns[0]]
    return [
        _GAP.join(
            [
                name.ljust(widths[0]),
                *(cell.rjust(cell_width) for cell, cell_width in zip(cells, widths[1:], strict=True)),
            ]
        )
        for name, *cells in zip(*columns, strict=True)
    ]
