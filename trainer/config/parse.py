"""What a person types for a time, some steps or the rate of a part in, numbers out; no number for anything else."""

import math
import re


def parse_rate(text: str) -> tuple[str, float]:
    name, _, rate = text.rpartition("=")
    try:
        return name, float(rate)
    except ValueError:
        return text, math.nan


def parse_seconds(text: str) -> float | None:
    """5400, 90m, 1h30m, 1:30:00 or 2-12:00:00 (days, as SLURM writes them) in seconds; None for anything else."""
    text = text.strip()
    clock = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d\d)(?::(\d\d))?", text)
    if clock:
        days, first, second, third = clock.groups()
        if third is None and days is None:
            return float(int(first) * 60 + int(second))  # minutes and seconds
        return float(int(days or 0) * 86400 + int(first) * 3600 + int(second) * 60 + int(third or 0))
    parts = re.fullmatch(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s?)?", text)
    if not parts or not text:
        return None
    return float(sum(int(part or 0) * unit for part, unit in zip(parts.groups(), (86400, 3600, 60, 1), strict=True)))


def parse_steps(text: str) -> tuple[int, int] | None:
    """steps 10-20 or 10-20 as (10, 20); None for anything else, and for steps that there are not."""
    found = re.fullmatch(r"(?:steps?\s+)?(\d+)\s*-\s*(\d+)", text.strip())
    first, last = (int(found[1]), int(found[2])) if found else (0, 0)
    return (first, last) if 1 <= first <= last else None
