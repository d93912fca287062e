"""Summarizes the runs of a sweep: mean and standard deviation of the accuracy by group, best group first.

The groups are ranked by validation accuracy if the runs have a validation part, because the test set selects nothing.
"""

import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.config.schema import RunConfig
from trainer.errors import FolderError
from trainer.run.files import disk_errors_as_user_errors
from trainer.run.folder import RunFolder
from trainer.run.record import RunRecord
from trainer.text.escape import escape


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
    validation_accuracy: float | None = None
    """in [0, 1]; None without a validation part"""

    @classmethod
    def from_run(cls, group: str, config: RunConfig) -> "Result":
        """Reads the result from the run folder. The state is "unreadable" if a file cannot be read."""
        record, name = RunRecord(config.folder), config.folder.name
        try:
            status = record.status or {"state": "not started", "reason": "its log contains the reason"}
            state, reason = status.get("state") or "unknown", status.get("reason") or ""
            if state != "finished":
                return cls(group, name, None, state, reason)
            test, validation = record.summary.get("test"), record.summary.get("validation") or {}
        except FolderError as error:
            return cls(group, name, None, "unreadable", str(error))
        if test is None:
            return cls(
                group, name, None, "unreadable", f"{config.folder / 'summary.json'} has no result of the test set"
            )
        return cls(group, name, float(test["accuracy"]), state, reason, validation.get("accuracy"))


def group_results(results: list[Result]) -> dict[str, list[Result]]:
    """Returns the results by group, in the order of the first result of each group."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(result.group, []).append(result)
    return groups


def selection_split(results: list[Result]) -> str:
    """Returns the split by whose accuracy groups are compared: validation, or test if a finished run has none."""
    finished = [result for result in results if result.accuracy is not None]
    return "validation" if finished and all(result.validation_accuracy is not None for result in finished) else "test"


def rank_groups(results: list[Result]) -> list[tuple[str, list[Result]]]:
    """Returns the groups with their results, highest mean accuracy on selection_split first, groups without it last."""
    split = selection_split(results)

    def rank(members: list[Result]) -> float:
        mean = summarize(members).get(_MEAN_KEYS[split])  # None: no member has finished
        return 1.0 if mean is None else -float(mean)

    return sorted(group_results(results).items(), key=lambda group: rank(group[1]))


_MEAN_KEYS = {"test": "mean_accuracy", "validation": "mean_validation_accuracy"}


def summarize(results: list[Result]) -> dict[str, Any]:
    """Returns the numbers of runs and of finished runs, mean and sample standard deviation of their accuracies.

    The keys with "validation" are there if all finished runs have a validation part.
    """
    finished = [result for result in results if result.accuracy is not None]
    mean, deviation = _mean_and_deviation([result.accuracy for result in finished])
    summary = {
        "runs": len(results),
        "finished": len(finished),
        "mean_accuracy": mean,
        "standard_deviation": deviation,
    }
    if selection_split(results) == "validation":
        mean, deviation = _mean_and_deviation([result.validation_accuracy for result in finished])
        summary |= {"mean_validation_accuracy": mean, "validation_standard_deviation": deviation}
    return summary


def _mean_and_deviation(accuracies: list[float | None]) -> tuple[float | None, float | None]:
    values = [accuracy for accuracy in accuracies if accuracy is not None]
    return (
        statistics.mean(values) if values else None,
        statistics.stdev(values) if len(values) > 1 else None,
    )


def write_results(root: Path, results: list[Result]) -> None:
    """Writes results.json into the sweep's folder. Raises FolderError if it cannot be written."""
    groups = []
    for group, members in rank_groups(results):
        content = summarize(members) | {"settings": group}
        content["accuracy"] = {result.name: result.accuracy for result in members}
        if "mean_validation_accuracy" in content:
            content["validation_accuracy"] = {result.name: result.validation_accuracy for result in members}
        groups.append(content)
    with disk_errors_as_user_errors(str(root / "results.json")):
        ranked_by = f"{selection_split(results)} accuracy"
        RunFolder(root).write_json("results.json", {"ranked_by": ranked_by, "groups": groups})


def print_table(title: str, results: list[Result]) -> None:
    """Prints a row for each group, best first, and by what they are ranked; then a line for each unfinished run."""
    from rich.console import Console  # lazy import: 0.1 s
    from rich.table import Table

    split = selection_split(results)
    splits = ("validation", "test") if split == "validation" else ("test",)
    columns = [name for split in splits for name in (f"{split} accuracy", "deviation")]
    table = Table("settings", "finished", *columns, title=f"sweep {escape(title)}, by {split} accuracy")
    for group, members in rank_groups(results):
        summary = summarize(members)
        cells = [f"{summary['finished']} of {summary['runs']}"]
        if split == "validation":
            cells += [
                _percent(summary.get(key)) for key in ("mean_validation_accuracy", "validation_standard_deviation")
            ]
        cells += [_percent(summary[key]) for key in ("mean_accuracy", "standard_deviation")]
        table.add_row(escape(group), *cells)
    Console(highlight=False, markup=False, emoji=False, width=None if sys.stdout.isatty() else 150).print(table)
    for result in results:
        if result.accuracy is None:
            print(escape(f"{result.name}: {result.state}" + (f": {result.reason}" if result.reason else "")))


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2%}"
