"""Finished runs in, a table out: mean and standard deviation of each group's accuracy, and the runs that failed."""

import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.config.schema import RunConfig
from trainer.run.folder import RunFolder


@dataclass(frozen=True, slots=True)
class Result:
    group: str
    name: str
    accuracy: float | None
    """on the test set, in [0, 1]; None: the run has not finished"""
    state: str
    reason: str

    @classmethod
    def of(cls, group: str, config: RunConfig) -> "Result":
        """What lies in a run's folder."""
        folder = RunFolder(config.folder)
        status: Any = folder.read_json("status.json") or {"state": "not started", "reason": "its log says why"}
        accuracy = None
        if status["state"] == "finished":
            summary: Any = folder.read_json("summary.json")
            accuracy = float(summary["test"]["accuracy"])
        return cls(group, config.folder.name, accuracy, status["state"], status["reason"])


def grouped(results: list[Result]) -> dict[str, list[Result]]:
    """In the order in which they came."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(result.group, []).append(result)
    return groups


def summary_of(results: list[Result]) -> dict[str, Any]:
    """A group's numbers: runs, how many finished, mean and sample standard deviation of their accuracy."""
    done = [result.accuracy for result in results if result.accuracy is not None]
    return {
        "runs": len(results),
        "finished": len(done),
        "mean_accuracy": statistics.mean(done) if done else None,
        "standard_deviation": statistics.stdev(done) if len(done) > 1 else None,
    }


def write_results(root: Path, results: list[Result]) -> None:
    """results.json beside the runs."""
    groups = [
        summary_of(members) | {"settings": name, "accuracy": {run.name: run.accuracy for run in members}}
        for name, members in grouped(results).items()
    ]
    RunFolder(root).write_json("results.json", {"groups": groups})


def table(title: str, results: list[Result]) -> None:
    """For a person; what failed is named below."""
    from rich.console import Console  # late: 0.1 s
    from rich.table import Table

    shown = Table("settings", "finished", "test accuracy", "deviation", title=f"sweep {title}")
    for name, members in grouped(results).items():
        numbers = summary_of(members)
        mean, deviation = numbers["mean_accuracy"], numbers["standard_deviation"]
        shown.add_row(
            name,
            f"{numbers['finished']} of {numbers['runs']}",
            "-" if mean is None else f"{mean:.2%}",
            "-" if deviation is None else f"{deviation:.2%}",
        )
    Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 150).print(shown)
    for result in results:
        if result.accuracy is None:
            print(f"{result.name}: {result.state}" + (f": {result.reason}" if result.reason else ""))
