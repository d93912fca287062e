"""What each task of a SLURM array trains: a seed, or a point of a sweep. The task's number in, its settings out."""

import json
from collections.abc import Sequence
from pathlib import Path

from launch import forecast
from trainer.errors import ConfigError

_MOST_TASKS = 10_000


def settings_of_task(plan: str | None, task: int | None, files: Sequence[str], overrides: Sequence[str]) -> list[str]:
    """The settings of this array task, behind those that all have. Raises ConfigError."""
    if plan is not None:
        listed = json.loads(Path(plan).read_text())["points"]
        if task is None or task >= len(listed):
            raise ConfigError(f"array task {task} is no point of {plan}, which has {len(listed)}; use samecurve sweep")
        return [*overrides, *listed[task]["settings"]]
    return list(overrides) if task is None else settings_of_seed(task, files, overrides)


def settings_of_seed(seed: int, files: Sequence[str], overrides: Sequence[str]) -> list[str]:
    """An array's tasks are seeds, each with a run folder of its own."""
    if any(word.startswith("run.seed=") for word in overrides):
        raise ConfigError("an array's task numbers are its seeds; leave out run.seed or --array")
    name = forecast.load_settings(files, overrides).run.name
    return [*overrides, f"run.seed={seed}", f"run.name={name}-seed-{seed}"]


def parse_seeds(text: str) -> list[int]:
    """SLURM's way to write an array: 0-4, 1,3,7, 0-8:2, each with %N at most at once behind it. Raises ConfigError."""
    found: list[int] = []
    for part in text.partition("%")[0].split(","):
        span, _, stride = part.partition(":")
        first, dash, last = span.partition("-")
        numbers = (first, last if dash else first, stride or "1")
        are_numbers = all(number.isdecimal() and number.isascii() and len(number) < 8 for number in numbers)
        if not are_numbers or int(numbers[2]) == 0 or not 0 <= int(numbers[1]) - int(numbers[0]) < _MOST_TASKS:
            raise ConfigError(f"--array {text}: wanted seeds such as 0-4 or 1,3,7, and %2 behind for two at once")
        found += range(int(numbers[0]), int(numbers[1]) + 1, int(numbers[2]))
    return found
