"""Rows of words in, lines as wide as the place they go to out. A file is wide enough for all; a terminal may not be."""

import shutil
import sys
from collections.abc import Sequence

_GAP = "  "
_LEAST_NAME = 12  # characters that a name keeps, however narrow the terminal


def width() -> int | None:
    """Columns of the terminal that standard output goes to; None: it goes to a file, which has no end."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def lines(titles: Sequence[str], rows: Sequence[Sequence[str]], width: int | None, keep: Sequence[str]) -> list[str]:
    """The first column is names, at the left; the others are at the right. A column with nothing in it is left out.

    Where it is too narrow, names are cut in their middle, then columns are left out from the right, except those to
    `keep`.
    """
    columns = [[title, *cells] for title, *cells in zip(titles, *rows, strict=True) if any(cells)]
    while True:
        widths = [max(map(len, column)) for column in columns]
        too_much = 0 if width is None else sum(widths) + len(_GAP) * (len(widths) - 1) - width
        least = min(widths[0], _LEAST_NAME)
        spare = [column for column in columns[1:] if column[0] not in keep]
        if widths[0] - too_much >= least or not spare:
            break
        columns.remove(spare[-1])
    widths[0] = min(widths[0], max(least, widths[0] - max(0, too_much)))
    columns[0] = [shortened(name, widths[0]) for name in columns[0]]
    return [
        _GAP.join(
            [cells[0].ljust(widths[0]), *(cell.rjust(at) for cell, at in zip(cells[1:], widths[1:], strict=True))]
        )
        for cells in zip(*columns, strict=True)
    ]


def shortened(name: str, length: int) -> str:
    """Cut in the middle: the names of a sweep's points begin alike, and end each in its own way."""
    if len(name) <= length:
        return name
    head = (length - 1) // 2
    return f"{name[:head]}…{name[len(name) - (length - 1 - head) :]}"
