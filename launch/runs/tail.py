"""Reads the last lines of a text file of any length."""

import os
from pathlib import Path
from typing import BinaryIO

_BLOCK_BYTES = 1 << 16


def last_lines(path: Path, count: int) -> list[str]:
    """Returns the last lines of a file. Raises OSError if it cannot be read."""
    with path.open("rb") as file:
        file.seek(offset_of_last_lines(file, count))
        text = file.read().decode(errors="backslashreplace").removesuffix("\n")
        return text.split("\n")[-count:] if text else []


def offset_of_last_lines(file: BinaryIO, count: int) -> int:
    """Returns the byte offset of the last `count` lines. Reads blocks from the end until it has found it."""
    newlines = count + 1  # the newline before the first of these lines counts too
    position = file.seek(0, os.SEEK_END)
    while position > 0:
        start = max(0, position - _BLOCK_BYTES)
        file.seek(start)
        block = file.read(position - start)
        index = len(block)
        while newlines and (index := block.rfind(b"\n", 0, index)) >= 0:
            newlines -= 1
        if not newlines:
            return start + index + 1
        position = start
    return 0
