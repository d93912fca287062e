"""Parses the text of a time, a range of steps or a named learning rate into numbers."""

import math
import re


def parse_name_and_rate(text: str) -> tuple[str, float]:
    """Parses NAME=RATE; returns (text, nan) for anything else."""
    name, _, rate = text.rpartition("=")
    try:
        return name, float(rate)
    except ValueError:
        return text, math.nan


def parse_seconds(text: str) -> float | None:
    """Parses 5400, 90m, 1h30m, 1:30:00 or 2-12:00:00 (days, in SLURM's format) into seconds.

    Returns None for anything else.
    """
    text = text.strip()
    clock = re.fullmatch(r"(?:(\d{1,6})-)?(\d{1,6}):(\d\d)(?::(\d\d))?", text, re.ASCII)
    if clock:
        days, first, second, third = clock.groups()
        if third is None and days is None:
            return float(int(first) * 60 + int(second))  # minutes and seconds
        return float(int(days or 0) * 86400 + int(first) * 3600 + int(second) * 60 + int(third or 0))
    units = re.fullmatch(r"(?:(\d{1,6})d)?(?:(\d{1,6})h)?(?:(\d{1,9})m)?(?:(\d{1,9})s?)?", text, re.ASCII)
    if not units or not text:
        return None
    return float(sum(int(count or 0) * unit for count, unit in zip(units.groups(), (86400, 3600, 60, 1), strict=True)))


def parse_step_range(text: str) -> tuple[int, int] | None:
    """Parses `steps 10-20` or `10-20` into (10, 20). Returns None for anything else, such as 0-5 or 20-10."""
    match = re.fullmatch(r"(?:steps?\s+)?(\d{1,9})\s*-\s*(\d{1,9})", text.strip(), re.ASCII)
    first, last = (int(match[1]), int(match[2])) if match else (0, 0)
    return (first, last) if 1 <= first <= last else None
