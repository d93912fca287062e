"""Turns the task number of a SLURM array into the settings of its run: a seed, or a point of a sweep."""

import json
from collections.abc import Sequence
from pathlib import Path

from launch import forecast
from trainer.errors import ConfigError

_MAX_TASKS = 10_000


def settings_of_task(plan: str | None, task: int | None, files: Sequence[str], overrides: Sequence[str]) -> list[str]:
    """Returns the overrides followed by the settings of an array task. Raises ConfigError.

    plan: path of a sweep's sweep.json; None: the task numbers are seeds.
    task: the array task number; None outside an array.
    files: the config files, which name the run of a seed.
    """
    if plan is not None:
        points = json.loads(Path(plan).read_text())["points"]
        if task is None or task >= len(points):
            raise ConfigError(
                f"array task {task} is not among the {len(points)} points of {plan}; submit with samecurve sweep"
            )
        return [*overrides, *points[task]["settings"]]
    return list(overrides) if task is None else settings_of_seed(task, files, overrides)


def settings_of_seed(seed: int, files: Sequence[str], overrides: Sequence[str]) -> list[str]:
    """Returns the overrides followed by the seed and its own run name. Raises ConfigError."""
    if any(override.startswith("run.seed=") for override in overrides):
        raise ConfigError("the task numbers of --array are the seeds, but run.seed is set; leave out one of the two")
    name = forecast.load_settings(files, overrides).run.name
    return [*overrides, f"run.seed={seed}", f"run.name={name}-seed-{seed}"]


def parse_seeds(text: str) -> list[int]:
    """Parses sbatch's array notation: 0-4, 1,3,7 or 0-8:2, each with an optional %N. Raises ConfigError."""
    seeds: list[int] = []
    for entry in text.partition("%")[0].split(","):
        span, _, stride = entry.partition(":")
        first, dash, last = span.partition("-")
        numbers = (first, last if dash else first, stride or "1")
        are_numbers = all(number.isdecimal() and number.isascii() and len(number) < 8 for number in numbers)
        if not are_numbers or int(numbers[2]) == 0 or not 0 <= int(numbers[1]) - int(numbers[0]) < _MAX_TASKS:
            raise ConfigError(f"--array {text}: expected seeds such as 0-4 or 1,3,7; append %2 to run two at a time")
        seeds += range(int(numbers[0]), int(numbers[1]) + 1, int(numbers[2]))
    return seeds
