"""Lists the runs of a sweep: every combination of the grid's values with every seed."""

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from launch import forecast
from trainer.config.schema import RunConfig, settings_by_name
from trainer.errors import ConfigError, FolderError
from trainer.run.record import RunRecord

_NO_GRID = "(no grid)"


@dataclass(frozen=True, slots=True)
class SweepPoint:
    """One run of a sweep."""

    name: str
    """name of the run folder"""
    group: str
    """grid settings of the run, as text; the runs with other seeds have the same group"""
    settings: tuple[str, ...]
    """overrides for this run: grid settings, run.seed and run.name"""
    config: RunConfig

    @property
    def is_finished(self) -> bool:
        """Returns whether the run folder contains a finished run. A folder that cannot be read contains none."""
        try:
            return RunRecord(self.config.folder).status.get("state") == "finished"
        except FolderError:
            return False

    @property
    def damage(self) -> str:
        """Returns why the run folder cannot be read; empty if it can, and for a new one."""
        record = RunRecord(self.config.folder)
        try:
            _ = record.status and record.settings
        except FolderError as error:
            return str(error)
        return ""


def list_points(
    base: RunConfig, grid: Sequence[str], num_seeds: int, files: Sequence[str], overrides: Sequence[str]
) -> list[SweepPoint]:
    """Returns one point for each combination of grid values and each seed, with checked settings.

    base: the settings without the grid.
    grid: the arguments of --grid, SETTING=A,B each.

    Raises ConfigError.
    """
    if num_seeds < 1:
        raise ConfigError(f"--seeds {num_seeds}: expected 1 or more")
    points = []
    for combination in itertools.product(*map(parse_grid, grid)):
        group = " ".join(combination) or _NO_GRID
        folder_prefix = folder_name(group) if combination else "run"
        for seed in range(base.run.seed, base.run.seed + num_seeds):
            name = f"{folder_prefix}-seed-{seed}"
            settings = (*combination, f"run.seed={seed}", f"run.name={base.run.name}/{name}")
            config = forecast.load_settings(files, [*overrides, *settings])
            points.append(SweepPoint(name, group, settings, config))
    return points


def parse_grid(text: str) -> list[str]:
    """Parses `optim.lr=0.05,0.1` into ["optim.lr=0.05", "optim.lr=0.1"]. Raises ConfigError.

    A comma inside brackets or quotes belongs to a value.
    """
    name, equals, values = text.partition("=")
    if not equals or not values:
        raise ConfigError(f"--grid {text}: expected SETTING=A,B with the values to try, such as optim.lr=0.05,0.1")
    if name not in settings_by_name():
        forecast.load_settings([], [f"{name}={values}"])  # raises ConfigError with the most similar name
    if name in ("run.name", "run.seed", "run.root"):
        raise ConfigError(f"--grid {text}: the sweep sets {name} itself; try another setting, or use --seeds for seeds")
    return [f"{name}={value}" for value in _split_values(values)]


def _split_values(text: str) -> list[str]:
    """Splits at commas outside brackets and quotes."""
    values, depth, quote, start = [], 0, "", 0
    for position, character in enumerate(text):
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'":
            quote = character
        elif character in "[{":
            depth += 1
        elif character in "]}":
            depth -= 1
        elif character == "," and depth == 0:
            values.append(text[start:position])
            start = position + 1
    return [*values, text[start:]]


def folder_name(group: str) -> str:
    """Returns the settings of a group as a readable file name; a hash is appended if characters were replaced."""
    safe = "".join(character if character.isalnum() or character in ".=-_" else "_" for character in group)[:100]
    return safe if safe == group.replace(" ", "_") else f"{safe}-{hashlib.sha256(group.encode()).hexdigest()[:8]}"
