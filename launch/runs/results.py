"""Summarizes the runs of a sweep: mean and standard deviation of the test accuracy by group, and the failed runs."""

import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.config.schema import RunConfig
from trainer.run.folder import RunFolder
from trainer.run.record import RunRecord


@dataclass(frozen=True, slots=True)
class Result:
    """The result of one run."""

    group: str
    """the settings that the runs of a group share"""
    name: str
    accuracy: float | None
    """on the test set, in [0, 1]; None: the run has not finished"""
    state: str
    reason: str

    @classmethod
    def from_run(cls, group: str, config: RunConfig) -> "Result":
        """Reads the result from the run folder. Raises FolderError if a file cannot be read."""
        record = RunRecord(config.folder)
        status = record.status or {"state": "not started", "reason": "its log contains the reason"}
        accuracy = float(record.summary["test"]["accuracy"]) if status["state"] == "finished" else None
        return cls(group, config.folder.name, accuracy, status["state"], status["reason"])


def group_results(results: list[Result]) -> dict[str, list[Result]]:
    """Returns the results by group, in the order of the first result of each group."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(result.group, []).append(result)
    return groups


def summarize(results: list[Result]) -> dict[str, Any]:
    """Returns the numbers of runs and of finished runs, mean and sample standard deviation of their accuracy."""
    accuracies = [result.accuracy for result in results if result.accuracy is not None]
    return {
        "runs": len(results),
        "finished": len(accuracies),
        "mean_accuracy": statistics.mean(accuracies) if accuracies else None,
        "standard_deviation": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
    }


def write_results(root: Path, results: list[Result]) -> None:
    """Writes results.json into the sweep's folder."""
    groups = [
        summarize(members) | {"settings": group, "accuracy": {result.name: result.accuracy for result in members}}
        for group, members in group_results(results).items()
    ]
    RunFolder(root).write_json("results.json", {"groups": groups})


def print_table(title: str, results: list[Result]) -> None:
    """Prints a row for each group, then a line for each run that has not finished."""
    from rich.console import Console  # lazy import: 0.1 s
    from rich.table import Table

    table = Table("settings", "finished", "test accuracy", "deviation", title=f"sweep {title}")
    for group, members in group_results(results).items():
        summary = summarize(members)
        mean, deviation = summary["mean_accuracy"], summary["standard_deviation"]
        table.add_row(
            group,
            f"{summary['finished']} of {summary['runs']}",
            "-" if mean is None else f"{mean:.2%}",
            "-" if deviation is None else f"{deviation:.2%}",
        )
    Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 150).print(table)
    for result in results:
        if result.accuracy is None:
            print(f"{result.name}: {result.state}" + (f": {result.reason}" if result.reason else ""))
